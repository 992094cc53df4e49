"""A recording pinned as its user would pin it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from bag_files import write_bag
from replay_bags import shipped_rows

from pi05_ros.testing import check_golden
from pi05_ros.tools.action_log import ActionLog, ActionLogError
from pi05_ros.tools.cli import main
from pi05_ros.tools.random_checkpoint import make_checkpoint


@pytest.fixture(scope='module')
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(row[0].replace('/camera', '/cell/camera'), *row[1:]) for row in shipped_rows(0.3)]
    return write_bag(tmp_path_factory.mktemp('bag') / 'cup', rows)


@pytest.fixture(scope='module')
def golden(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, bag: Path) -> Path:
    path = tmp_path_factory.mktemp('golden') / 'cup.npz'
    status = main([
        'replay', str(bag), '--checkpoint', str(tiny_checkpoint), '--record-golden', str(path),
        '--rate-hz', '10', '--seed', '4', '-p', 'num_steps:=2', '--precision', 'float32',
        '-r', 'camera/base/image_raw:=cell/camera/base/image_raw',
        '-r', 'camera/wrist/image_raw:=cell/camera/wrist/image_raw',
    ])  # fmt: skip
    assert status == 0
    return path


def test_pinned_recording_passes_with_the_settings_in_the_file(golden, bag, tiny_checkpoint):
    assert check_golden(golden, bag=bag, checkpoint=tiny_checkpoint).is_identical


def test_other_actions_fail_and_say_where(golden, bag, tiny_checkpoint):
    expected = re.escape('first difference: tick 0, row 0, panda_joint1')
    with pytest.raises(AssertionError, match=expected):
        check_golden(golden, bag=bag, checkpoint=tiny_checkpoint, parameters={'seed': 5})


def test_tolerance_is_in_the_unit_of_the_action(golden, bag, tiny_checkpoint, tmp_path):
    log = ActionLog.load(golden)
    shifted = tmp_path / 'shifted.npz'
    replace(log, actions=log.actions + 0.001).save(shifted)
    check_golden(shifted, bag=bag, checkpoint=tiny_checkpoint, max_abs_error=0.0011)
    with pytest.raises(AssertionError, match=r'largest difference: 0\.001; allowed: 0\.0009'):
        check_golden(shifted, bag=bag, checkpoint=tiny_checkpoint, max_abs_error=0.0009)


def test_other_ticks_fail_whatever_the_tolerance(golden, bag, tiny_checkpoint, tmp_path):
    log = ActionLog.load(golden)
    fewer = tmp_path / 'fewer.npz'
    part = {name: getattr(log, name)[1:] for name in ('actions', 'ticks', 'times_ns', 'stamps_ns')}
    replace(log, **part).save(fewer)
    with pytest.raises(AssertionError, match='1 ticks acted in the other only'):
        check_golden(fewer, bag=bag, checkpoint=tiny_checkpoint, max_abs_error=100.0)


def test_other_weights_fail_and_say_so(golden, bag, tmp_path):
    other = tmp_path / 'other'
    make_checkpoint('tiny', other, seed=1)
    with pytest.raises(AssertionError, match='was recorded with other weights'):
        check_golden(golden, bag=bag, checkpoint=other, max_abs_error=100.0)


def test_file_that_does_not_say_how_it_was_made_is_refused(golden, bag, tiny_checkpoint, tmp_path):
    bare = tmp_path / 'bare.npz'
    replace(ActionLog.load(golden), origin={}).save(bare)
    with pytest.raises(ActionLogError, match='does not say how it was made'):
        check_golden(bare, bag=bag, checkpoint=tiny_checkpoint)

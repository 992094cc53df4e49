"""``pi05-ros bench --ros``: sensors, node and subscriber in three processes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from pi05_ros.policy.robot import load_robot
from pi05_ros.tools.bench_sensors import draw_pictures
from pi05_ros.tools.cli import main
from pi05_ros.tools.latency import PARTS
from pi05_ros.tools.sensors import rest_positions

DEADLINE_S = 100


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-m', 'pi05_ros.tools.cli', 'bench', '--ros', *arguments]
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip


@pytest.mark.ros
@pytest.mark.timeout(150)
def test_every_action_of_a_run_is_measured_and_its_parts_add_up(tiny_checkpoint, tmp_path):
    file, picture = tmp_path / 'latency.json', tmp_path / 'latency.png'
    result = bench(
        '--checkpoint', tiny_checkpoint, '--sizes', '64x48', '--transports', 'compressed',
        '--rate-hz', 4, '--duration-s', 2, '--rates', '3', '--window-s', 2, '--steps', 2,
        '--camera-rate-hz', 15, '--fastdds-profile', 'default', '--json', file, '--plot', picture,
        '--ros-args', '-p', 'max_image_age_ms:=1000.0', '-p', 'max_joint_age_ms:=1000.0',
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'highest rate with less than 1 % skipped' in result.stdout
    document = json.loads(file.read_text())
    assert document['failures'] == []
    assert [window['rate_hz'] for window in document['windows']] == [4.0, 3.0]
    for window in document['windows']:
        assert window['ticks'] == window['actions'] + sum(window['skips'].values())
        assert window['actions'] == window['timings'] == window['arrivals'] == window['matched']
        assert window['actions'] > 0
        means = {name: spread['mean_ms'] for name, spread in window['spreads'].items()}
        assert sum(means[name] for name in PARTS) == pytest.approx(means['sensor to action'])
        assert all(means[name] > 0 for name in PARTS if name not in ('delivery', 'model host'))
    assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.ros
@pytest.mark.timeout(150)
def test_a_node_that_refuses_is_reported_with_its_reason(tiny_checkpoint, tmp_path):
    file = tmp_path / 'latency.json'
    result = bench(
        '--checkpoint', tiny_checkpoint, '--sizes', '64x48', '--transports', 'raw',
        '--fastdds-profile', 'default', '--json', file, '--ros-args', '-p', 'asset_id:=nowhere',
    )  # fmt: skip
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout + result.stderr
    (failure,) = json.loads(file.read_text())['failures']
    assert failure['inputs'] == '64x48 raw'
    assert 'nowhere' in failure['reason']
    assert failure['reason'] in result.stdout


@pytest.mark.ros
def test_what_the_time_limit_leaves_out_is_reported(tiny_checkpoint, tmp_path):
    file = tmp_path / 'latency.json'
    result = bench('--checkpoint', tiny_checkpoint, '--time-limit-s', '1e-6', '--json', file,
                   '--sizes', '64x48,32x24', '--transports', 'raw')  # fmt: skip
    assert result.returncode == 1
    failures = json.loads(file.read_text())['failures']
    assert [failure['inputs'] for failure in failures] == ['64x48 raw', '32x24 raw']
    assert '--time-limit-s 1e-06 is over' in failures[0]['reason']


@pytest.mark.ros
@pytest.mark.parametrize(
    ('options', 'complaint'),
    [
        (['--rates', '20,30'], '--rates: only used with --ros'),
        (['--ros', '--rate-hz', '20,30'], '2 values of --rate-hz: the node of --ros ticks at'),
        (['--ros', '--views', '3', '--cases'], '--cases, --views: not used with --ros'),
        (['--ros', '--robot', 'r2d2'], "unknown robot 'r2d2'"),
        (['--ros', '--fastdds-profile', 'none'], "transport profile 'none'"),
        (['--ros', '--checkpoint', '/nowhere'], 'checkpoint /nowhere does not exist'),
    ],
)
def test_options_that_cannot_work_end_at_once(options, complaint, capsys):
    assert main(['bench', *options]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ('option', 'text', 'complaint'),
    [
        ('--sizes', '640', "'640' is not WIDTHxHEIGHT"),
        ('--sizes', '640x480,0x3', "'0x3' is not WIDTHxHEIGHT"),
        ('--transports', 'raw,png', "'png' is not one of raw, compressed"),
        ('--rates', '20,-1', "'-1' is not a positive number"),
    ],
)
def test_values_that_cannot_be_read_are_named(option, text, complaint, capsys):
    with pytest.raises(SystemExit):
        main(['bench', '--ros', option, text])
    assert complaint in capsys.readouterr().err


def test_pictures_differ_and_are_nowhere_black():
    pictures = draw_pictures(48, 64, seed=1)
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    assert all(picture.min() > 0 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert np.std(pictures[0]) > 10


def test_an_arm_rests_within_its_limits():
    robot = load_robot('franka')
    names, positions = rest_positions(robot)
    assert names == [dim.joint for dim in robot.state]
    limits = {dim.joint: (dim.min, dim.max) for dim in robot.actions}
    for name, position in zip(names, positions, strict=True):
        low, high = limits[name]
        assert low < position < high

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pi05_ros.tools.action_log import ActionLog, ActionLogError
from pi05_ros.tools.compare import compare, summary


def log(actions: np.ndarray, ticks: list[int] | None = None) -> ActionLog:
    ticks = list(range(len(actions))) if ticks is None else ticks
    number = np.array(ticks, dtype='<i8')
    return ActionLog(
        ('arm', 'hand'), ('rad', 'm'), actions.astype('<f4'), number, number * 50, number * 50 - 7
    )


@pytest.fixture
def reference() -> ActionLog:
    return log(np.random.default_rng(0).normal(size=(5, 3, 2)))


def changed(reference: ActionLog, place: tuple[int, int, int], by: float) -> ActionLog:
    actions = reference.actions.copy()
    actions[place] += by
    return replace(reference, actions=actions)


def test_equal_logs_are_identical(reference):
    comparison = compare(reference, reference)
    assert comparison.is_identical
    assert comparison.max_abs_error == 0.0
    assert summary(comparison) == ['identical bit for bit on 5 common ticks']


def test_one_changed_number_is_found_and_measured(reference):
    comparison = compare(reference, changed(reference, (2, 1, 1), 0.5))
    first = comparison.first_difference
    assert first is not None and (first.tick, first.row, first.name) == (2, 1, 'hand')
    arm, hand = comparison.dimensions
    assert (arm.max_abs_error, arm.cosine) == (0.0, pytest.approx(1.0))
    assert hand.max_abs_error == pytest.approx(0.5)
    assert hand.mean_abs_error == pytest.approx(0.5 / 15)
    assert hand.first_action_error == 0.0
    assert hand.cosine < 1.0
    assert not comparison.is_identical


def test_sign_of_zero_counts_as_a_difference():
    zero = log(np.zeros((1, 1, 2)))
    comparison = compare(zero, replace(zero, actions=-zero.actions))
    assert comparison.first_difference is not None
    assert zero.sha256 != replace(zero, actions=-zero.actions).sha256


def test_ticks_are_matched_by_number(reference):
    later = log(reference.actions[1:], ticks=[1, 2, 3, 9])
    comparison = compare(reference, later)
    assert comparison.ticks == 3
    assert (comparison.only_reference, comparison.only_other) == ((0, 4), (9,))
    assert comparison.first_difference is None
    assert not comparison.is_identical
    assert '2 ticks acted in the reference only, first tick 0' in summary(comparison)[0]


def test_other_dimensions_are_refused(reference):
    with pytest.raises(ActionLogError, match=r'arm \[rad\], hand \[m\] against arm \[deg\]'):
        compare(reference, replace(reference, units=('deg', 'm')))


def test_other_horizon_is_refused(reference):
    with pytest.raises(ActionLogError, match='chunks have 3 and 2 rows'):
        compare(reference, replace(reference, actions=reference.actions[:, :2]))


def test_no_common_tick_is_refused(reference):
    with pytest.raises(ActionLogError, match='no tick acted in both'):
        compare(reference, log(reference.actions, ticks=[10, 11, 12, 13, 14]))


def test_log_survives_its_file(reference, tmp_path: Path):
    with_origin = replace(reference, origin={'model': {'precision': 'float32'}})
    with_origin.save(tmp_path / 'a.npz')
    found = ActionLog.load(tmp_path / 'a.npz')
    assert found.origin == with_origin.origin
    assert found.sha256 == reference.sha256
    assert (found.names, found.units) == (reference.names, reference.units)
    assert found.stamps_ns.tolist() == reference.stamps_ns.tolist()


def test_file_of_a_log_without_actions_can_be_read(tmp_path: Path):
    ActionLog.of([], ['arm'], ['rad'], {}).save(tmp_path / 'a.npz')
    assert not ActionLog.load(tmp_path / 'a.npz').ticks.size


def test_contradicting_arrays_are_refused(reference, tmp_path: Path):
    replace(reference, ticks=reference.ticks[:2]).save(tmp_path / 'a.npz')
    with pytest.raises(ActionLogError, match='2 ticks and 2 names do not fit'):
        ActionLog.load(tmp_path / 'a.npz')


@pytest.mark.parametrize('content', [b'', b'no archive', b'PK\x03\x04 broken'])
def test_other_files_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / 'a.npz').write_bytes(content)
    with pytest.raises(ActionLogError, match='is not an action log'):
        ActionLog.load(tmp_path / 'a.npz')


def test_damaged_file_is_refused_in_one_line_or_read_whole(reference, tmp_path: Path):
    path = tmp_path / 'a.npz'
    reference.save(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x5A
        path.write_bytes(spoilt)
        try:
            assert ActionLog.load(path).sha256 == reference.sha256
        except ActionLogError as error:
            assert '\n' not in str(error)
            refused += 1
    assert refused > 100


def test_ticks_that_do_not_ascend_are_refused(reference, tmp_path: Path):
    replace(reference, ticks=reference.ticks[::-1]).save(tmp_path / 'a.npz')
    with pytest.raises(ActionLogError, match='do not ascend'):
        ActionLog.load(tmp_path / 'a.npz')


def test_actions_that_are_not_finite_are_refused(reference, tmp_path: Path):
    actions = reference.actions.copy()
    actions[2, 1, 1] = np.nan
    replace(reference, actions=actions).save(tmp_path / 'a.npz')
    with pytest.raises(ActionLogError, match='not finite'):
        ActionLog.load(tmp_path / 'a.npz')


def test_file_that_cannot_be_written_is_an_error(reference, tmp_path: Path):
    with pytest.raises(ActionLogError, match='cannot write'):
        reference.save(tmp_path / 'nowhere' / 'a.npz')

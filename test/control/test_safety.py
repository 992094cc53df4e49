"""No action that passes the guard is outside of any limit, whatever the model returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rig import FRANKA, START_NS, Rig, ScriptedPolicy

from pi05_ros.control.reasons import Reason, Skip
from pi05_ros.control.safety import ActionGuard, HoldError, hold_row
from pi05_ros.policy.robot import ActionDim, load_robot
from pi05_ros.policy.types import ActionChunk

PERIOD_NS = 50_000_000
STATE = np.array([0.0, -0.5, 0.0, -2.4, 0.0, 2.2, 0.7, 0.02])
DIMS = FRANKA.actions
LOW = np.array([dim.min for dim in DIMS])
HIGH = np.array([dim.max for dim in DIMS])
JUMP = np.array([dim.jump_limit for dim in DIMS])
RATE = np.array([dim.rate_limit for dim in DIMS])
SLACK = 1.0 + 1e-5

any_float = st.floats(width=32, allow_nan=True, allow_infinity=True)
small = st.floats(-0.0625, 0.0625, width=32)


def steps(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (3, len(DIMS)), elements=elements)


def chunk_of(actions: np.ndarray) -> ActionChunk:
    rig = Rig(ScriptedPolicy())
    rig.everything()
    found = rig.policy.act(rig.inputs.observation('header'), tick=0, seed=0)
    return replace(found, actions=actions)


CHUNK = chunk_of(np.tile(STATE, (3, 1)).astype(np.float32))


def checked(actions: np.ndarray, guard: ActionGuard | None = None, now_ns: int = START_NS):
    guard = guard or ActionGuard(FRANKA)
    return guard.check(replace(CHUNK, actions=actions), STATE, now_ns, PERIOD_NS)


@settings(max_examples=300, deadline=None)
@given(steps(any_float) | steps(small).map(lambda moves: (STATE + moves).astype(np.float32)))
def test_what_passes_is_finite_within_limits_near_and_slow(actions):
    found = checked(actions)
    if isinstance(found, Skip):
        assert found.reason in (
            Reason.ACTION_NOT_FINITE, Reason.ACTION_JUMP, Reason.ACTION_TOO_FAST,
        )  # fmt: skip
        return
    rows = found.actions.astype(np.float64)
    assert np.isfinite(rows).all()
    assert (rows >= LOW).all()
    assert (rows <= HIGH).all()
    assert (np.abs(rows[0] - STATE) <= JUMP * SLACK).all()
    assert (np.abs(np.diff(rows, axis=0)) / CHUNK.step_s <= RATE * SLACK).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(steps(small), st.integers(1, 4)), min_size=2, max_size=6))
def test_no_two_actions_that_pass_are_faster_than_the_limit(moves):
    guard, now_ns, before = ActionGuard(FRANKA), START_NS, None
    for move, periods in moves:
        now_ns += periods * PERIOD_NS
        row = (STATE + move[0]).astype(np.float32)
        found = checked(np.tile(row, (3, 1)), guard, now_ns)
        if isinstance(found, Skip):
            continue
        first = found.actions[0].astype(np.float64)
        if before is not None:
            speed = np.abs(first - before[0]) / ((now_ns - before[1]) / 1e9)
            assert (speed <= RATE * SLACK).all()
        before = (first, now_ns)


@settings(max_examples=100, deadline=None)
@given(steps(st.floats(-1e6, 1e6, width=32)))
def test_clipping_twice_changes_nothing(actions):
    guard = ActionGuard(FRANKA)
    once = guard.clip(actions)
    assert guard.clip(once) is once


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_refuses_the_whole_action(bad):
    actions = CHUNK.actions.copy()
    actions[2, 3] = bad
    found = checked(actions)
    assert isinstance(found, Skip)
    assert str(found) == 'action_not_finite: not finite in the action: panda_joint4'


@settings(max_examples=100, deadline=None)
@given(
    steps(small),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.integers(0, 2),
    st.integers(0, len(DIMS) - 1),
    st.integers(0, 3),
)
def test_a_value_that_is_not_finite_anywhere_refuses_all_also_in_a_row_that_is_not_sent(
    moves, bad, row, column, sent_rows
):
    actions = (STATE + moves).astype(np.float32)
    actions[row, column] = bad
    guard = ActionGuard(FRANKA, sent_rows)
    found = checked(actions, guard)
    assert isinstance(found, Skip)
    assert found.reason is Reason.ACTION_NOT_FINITE
    assert DIMS[column].name in found.detail
    assert guard.clips == {}


@settings(max_examples=100, deadline=None)
@given(st.lists(steps(st.floats(-0.125, 0.125, width=32)), min_size=1, max_size=5))
def test_clip_counters_are_the_chunks_that_passed_clipped_by_joint(moves):
    guard, expected = ActionGuard(FRANKA), Counter()
    # At the edge of its range, so that a small move is clipped or not.
    state = np.where(np.arange(len(DIMS)) % 2 == 0, HIGH, LOW)
    for tick, move in enumerate(moves):
        wanted = (state + move).astype(np.float32)
        now_ns = START_NS + tick * PERIOD_NS
        found = guard.check(replace(CHUNK, actions=wanted), state, now_ns, PERIOD_NS)
        if isinstance(found, Skip):
            continue
        outside = ((wanted < LOW) | (wanted > HIGH)).any(axis=0)
        expected.update(DIMS[column].name for column in np.flatnonzero(outside))
        np.testing.assert_array_equal((found.actions != wanted), (wanted < LOW) | (wanted > HIGH))
    assert guard.clips == expected


@settings(max_examples=200, deadline=None)
@given(arrays(np.float64, len(DIMS), elements=st.floats(-1.0, 1.0)))
def test_a_chunk_is_a_jump_exactly_if_a_measured_joint_is_further_away_than_its_limit(offset):
    row = np.clip(STATE, LOW, HIGH).astype(np.float32)
    found = ActionGuard(FRANKA).check(
        replace(CHUNK, actions=np.tile(row, (3, 1))), row - offset, START_NS, PERIOD_NS
    )
    distance = np.abs(row - (row - offset))
    if (distance > JUMP * SLACK).any():
        assert isinstance(found, Skip)
        assert found.reason is Reason.ACTION_JUMP
    elif (distance < JUMP / SLACK).all():
        assert isinstance(found, ActionChunk)


@pytest.mark.parametrize('rows', [0, 1, 2, 3, 9])
def test_only_the_rows_that_are_sent_are_held_to_the_limits(rows):
    actions = CHUNK.actions.copy()
    actions[2, 1] += 0.15  # too fast
    found = checked(actions, ActionGuard(FRANKA, rows))
    if rows in (1, 2):
        np.testing.assert_array_equal(found.actions, actions[:rows])
    else:
        assert found.reason is Reason.ACTION_TOO_FAST


def test_clips_are_counted_by_joint_and_leave_the_rest_alone():
    guard = ActionGuard(FRANKA)
    actions = CHUNK.actions.copy()
    actions[1:, 7] = 0.3
    found = checked(actions, guard)
    assert found.actions[:, 7] == pytest.approx([0.02, 0.04, 0.04])
    np.testing.assert_array_equal(found.actions[:, :7], actions[:, :7])
    assert guard.clips == {'panda_finger_joint1': 1}


def test_a_jump_names_every_joint_with_figure_and_limit_worst_first():
    actions = CHUNK.actions.copy()
    actions[:, 0] += 0.6
    actions[:, 4] -= 0.75
    found = checked(actions)
    assert isinstance(found, Skip)
    assert found.reason is Reason.ACTION_JUMP
    assert found.detail == (
        'from the measured position: panda_joint5 0.75 rad > 0.5 rad, '
        'panda_joint1 0.6 rad > 0.5 rad'
    )


def test_a_fast_row_is_refused():
    actions = CHUNK.actions.copy()
    actions[2, 1] += 0.15
    assert str(checked(actions)) == (
        'action_too_fast: between two rows: panda_joint2 3 rad/s > 2.175 rad/s'
    )


def test_a_fast_change_since_the_action_before_is_refused_until_time_has_passed():
    guard = ActionGuard(FRANKA)
    away = CHUNK.actions.copy()
    away[:, 0] += 0.2
    assert isinstance(checked(CHUNK.actions, guard), ActionChunk)
    found = checked(away, guard, START_NS + PERIOD_NS)
    assert str(found) == (
        'action_too_fast: since the action before: panda_joint1 4 rad/s > 2.175 rad/s'
    )
    assert isinstance(checked(away, guard, START_NS + 2 * PERIOD_NS), ActionChunk)


def test_an_action_may_follow_a_joint_that_was_moved_meanwhile():
    """As where a bag begins again: without this the demo lost a tick at every pass."""
    guard = ActionGuard(FRANKA)
    away, moved = CHUNK.actions.copy(), STATE.copy()
    away[:, 0] += 0.6
    moved[0] += 0.6
    assert isinstance(checked(CHUNK.actions, guard), ActionChunk)
    passed = guard.check(replace(CHUNK, actions=away), moved, START_NS + PERIOD_NS, PERIOD_NS)
    assert isinstance(passed, ActionChunk)


def test_a_refused_action_is_a_counted_skip_of_the_tick():
    rig = Rig(ScriptedPolicy(value=2.0))
    result = rig.fresh_tick()
    assert result.skip is not None
    assert result.skip.reason is Reason.ACTION_JUMP
    assert rig.core.counters.skips == {Reason.ACTION_JUMP: 1}
    rig.assert_consistent()


def test_an_action_is_dropped_if_the_robot_was_made_to_hold_while_it_was_computed():
    """What was seen before the hold must not move it again, not even if a reset came, too."""
    rig = Rig()
    rig.policy.on_act = rig.core.interrupt
    result = rig.fresh_tick()
    assert str(result.skip) == (
        'action_too_late: the watchdog or the emergency stop acted while it was computed'
    )
    assert result.error is None
    rig.policy.on_act = lambda: None
    assert rig.fresh_tick().chunk is not None
    rig.assert_consistent()


def test_estop_that_comes_while_an_action_is_computed_drops_it():
    rig = Rig()

    def stop() -> None:
        rig.core.estopped = True
        rig.core.interrupt()

    rig.policy.on_act = stop
    assert rig.fresh_tick().skip.reason is Reason.ESTOP
    rig.assert_consistent()


def test_estop_is_latched_over_starts_and_calls_no_model():
    rig = Rig()
    assert rig.fresh_tick().chunk is not None
    rig.core.estopped = True
    rig.core.start()
    for _ in range(3):
        result = rig.fresh_tick()
        assert str(result.skip) == (
            'estop: the emergency stop is latched; ~/estop_reset releases it'
        )
    assert len(rig.policy.calls) == 1
    rig.core.estopped = False
    assert rig.fresh_tick().chunk is not None
    rig.assert_consistent()


def test_limits_do_not_hinder_robots_that_give_none():
    libero = load_robot('libero')
    free = {'min': None, 'max': None}
    dims = tuple(dim.model_copy(update=free) for dim in libero.actions)
    robot = libero.model_copy(update={'actions': dims})
    chunk = replace(CHUNK, actions=np.full((2, 7), 1e3, np.float32), names=robot.action_names)
    found = ActionGuard(robot).check(chunk, np.zeros(robot.state_dim), START_NS, PERIOD_NS)
    assert isinstance(found, ActionChunk)
    np.testing.assert_array_equal(found.actions, chunk.actions)


def test_hold_keeps_joints_where_measured_and_the_gripper_as_commanded():
    measured = {dim.joint: 0.1 * i for i, dim in enumerate(DIMS) if dim.joint}
    row = hold_row(DIMS, np.full(8, 0.04), measured)
    assert row == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.04])


@given(
    arrays(np.float64, len(DIMS), elements=st.floats(-3.0, 3.0)),
    st.dictionaries(
        st.sampled_from([dim.joint for dim in DIMS]), st.floats(-3.0, 3.0), min_size=5
    ),
)
def test_hold_is_the_measured_position_of_every_joint_or_refused_never_a_made_up_one(
    last, measured
):
    arm = [dim.joint for dim in DIMS if dim.kind == 'joint_position']
    if not set(arm) <= set(measured):
        with pytest.raises(HoldError, match='no measured position'):
            hold_row(DIMS, last, measured)
        return
    row = hold_row(DIMS, last, measured)
    assert row[:7].tolist() == [measured[joint] for joint in arm]
    assert row[7] == last[7]


def test_hold_of_a_joint_that_was_not_measured_is_refused_not_guessed():
    with pytest.raises(HoldError, match='no measured position of panda_joint1'):
        hold_row(DIMS, np.zeros(8), {})


def test_hold_of_a_velocity_is_zero():
    dim = ActionDim(name='a', kind='joint_velocity', joint='a', unit='rad/s')
    assert hold_row((dim,), np.ones(1), {}) == [0.0]


def test_hold_of_an_end_effector_delta_is_refused():
    dim = ActionDim(name='x', kind='eef_delta_position', unit='m')
    with pytest.raises(HoldError, match=r'x \(eef_delta_position\) has no command to hold'):
        hold_row((dim,), np.ones(1), {})

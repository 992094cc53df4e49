"""Units, normalisation, deltas and ALOHA's space: formulas by hand, inverses by property."""

from __future__ import annotations

from math import asin, pi

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi05_ros.policy.robot import load_robot
from pi05_ros.policy.transforms import (
    Normalizer,
    RobotUnits,
    absolute_actions,
    aloha_actions,
    aloha_state,
)

MODES = ('quantile', 'zscore')


def normalizer(mode: str, offset: list[float], divisor: list[float]) -> Normalizer:
    array = np.array(divisor)
    return Normalizer(mode, np.array(offset), array, array)  # type: ignore[arg-type]


def vectors(dim: int, limit: float = 1e3) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, dim, elements=st.floats(-limit, limit))


def test_quantile_by_hand():
    norm = normalizer('quantile', [2.0, -1.0], [4.0, 0.5])
    np.testing.assert_array_equal(norm.normalize(np.array([2.0, -1.0])), [-1.0, -1.0])
    np.testing.assert_array_equal(norm.normalize(np.array([6.0, -0.5])), [1.0, 1.0])
    np.testing.assert_array_equal(norm.normalize(np.array([5.0, -0.75])), [0.5, 0.0])


def test_zscore_by_hand():
    norm = normalizer('zscore', [2.0, -1.0], [4.0, 0.5])
    np.testing.assert_array_equal(norm.normalize(np.array([2.0, 0.0])), [0.0, 2.0])


@pytest.mark.parametrize('mode', MODES)
def test_nothing_is_clipped(mode: str):
    norm = normalizer(mode, [0.0], [1.0])
    assert norm.normalize(np.array([100.0]))[0] > 50
    assert norm.unnormalize(np.array([100.0]))[0] > 50


@pytest.mark.parametrize('mode', MODES)
@given(vectors(3), vectors(3), arrays(np.float64, 3, elements=st.floats(1e-6, 1e3)))
def test_unnormalise_inverts_normalise(
    mode: str, values: np.ndarray, offset: np.ndarray, divisor: np.ndarray
):
    norm = Normalizer(mode, offset, divisor, divisor)  # type: ignore[arg-type]
    back = norm.unnormalize(norm.normalize(values))
    np.testing.assert_allclose(back, values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('mode', MODES)
def test_dimensions_beyond_the_statistics_pass_through(mode: str):
    """openpi pads actions to the model's dimension; the padding has no statistics."""
    norm = normalizer(mode, [5.0], [2.0])
    actions = np.array([[0.0, 7.0, -3.0]], dtype=np.float32)
    np.testing.assert_array_equal(norm.unnormalize(actions)[:, 1:], [[7.0, -3.0]])


def test_statistics_beyond_the_state_are_unused():
    norm = normalizer('quantile', [0.0, 9.0, 9.0], [1.0, 9.0, 9.0])
    assert norm.normalize(np.array([1.0])).tolist() == [1.0]


def test_unnormalise_leaves_its_argument_alone():
    actions = np.ones((2, 3), dtype=np.float32)
    normalizer('zscore', [5.0, 5.0, 5.0], [2.0, 2.0, 2.0]).unnormalize(actions)
    np.testing.assert_array_equal(actions, np.ones((2, 3)))


def test_state_is_added_to_every_row_where_the_mask_says_so():
    actions = np.arange(8.0).reshape(2, 4)
    state = np.array([100.0, 200.0, 300.0])
    result = absolute_actions(actions, state, np.array([0, 2]))
    np.testing.assert_array_equal(result, [[100, 1, 302, 3], [104, 5, 306, 7]])


@given(arrays(np.float64, (3, 6), elements=st.floats(-10, 10)), vectors(4, 10.0))
def test_subtracting_the_state_inverts_absolute(actions: np.ndarray, state: np.ndarray):
    deltas = np.array([0, 1, 3])
    back = absolute_actions(absolute_actions(actions, state, deltas), -state, deltas)
    np.testing.assert_allclose(back, actions, atol=1e-12)


def test_aloha_joint_signs():
    state = np.arange(1.0, 15.0)
    got = aloha_state(state)
    expected = np.array([1, -2, -3, 4, 5, 6, 0, 8, -9, -10, 11, 12, 13, 0])
    joints = [i for i in range(14) if i not in (6, 13)]
    np.testing.assert_array_equal(got[joints], expected[joints])
    np.testing.assert_array_equal(aloha_actions(state[None])[0, joints], expected[joints])


@pytest.mark.parametrize('opening', [0.0, 0.25, 1.0])
def test_aloha_gripper_state_by_hand(opening: float):
    """openpi's formula (aloha_policy.py), written out once more."""
    finger = opening * (0.058 - 0.01844) + 0.01844
    angle = asin(max(-1.0, min(1.0, (0.022**2 + finger**2 - 0.036**2) / (2 * 0.022 * finger))))
    expected = (angle - 0.5476) / (1.6296 - 0.5476)
    state = np.zeros(14)
    state[[6, 13]] = opening
    np.testing.assert_allclose(aloha_state(state)[[6, 13]], expected, rtol=1e-12)


def test_aloha_open_gripper_is_clipped_to_a_right_angle():
    """Fully open lies beyond the triangle of horn and arm; the arcsine must not be NaN."""
    state = np.zeros(14)
    state[6] = 1.0
    assert aloha_state(state)[6] == pytest.approx((pi / 2 - 0.5476) / (1.6296 - 0.5476))


@pytest.mark.parametrize('action', [-0.5, 0.0, 0.7])
def test_aloha_gripper_action_by_hand(action: float):
    actions = np.zeros((2, 14))
    actions[:, [6, 13]] = action
    expected = (action + 0.5476 + 0.6213) / (1.4910 + 0.6213)
    np.testing.assert_allclose(aloha_actions(actions)[:, [6, 13]], expected, rtol=1e-12)


@given(vectors(14, 3.0))
def test_aloha_joints_of_a_zero_delta_come_back(state: np.ndarray):
    """A model that says 'stay' must give the measured joints: both flips and the delta agree."""
    robot = load_robot('aloha')
    units = RobotUnits(robot)
    actions = units.actions_to_robot(np.zeros((2, 32)), units.state_to_policy(state))
    joints = [i for i in range(14) if i not in (6, 13)]
    np.testing.assert_allclose(actions[:, joints], np.tile(state[joints], (2, 1)), atol=1e-12)


def test_aloha_adds_the_state_before_the_flip():
    robot = load_robot('aloha')
    state = np.zeros(14)
    state[1] = 0.4  # the policy sees -0.4
    actions = np.zeros((1, 32))
    actions[0, 1] = 0.1  # policy space: -0.4 + 0.1 = -0.3, on the robot 0.3
    units = RobotUnits(robot)
    result = units.actions_to_robot(actions, units.state_to_policy(state))
    assert result[0, 1] == pytest.approx(0.3)


def test_aloha_gripper_at_the_pole_of_its_formula_stays_finite():
    state = np.zeros(14)
    state[6] = -0.01844 / (0.058 - 0.01844)  # finger position 0
    assert np.isfinite(aloha_state(state)).all()


@pytest.mark.parametrize('name, dims', [('libero', 7), ('droid', 8), ('aloha', 14), ('franka', 8)])
def test_padding_of_the_model_is_cut(name: str, dims: int):
    robot = load_robot(name)
    actions = RobotUnits(robot).actions_to_robot(np.zeros((5, 32)), np.zeros(robot.state_dim))
    assert actions.shape == (5, dims)


def test_libero_and_droid_actions_are_passed_as_they_are():
    """pi05_libero and pi05_droid are no delta policies; adding the state is a known mistake."""
    actions = np.arange(64.0).reshape(2, 32)
    for name in ('libero', 'droid'):
        robot = load_robot(name)
        got = RobotUnits(robot).actions_to_robot(actions, np.full(robot.state_dim, 1e3))
        np.testing.assert_array_equal(got, actions[:, : robot.action_dim])


def test_scale_and_offset_map_between_robot_and_policy_units():
    robot = load_robot('template')  # gripper: 0 m shut to 0.08 m open is 1 to 0 for the policy
    state = np.zeros(7)
    state[6] = 0.08
    policy_state = RobotUnits(robot).state_to_policy(state)
    assert policy_state[6] == pytest.approx(0.0)
    actions = np.zeros((1, 32))
    actions[0, 6] = 1.0  # shut
    assert RobotUnits(robot).actions_to_robot(actions, policy_state)[0, 6] == pytest.approx(0.0)
    actions[0, 6] = 0.0  # open
    assert RobotUnits(robot).actions_to_robot(actions, policy_state)[0, 6] == pytest.approx(0.08)

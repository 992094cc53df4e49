"""The state vector is taken by joint name, whatever the order of the message."""

from __future__ import annotations

import math

import numpy as np
import pytest
from messages import joint_state_cdr, pose_cdr

from pi05_ros.control.cdr import parse_joint_state, parse_pose_stamped
from pi05_ros.control.reasons import InputFault, Reason
from pi05_ros.control.state import JointIndex, eef_component
from pi05_ros.policy.robot import StateDim

WANTED = (
    StateDim(joint='elbow', unit='rad'),
    StateDim(joint='shoulder', unit='rad'),
    StateDim(joint='elbow', field='velocity', unit='rad/s'),
)


def fill(names, position, velocity=None, index: JointIndex | None = None) -> list[float]:
    state = np.full(3, np.nan)
    message = parse_joint_state(joint_state_cdr(names, position, velocity))
    (index or JointIndex(WANTED)).fill(state, message)
    return state.tolist()


def test_joints_are_found_by_name():
    values = fill(['finger', 'shoulder', 'elbow'], [9.0, 2.0, 1.0], [0.0, 0.2, 0.1])
    assert values == [1.0, 2.0, 0.1]


def test_another_order_in_a_later_message_is_noticed():
    index = JointIndex(WANTED)
    assert fill(['shoulder', 'elbow'], [2.0, 1.0], [0.2, 0.1], index) == [1.0, 2.0, 0.1]
    assert fill(['elbow', 'shoulder'], [1.0, 2.0], [0.1, 0.2], index) == [1.0, 2.0, 0.1]


def test_missing_joints_are_named_with_what_is_there():
    with pytest.raises(InputFault, match='lacks elbow; it has shoulder, finger') as caught:
        fill(['shoulder', 'finger'], [1.0, 2.0], [0.0, 0.0])
    assert caught.value.reason is Reason.JOINT_MISSING


def test_a_field_that_the_driver_does_not_fill_is_named():
    with pytest.raises(InputFault, match=r'0 values of velocity; elbow.velocity is needed'):
        fill(['shoulder', 'elbow'], [1.0, 2.0])


def test_fewer_values_than_names_are_refused():
    with pytest.raises(InputFault, match='2 names and 1 values of position') as caught:
        fill(['shoulder', 'elbow'], [1.0])
    assert caught.value.reason is Reason.MALFORMED_MESSAGE


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(value):
    with pytest.raises(InputFault, match=f'elbow.position = {value}') as caught:
        fill(['shoulder', 'elbow'], [1.0, value], [0.0, 0.0])
    assert caught.value.reason is Reason.JOINT_NOT_FINITE


def test_joints_that_nobody_needs_may_be_nan():
    assert fill(['x', 'shoulder', 'elbow'], [math.nan, 2.0, 1.0], [math.nan, 0.2, 0.1])[0] == 1.0


def component(name: str, position=(1.0, 2.0, 3.0), orientation=(0.0, 0.0, 0.0, 1.0)) -> float:
    return eef_component(name, parse_pose_stamped(pose_cdr(list(position), list(orientation))))


def test_pose_components():
    assert [component(f'position_{axis}') for axis in 'xyz'] == [1.0, 2.0, 3.0]
    assert [component(f'quaternion_{axis}') for axis in 'xyzw'] == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ('orientation', 'expected'),
    [
        ((0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0)),
        ((1.0, 0.0, 0.0, 0.0), (math.pi, 0.0, 0.0)),
        ((0.0, math.sin(0.25), 0.0, math.cos(0.25)), (0.0, 0.5, 0.0)),
        # A negative w is an angle beyond pi: robosuite does not flip the quaternion.
        ((0.0, 0.0, math.sin(2.0), math.cos(2.0)), (0.0, 0.0, 4.0)),
        ((0.0, 0.0, 0.0, 1.000001), (0.0, 0.0, 0.0)),
    ],
)
def test_axis_angle_is_axis_times_angle(orientation, expected):
    found = [component(f'axis_angle_{axis}', orientation=orientation) for axis in 'xyz']
    assert found == pytest.approx(expected)


def test_poses_that_are_none_are_refused():
    with pytest.raises(InputFault, match='quaternion has length 0,'):
        component('position_x', orientation=(0.0, 0.0, 0.0, 0.0))
    with pytest.raises(InputFault, match='not finite'):
        component('position_x', position=(math.nan, 0.0, 0.0))


def test_a_first_message_without_names_lacks_every_joint():
    with pytest.raises(InputFault, match='lacks .*; it has no names'):
        fill([], [])


def test_a_wanted_joint_that_is_given_twice_is_refused():
    names = [dim.joint for dim in WANTED if dim.joint]
    with pytest.raises(InputFault, match=f'given twice: {names[0]}'):
        fill([*names, names[0]], [0.0] * (len(names) + 1))

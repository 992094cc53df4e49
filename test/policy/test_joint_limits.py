"""Limits of robot file and robot description: which counts, and what does not fit is named."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.policy.errors import UrdfError
from pi05_ros.policy.limits import LIMIT_SOURCES, limit_origins, limit_robot
from pi05_ros.policy.robot import ActionDim, RobotSpec, load_robot
from pi05_ros.policy.urdf import UrdfJoint

FRANKA = load_robot('franka')


def robot_of(*dims: ActionDim) -> RobotSpec:
    return FRANKA.model_copy(update={'actions': dims})


def arm(**limits: float) -> ActionDim:
    return ActionDim(name='a', kind='joint_position', joint='j', unit='rad', **limits)


def turning(lower: float, upper: float, velocity: float = math.inf) -> dict[str, UrdfJoint]:
    return {'j': UrdfJoint('j', 'revolute', 'rad', lower, upper, velocity)}


def limits_of(robot: RobotSpec) -> tuple:
    (dim,) = robot.actions
    return dim.min, dim.max, dim.rate_limit


@pytest.mark.parametrize(
    ('source', 'expected', 'origins'),
    [
        ('robot_file', (-1.0, 1.0, 2.0), 'min robot_file; max robot_file; rate robot_file'),
        ('urdf', (-2.0, 0.5, 4.0), 'min urdf; max urdf; rate urdf'),
        ('both', (-1.0, 0.5, 2.0), 'min robot_file; max urdf; rate robot_file'),
    ],
)
def test_source_decides_and_both_takes_the_tighter_of_each(source, expected, origins):
    robot, joints = robot_of(arm(min=-1.0, max=1.0, max_rate=2.0)), turning(-2.0, 0.5, 4.0)
    assert limits_of(limit_robot(robot, source, joints)) == expected
    assert limit_origins(robot, source, joints) == origins


@pytest.mark.parametrize('source', ['urdf', 'both'])
def test_what_the_description_does_not_limit_stays_as_in_the_file(source):
    joints = {'j': UrdfJoint('j', 'continuous', 'rad')}
    robot = robot_of(arm(min=-1.0, max=1.0))
    assert limits_of(limit_robot(robot, source, joints)) == (-1.0, 1.0, 3.0)
    assert limit_origins(robot, source, joints) == 'min robot_file; max robot_file; rate default'


def test_default_rate_counts_beside_a_faster_description_but_not_instead_of_it():
    assert limits_of(limit_robot(robot_of(arm()), 'both', turning(-1.0, 1.0, 9.0)))[2] == 3.0
    assert limits_of(limit_robot(robot_of(arm()), 'urdf', turning(-1.0, 1.0, 9.0)))[2] == 9.0


def test_gripper_takes_positions_but_no_speed_and_a_velocity_takes_the_speed():
    gripper = ActionDim(name='g', kind='gripper_position', joint='j', unit='m')
    speed = ActionDim(name='v', kind='joint_velocity', joint='j', unit='m/s')
    joints = {'j': UrdfJoint('j', 'prismatic', 'm', 0.0, 0.04, 0.2)}
    assert limits_of(limit_robot(robot_of(gripper), 'both', joints)) == (0.0, 0.04, math.inf)
    assert limits_of(limit_robot(robot_of(speed), 'both', joints)) == (-0.2, 0.2, math.inf)


@pytest.mark.parametrize('name', ['droid', 'libero', 'libero_lerobot'])
def test_actions_without_a_joints_unit_keep_the_limits_of_the_file(name):
    robot = load_robot(name)
    assert limit_robot(robot, 'urdf', {}).actions == robot.actions
    assert limit_origins(robot, 'urdf', {}) == 'min robot_file; max robot_file; rate none'


def test_origins_name_the_actions_where_they_differ():
    assert limit_origins(FRANKA, 'robot_file', {}) == (
        'min robot_file; max robot_file; rate robot_file (panda_joint1, panda_joint2, '
        'panda_joint3, panda_joint4, panda_joint5, panda_joint6, panda_joint7), '
        'none (panda_finger_joint1)'
    )


@pytest.mark.parametrize(
    ('joints', 'message'),
    [
        ({}, 'joint j is not in it, it has none'),
        ({'jj': UrdfJoint('jj', 'fixed')}, r'joint j is not in it, did you mean jj\?'),
        ({'j': UrdfJoint('j', 'fixed')}, 'joint j is fixed, but action a is in rad'),
        (
            {'j': UrdfJoint('j', 'prismatic', 'm', 0.0, 1.0)},
            'joint j is prismatic, in m, but action a is in rad',
        ),
        (
            {'j': UrdfJoint('j', 'revolute', 'rad', 0.0, 1.0, mimics='k')},
            'joint j mimics k and cannot be driven itself',
        ),
        (turning(-1.0, 1.0, 0.0), 'joint j has velocity 0, so nothing may move'),
        (turning(0.0, 0.0), 'joint j has lower 0, not below upper 0'),
        (turning(5.0, 6.0), r'a: min 5 rad \(urdf\) is not below max 1 rad \(robot_file\)'),
    ],
)
def test_what_does_not_fit_is_named_with_the_way_out(joints, message):
    robot = robot_of(arm(min=-1.0, max=1.0))
    with pytest.raises(UrdfError, match=message) as caught:
        limit_robot(robot, 'both', joints)
    assert str(caught.value).startswith('the robot description does not fit robot franka: ')
    assert str(caught.value).endswith('or set limits_source: robot_file')


def test_every_joint_that_does_not_fit_is_listed():
    with pytest.raises(UrdfError) as caught:
        limit_robot(FRANKA, 'both', {})
    for dim in FRANKA.actions:
        assert f'joint {dim.joint} is not in it' in str(caught.value)


def some(values: st.SearchStrategy[float]) -> st.SearchStrategy[float | None]:
    return st.none() | values


low, high, speed = st.floats(-9.0, -0.1), st.floats(0.1, 9.0), st.floats(0.1, 9.0)


@given(some(low), some(high), some(speed), low, high, speed)
def test_both_is_never_wider_than_either_and_no_source_removes_a_limit(
    file_min, file_max, file_rate, lower, upper, velocity
):
    dim = arm(min=file_min, max=file_max, max_rate=file_rate)
    robot, joints = robot_of(dim), turning(lower, upper, velocity)
    found = {source: limits_of(limit_robot(robot, source, joints)) for source in LIMIT_SOURCES}
    assert found['robot_file'] == (file_min, file_max, dim.rate_limit)
    assert found['urdf'] == (lower, upper, velocity)
    for single in ('robot_file', 'urdf'):
        of_one, of_both = found[single], found['both']
        assert of_one[0] is None or of_both[0] >= of_one[0]
        assert of_one[1] is None or of_both[1] <= of_one[1]
        assert of_both[2] <= of_one[2]

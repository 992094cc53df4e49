"""Limits of the robot description: asked for, waited for, and what is wrong with it is said."""

from __future__ import annotations

import pytest
from helpers import LATCHED, Bench, bench
from rclpy.qos import QoSProfile
from std_msgs.msg import String

from pi05_ros.policy.robot import load_robot

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

ROBOT = load_robot('franka')
BOTH = {'limits_source': 'both', 'action_interface': 'action_chunk'}


def description(finger_upper: float = 0.03) -> str:
    """Return an arm with narrow fingers, and a speed limit below that of the robot file."""
    arm = ''.join(
        f'<joint name="{dim.joint}" type="revolute"><limit lower="-3" upper="3" velocity="1"/>'
        '</joint>'
        for dim in ROBOT.actions[:7]
    )
    return (
        f'<robot name="panda">{arm}<joint name="panda_finger_joint1" type="prismatic">'
        f'<limit upper="{finger_upper}" velocity="0.2"/></joint></robot>'
    )


def publish(b: Bench, text: str, qos: QoSProfile = LATCHED) -> None:
    """Send a description as robot_state_publisher does: once, before anybody listens."""
    publisher = b.observer.node.create_publisher(String, 'robot_description', qos)
    publisher.publish(String(data=text))


def test_limits_of_the_description_clip_and_are_reported():
    with bench(parameters=BOTH) as b:
        publish(b, description())
        b.start()
        b.until(lambda: b.observer.chunks)
        # The small policy repeats the measured 0.1 m.
        assert max(b.observer.chunks[-1].actions[7::8]) == pytest.approx(0.03)
        b.until(lambda: 'limits from' in b.observer.values('Action'))
        found = b.observer.values('Action')['limits from']
        assert 'max robot_file (panda_joint1, ' in found
        assert found.endswith('panda_joint7), none (panda_finger_joint1)')
        assert 'rate urdf (panda_joint1, ' in found


def test_file_alone_counts_by_default_and_nobody_is_waited_for():
    with bench() as b:
        publish(b, 'not a description')
        b.start()
        b.until(lambda: 'limits from' in b.observer.values('Action'))
        assert 'urdf' not in b.observer.values('Action')['limits from']


def test_missing_description_fails_in_time_and_says_who_sends_it():
    with bench(parameters={**BOTH, 'input_timeout_s': 0.5}) as b:
        assert not b.configure()
        assert b.node.last_error.startswith(
            'configure: no robot description came in 0.5 s: nobody publishes on /robot_description'
        )
        assert b.node.last_error.endswith(
            'robot_state_publisher sends it; or set limits_source: robot_file'
        )


def test_publisher_that_does_not_latch_is_named_with_the_remedy():
    with bench(parameters={**BOTH, 'input_timeout_s': 1.5}) as b:
        publish(b, description(), QoSProfile(depth=1))
        assert not b.configure()
        assert '/test_observer publishes /robot_description with other QoS' in b.node.last_error
        assert 'it offers volatile; publish it latched' in b.node.last_error


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('<robot', 'configure: the robot description cannot be used: it is not XML'),
        (
            description().replace('finger_joint1', 'finger_joint9'),
            'joint panda_finger_joint1 is n',
        ),
        (description(finger_upper=-1.0), 'joint panda_finger_joint1 has lower 0, not below upper'),
    ],
)
def test_description_that_does_not_fit_refuses_to_configure_and_a_right_one_then_works(
    text, message
):
    with bench(parameters=BOTH) as b:
        publish(b, text)
        assert not b.configure()
        assert message in b.node.last_error
        assert b.node.lifecycle_state == 'unconfigured'
        publish(b, description())
        assert b.configure(), b.node.last_error


def test_description_is_looked_for_in_the_namespace_of_the_node():
    with bench(parameters={**BOTH, 'input_timeout_s': 0.5}, namespace='left') as b:
        assert not b.configure()
        assert 'nobody publishes on /left/robot_description' in b.node.last_error

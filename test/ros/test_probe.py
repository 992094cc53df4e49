"""What is found on the inputs over real DDS, and the line that mends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import rclpy
from helpers import CameraScript, Sensors
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage

from pi05_ros.control.parameters import NodeSettings, settings_from_values
from pi05_ros.control.topics import input_topics
from pi05_ros.policy.robot import load_robot
from pi05_ros.ros.probe import InputProbe, Tally, probe_inputs
from pi05_ros.tools.findings import Finding, input_findings, profile_line

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

BEST_EFFORT = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
ROBOT = load_robot('franka')


def settings_with(**values: object) -> NodeSettings:
    return settings_from_values({'prompt': 'stack', **values}, ROBOT.camera_names)


@pytest.fixture
def doctor() -> Iterator[Node]:
    node = rclpy.create_node('test_doctor')
    yield node
    node.destroy_node()


def probe(
    doctor: Node, sensors: Sensors, settings: NodeSettings, discovery_s: float = 20.0
) -> dict[str, InputProbe]:
    """Return what is found while the sensors send, for the inputs of the node."""
    topics = input_topics(ROBOT, settings)
    with sensors.streaming():
        found = probe_inputs(doctor, topics, discovery_s, listen_s=0.5)
    sensors.destroy_node()
    return {one.topic.name: one for one in found}


def findings(probes: dict[str, InputProbe], settings: NodeSettings) -> list[Finding]:
    return input_findings(list(probes.values()), settings)


def test_inputs_that_are_fine_give_no_finding(doctor):
    settings = settings_with()
    probes = probe(doctor, Sensors(), settings)
    assert findings(probes, settings) == []
    base = probes['base']
    assert base.resolved == '/camera/base/image_raw'
    assert [str(publisher) for publisher in base.publishers] == [
        '/test_sensors (sensor_msgs/msg/Image, reliable, volatile)'
    ]
    assert base.received > 1
    assert base.rate_hz == base.received / base.seconds
    assert base.lost == 0


def test_qos_that_does_not_match_is_named_with_the_parameter_that_mends_it(doctor):
    settings = settings_with(**{'cameras.wrist.reliability': 'reliable'})
    probes = probe(doctor, Sensors(qos=BEST_EFFORT), settings)
    assert probes['wrist'].received == 0
    assert findings(probes, settings) == [
        Finding(
            '/test_sensors publishes /camera/wrist/image_raw with other QoS: '
            'it offers best_effort',
            'cameras.wrist.reliability: best_effort',
        )
    ]


def test_missing_camera_is_named_with_the_topic_that_it_may_be(doctor):
    settings = settings_with()
    sensors = Sensors(cameras={'base': CameraScript(), 'hand': CameraScript()})
    (found,) = findings(probe(doctor, sensors, settings, discovery_s=2.0), settings)
    assert found.what.startswith('nobody publishes /camera/wrist/image_raw (ROS_DOMAIN_ID ')
    assert found.fix == (
        'ros2 run pi05_ros policy_node --ros-args '
        '-r camera/wrist/image_raw:=/camera/hand/image_raw'
    )


def test_camera_that_is_not_there_at_all_is_to_be_started_in_this_domain(doctor):
    settings = settings_with()
    sensors = Sensors(cameras={'base': CameraScript()})
    (found,) = findings(probe(doctor, sensors, settings, discovery_s=2.0), settings)
    assert found.fix.startswith('start its driver with: export ROS_DOMAIN_ID=')


@pytest.fixture
def other_process() -> Iterator[Node]:
    """A node that is a DDS participant of its own: one participant has one type per topic."""
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node('test_driver', context=context)
    yield node
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_wrong_type_is_named_with_the_transport_that_fits(doctor, other_process):
    settings = settings_with()
    sensors = Sensors(cameras={'base': CameraScript()})
    other_process.create_publisher(CompressedImage, 'camera/wrist/image_raw', 5)
    (found,) = findings(probe(doctor, sensors, settings), settings)
    assert found.what == (
        '/test_driver publishes sensor_msgs/msg/CompressedImage on /camera/wrist/image_raw, '
        'not sensor_msgs/msg/Image'
    )
    assert found.fix == (
        'ros2 run pi05_ros policy_node --ros-args -p cameras.wrist.transport:=compressed '
        '-r camera/wrist/image_raw/compressed:=/camera/wrist/image_raw'
    )


def test_publisher_that_matches_but_is_silent_is_named(doctor):
    settings = settings_with()
    sensors = Sensors()
    sensors.cameras['wrist'].running = False
    (found,) = findings(probe(doctor, sensors, settings), settings)
    assert found.what.startswith('/test_sensors matches on /camera/wrist/image_raw, but nothing')
    assert found.fix == f'start /test_sensors with: {profile_line()}'


def test_task_that_nobody_gives_has_the_line_that_gives_it(doctor):
    settings = settings_with(prompt='')
    sensors = Sensors()
    sensors.destroy_publisher(sensors.task_publisher)
    (found,) = findings(probe(doctor, sensors, settings, discovery_s=2.0), settings)
    assert found.what == 'no task: nobody publishes /task_prompt, prompt is empty'
    assert found.fix.startswith('ros2 topic pub -1 --qos-durability transient_local /task_prompt')


def test_slow_joints_are_measured_against_the_age_limit(doctor):
    settings = settings_with()
    probes = probe(doctor, Sensors(), settings)
    slow = replace(probes['joint_states'], received=10, seconds=2.0)
    assert input_findings([slow], settings) == [
        Finding(
            '/joint_states: 5.0 Hz, so a message gets 200 ms old, more than max_joint_age_ms 100',
            'max_joint_age_ms: 400.0',
        )
    ]


def test_lost_images_ask_for_a_transport_that_holds_them(doctor):
    settings = settings_with()
    probes = probe(doctor, Sensors(), settings)
    lossy = replace(probes['base'], received=45, lost=15, seconds=2.0)
    assert input_findings([lossy], settings) == [
        Finding(
            '/camera/base/image_raw: 25 % of the messages of /test_sensors are lost',
            f'start /test_sensors with: {profile_line()}',
        )
    ]


def test_gaps_are_counted_for_each_publisher_on_its_own():
    tally = Tally()
    for publisher, number in (('a', 7), ('b', 100), ('a', 8), ('a', 11), ('b', 102)):
        tally.add({'publisher_gid': publisher, 'publication_sequence_number': number})
    assert (tally.received, tally.lost) == (5, 3)


def test_loss_is_unknown_where_messages_are_not_numbered():
    tally = Tally()
    tally.add({'publication_sequence_number': None})
    assert tally.lost is None

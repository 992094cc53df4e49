"""Messages of the benchmark's sensors arrive as they were serialised, but for the stamp."""

from __future__ import annotations

import time

import pytest
import rclpy
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import JointState

from pi05_ros.tools.direct_publish import StampedMessages
from pi05_ros.tools.playback import read_stamp

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

DEADLINE_S = 30.0


def test_messages_arrive_in_turn_with_the_time_of_publishing():
    node = rclpy.create_node('test_direct_publish')
    arrived: list[bytes] = []
    qos = QoSProfile(depth=10)
    publisher = node.create_publisher(JointState, 'stamped', qos)
    node.create_subscription(JointState, 'stamped', arrived.append, qos, raw=True)
    names = ['a', 'b']
    raw = [serialize_message(JointState(name=[name])) for name in names]
    messages = StampedMessages(publisher, raw)
    end_s = time.monotonic() + DEADLINE_S
    while not publisher.get_subscription_count():
        assert time.monotonic() < end_s
        time.sleep(0.01)
    stamps_ns = [10**18 + 1, 2 * 10**18 + 2, 2 * 10**18 + 3]
    for stamp_ns in stamps_ns:
        messages.publish(lambda stamp_ns=stamp_ns: stamp_ns)
    while len(arrived) < 3:
        assert time.monotonic() < end_s
        rclpy.spin_once(node, timeout_sec=0.1)
    assert [read_stamp(message) for message in arrived] == stamps_ns
    found = [deserialize_message(message, JointState).name for message in arrived]
    assert found == [['a'], ['b'], ['a']]
    node.destroy_node()

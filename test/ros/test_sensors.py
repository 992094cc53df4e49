"""``pi05-ros sensors``: the node acts on made-up sensors of every shipped robot."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
import rclpy
from helpers import DEADLINE_S, Sensors, SmallPolicy, bench
from rclpy.node import Node
from sensor_msgs.msg import JointState

from pi05_ros.policy.robot import load_robot, robot_names
from pi05_ros.tools.sensors import (
    SensorsError,
    SyntheticSensors,
    refuse_beside_others,
    rest_positions,
)

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]


class MadeUp(Node):
    """Made-up sensors in the place of the scripted ones."""

    streaming = Sensors.streaming

    def __init__(self, robot: str) -> None:
        super().__init__('made_up')
        self.synthetic = SyntheticSensors(self, load_robot(robot), 'fold it', size_px=(24, 32))

    def send(self) -> None:
        self.synthetic.send(self.get_clock().now().nanoseconds)


@pytest.mark.parametrize('name', [name for name in robot_names() if name != 'template'])
def test_node_acts_on_the_made_up_sensors_of_every_robot(name):
    robot = load_robot(name)
    with bench(SmallPolicy(robot), {'robot': name}, MadeUp(name)) as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        b.until(lambda: b.observer.message('Inputs') == 'all inputs fresh')
        b.until(lambda: b.observer.values('Model').get('task') == 'fold it')


def test_joints_stand_in_the_middle_of_their_limits():
    position = dict(zip(*rest_positions(load_robot('franka')), strict=True))
    assert position['panda_joint1'] == 0.0
    assert position['panda_joint4'] == pytest.approx((-3.0718 - 0.0698) / 2)
    assert position['panda_finger_joint1'] == pytest.approx(0.02)


def test_made_up_sensors_refuse_to_mix_with_those_of_a_robot():
    robot_node, node = rclpy.create_node('driver'), rclpy.create_node('pi05_sensors')
    robot_node.create_publisher(JointState, 'joint_states', 1)
    try:
        with pytest.raises(SensorsError, match='/joint_states has a publisher already'):
            refuse_beside_others(node, load_robot('franka'), threading.Event())
    finally:
        robot_node.destroy_node()
        node.destroy_node()


def test_command_publishes_until_it_is_interrupted():
    listener = rclpy.create_node('listener')
    heard: list[JointState] = []
    listener.create_subscription(JointState, 'arm/joint_states', heard.append, 1)
    process = subprocess.Popen(
        [sys.executable, '-m', 'pi05_ros.tools.cli', 'sensors', '--robot', 'aloha',
         '--ros-args', '-r', 'joint_states:=arm/joint_states'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline_ns = listener.get_clock().now().nanoseconds + int(DEADLINE_S * 1e9)
        while not heard and process.poll() is None:
            assert listener.get_clock().now().nanoseconds < deadline_ns
            rclpy.spin_once(listener, timeout_sec=0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        listener.destroy_node()
    assert process.returncode == 0, output
    assert 'made-up sensors of robot aloha on ' in output
    assert len(heard[0].name) == 14

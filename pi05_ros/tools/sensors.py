"""``pi05-ros sensors``: everything that a robot file asks for, made up, to try it without a robot.

The arm stands still in the middle of its limits, and the cameras show a moving pattern. What the
policy makes of it means nothing; that every name, size and unit fits does.
"""

from __future__ import annotations

import argparse
import array
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_ros.control.parameter_file import DEFAULT_ROBOT
from pi05_ros.control.parameters import settings_from_values
from pi05_ros.control.topics import EEF_POSE, JOINT_STATES, TASK_PROMPT, input_topics
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import POSITION_KINDS, RobotSpec, load_robot

from .play import stopped_by_signals, use_image_transports
from .terminal import make_console, positive

if TYPE_CHECKING:
    from rclpy.node import Node

NODE_NAME = 'pi05_sensors'
SIZE_PX = (480, 640)
DISCOVERY_S = 1.0
DEFAULT_TASK = 'do nothing'
_PATTERN_STEP = 3


class SensorsError(Pi05Error):
    """Made-up sensors must not mix with real ones."""


def add_parser(subparsers: Any) -> None:
    """Add ``sensors`` to the command line."""
    parser = subparsers.add_parser(
        'sensors',
        help='publish made-up images and joint states for a robot file',
        description='Publish made-up images, joint states, pose and task, as the robot file asks '
        'for them, until Ctrl-C: to try a robot file and a checkpoint without a robot.',
    )
    parser.add_argument(
        '--robot', default=DEFAULT_ROBOT, help=f'shipped name or path (default {DEFAULT_ROBOT})'
    )
    parser.add_argument(
        '--rate', type=positive, default=30.0, metavar='HZ', help='of everything (default 30)'
    )
    parser.add_argument(
        '--task', default=DEFAULT_TASK, metavar='TEXT', help=f'default: {DEFAULT_TASK}'
    )
    parser.add_argument(
        '--ros-args',
        nargs=argparse.REMAINDER,
        default=[],
        help='standard ROS arguments, e.g. -r joint_states:=/arm/joint_states',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Publish until SIGINT or SIGTERM; return 0."""
    robot = load_robot(args.robot)
    stop = threading.Event()
    with stopped_by_signals(stop):
        use_image_transports()
        import rclpy
        from rclpy.signals import SignalHandlerOptions

        ros_args = ['--ros-args', *args.ros_args] if args.ros_args else []
        rclpy.init(args=ros_args, signal_handler_options=SignalHandlerOptions.NO)
        try:
            node = rclpy.create_node(
                NODE_NAME, enable_rosout=False, start_parameter_services=False
            )
            refuse_beside_others(node, robot, stop)
            sensors = SyntheticSensors(node, robot, args.task)
            make_console().print(
                f'made-up sensors of robot {robot.name} on {", ".join(sensors.topics)}; '
                'Ctrl-C ends',
                soft_wrap=True,
            )
            while not stop.wait(1.0 / args.rate):
                sensors.send(time.time_ns())
            node.destroy_node()
        finally:
            rclpy.try_shutdown()
    return 0


def refuse_beside_others(node: Node, robot: RobotSpec, stop: threading.Event) -> None:
    """Look around before publishing anything.

    Raises:
        SensorsError: somebody publishes one of the topics, perhaps a robot.
    """
    stop.wait(DISCOVERY_S)
    for topic in _topics(robot):
        resolved = node.resolve_topic_name(topic.topic)
        if node.count_publishers(resolved):
            raise SensorsError(
                f'{resolved} has a publisher already; made-up sensors must not mix with those of '
                'a robot. Stop it, or use another ROS_DOMAIN_ID'
            )


class SyntheticSensors:
    """Publishes one message of every input of a robot at a time; the task once, latched.

    Args:
        size_px: (height, width) of the images.
    Attributes:
        topics: where, after namespace and remapping.
    """

    def __init__(
        self, node: Node, robot: RobotSpec, task: str, size_px: tuple[int, int] = SIZE_PX
    ) -> None:
        from rclpy.qos import DurabilityPolicy, QoSProfile

        from pi05_ros.ros.subscriptions import MESSAGE_TYPES

        self._publishers: dict[str, Any] = {}
        for topic in _topics(robot):
            qos = QoSProfile(depth=1 if topic.latched else 10)
            if topic.latched:
                qos.durability = DurabilityPolicy.TRANSIENT_LOCAL
            kind = MESSAGE_TYPES[topic.type_name]
            self._publishers[topic.name] = node.create_publisher(kind, topic.topic, qos)
        self.topics = [publisher.topic_name for publisher in self._publishers.values()]
        self._robot = robot
        self._size_px = size_px
        self._sent = 0
        prompt = self._publishers[TASK_PROMPT]
        prompt.publish(prompt.msg_type(data=task))

    def send(self, now_ns: int) -> None:
        """Publish everything but the task, stamped with ``now_ns``."""
        self._sent += 1
        for name, publisher in self._publishers.items():
            if name == TASK_PROMPT:
                continue
            message = publisher.msg_type()
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(now_ns, 10**9)
            if name == JOINT_STATES:
                message.name, message.position = rest_positions(self._robot)
                message.velocity = message.effort = [0.0] * len(message.name)
            elif name == EEF_POSE:
                message.pose.position.x = message.pose.position.z = 0.4
                message.pose.orientation.w = 1.0
            else:
                self._fill_image(message)
            publisher.publish(message)

    def _fill_image(self, message: Any) -> None:
        height, width = self._size_px
        rows, columns = np.ogrid[:height, :width]
        pattern = (rows + columns + _PATTERN_STEP * self._sent).astype(np.uint8)
        message.height, message.width, message.step = height, width, 3 * width
        message.encoding = 'rgb8'
        message.data = array.array('B', np.repeat(pattern[..., None], 3, axis=2).tobytes())


def rest_positions(robot: RobotSpec) -> tuple[list[str], list[float]]:
    """Return the joints of the state, each in the middle of its limits, or at zero without any."""
    middles = {
        dim.joint: (dim.min + dim.max) / 2
        for dim in robot.actions
        if dim.kind in POSITION_KINDS and dim.min is not None and dim.max is not None
    }
    joints = list(robot.state_joints)
    return joints, [middles.get(joint, 0.0) for joint in joints]


def _topics(robot: RobotSpec) -> tuple:
    return input_topics(robot, settings_from_values({}, robot.camera_names))

"""Actions onto the wire: which message can carry what the robot file says, and the encoders."""

from __future__ import annotations

import array
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

import pi05_ros.msg as msg
from pi05_ros.control.safety import hold_row
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import ActionDim, RobotSpec
from pi05_ros.policy.types import ActionChunk

from .trajectory import NS_PER_S, TrajectoryEncoder, duration_message, time_message

# A late action must not queue behind a later one.
ACTION_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
# A subscriber whose machine is gone must not keep the node from ending.
_LAST_COMMAND_PATIENCE = Duration(seconds=1)

# Controllers behind these take one command at a time, not a plan.
_FIRST_ROW_INTERFACES = ('forward_command', 'joint_state')
_POSITION_KINDS = ('joint_position', 'gripper_position')
_CONTROLLER_UNITS = ('rad', 'm', 'rad/s', 'm/s')


class OutputError(Pi05Error):
    """The chosen message cannot carry the robot's actions."""


@dataclass(frozen=True)
class Provenance:
    """What an action chunk says of its origin, beside what changes with every tick."""

    checkpoint_sha256: str
    backend: str
    precision: str
    units: tuple[str, ...]


def check_carries(interface: str, robot: RobotSpec) -> None:
    """Refuse an interface that would lose or misstate what an action dimension means.

    Args:
        interface: the parameter ``action_interface``.
    Raises:
        OutputError: names the dimensions and what would carry them.
    """
    if interface == 'action_chunk':
        return
    if interface == 'joint_trajectory':
        wanted, unfit = 'joint positions', _not_positions(robot)
    else:
        wanted = 'positions (or velocities) of joints, all of one kind'
        unfit = min((_not_positions(robot), _not_velocities(robot)), key=len)
    if unfit:
        raise OutputError(
            f'action_interface {interface} carries {wanted} in SI units, but robot {robot.name} '
            f'has {", ".join(unfit)}; use action_interface action_chunk'
        )


def check_rows(interface: str, execute_horizon: int) -> None:
    """Refuse to send more rows than the interface carries.

    Args:
        execute_horizon: the parameter of that name; 0 asks for what the interface carries.
    Raises:
        OutputError: the interface carries one row only.
    """
    if interface in _FIRST_ROW_INTERFACES and execute_horizon > 1:
        raise OutputError(
            f'action_interface {interface} carries the first row of a chunk, but execute_horizon '
            f'is {execute_horizon}; set it to 0 or 1, or use joint_trajectory or action_chunk'
        )


def _not_positions(robot: RobotSpec) -> list[str]:
    return [_describe(dim) for dim in robot.actions if not _is(dim, _POSITION_KINDS)]


def _not_velocities(robot: RobotSpec) -> list[str]:
    return [_describe(dim) for dim in robot.actions if not _is(dim, ('joint_velocity',))]


def _is(dim: ActionDim, kinds: tuple[str, ...]) -> bool:
    return dim.kind in kinds and dim.joint is not None and dim.unit in _CONTROLLER_UNITS


def _describe(dim: ActionDim) -> str:
    return f'{dim.name} ({dim.kind} [{dim.unit}])'


def command_message(chunk: ActionChunk) -> Float64MultiArray:
    """Encode the first row only."""
    first = np.ascontiguousarray(chunk.actions[0], dtype=np.float64)
    return Float64MultiArray(data=array.array('d', first.tobytes()))


def joint_state_message(row: np.ndarray, dims: tuple[ActionDim, ...], stamp_ns: int) -> JointState:
    """Encode one row (D,) as positions, or as velocities if that is what the actions are."""
    message = JointState(name=[dim.joint for dim in dims])
    message.header.stamp = time_message(stamp_ns)
    values = array.array('d', np.ascontiguousarray(row, dtype=np.float64).tobytes())
    if dims[0].kind == 'joint_velocity':
        message.velocity = values
    else:
        message.position = values
    return message


def hold_trajectory(row: np.ndarray, joints: tuple[str, ...], step_s: float) -> JointTrajectory:
    """Encode one row to be reached within one step, from now on (a stamp of zero)."""
    until = duration_message(round(step_s * NS_PER_S))
    point = JointTrajectoryPoint(positions=row.tolist(), time_from_start=until)
    return JointTrajectory(joint_names=list(joints), points=[point])


def chunk_message(chunk: ActionChunk, origin: Provenance, dry_run: bool) -> msg.ActionChunk:
    """Encode everything that is needed to recompute the chunk."""
    actions = np.ascontiguousarray(chunk.actions, dtype=np.float32)
    message = msg.ActionChunk(
        tick=chunk.tick,
        dry_run=dry_run,
        names=list(chunk.names),
        units=list(origin.units),
        step_dt=duration_message(round(chunk.step_s * NS_PER_S)),
        horizon=actions.shape[0],
        actions=array.array('f', actions.tobytes()),
        input_names=list(chunk.stamps_ns),
        input_stamps=[time_message(stamp) for stamp in chunk.stamps_ns.values()],
        prompt=chunk.prompt,
        seed=chunk.seed,
        num_steps=chunk.num_steps,
        checkpoint_sha256=origin.checkpoint_sha256,
        backend=origin.backend,
        precision=origin.precision,
    )
    message.header.stamp = time_message(chunk.stamp_ns)
    return message


def _full_name(namespace: str, name: str) -> str:
    return f'{namespace.rstrip("/")}/{name}'


class ActionOutput:
    """Publishes chunks on the one chosen interface, or on the dry-run topic.

    The publishers are managed ones: what is published while the node is not active is dropped.

    Args:
        interface: the parameter ``action_interface``.
        dry_run: publish on ``~/dry_run/action_chunk`` and nowhere else.
    Raises:
        OutputError: the interface cannot carry the robot's actions, in a dry run, too.
    """

    def __init__(
        self,
        node: LifecycleNode,
        robot: RobotSpec,
        interface: str,
        origin: Provenance,
        dry_run: bool,
    ) -> None:
        check_carries(interface, robot)
        self._node = node
        self._robot = robot
        # The watchdog holds from a thread of its own.
        self._lock = threading.Lock()
        self._commanded: np.ndarray | None = None
        self._origin = origin
        self._interface = 'dry_run' if dry_run else interface
        self._joints = tuple(joint for joint in robot.action_joints if joint is not None)
        self._encoder = TrajectoryEncoder(self._joints)
        kind, topic = {
            'dry_run': (msg.ActionChunk, '~/dry_run/action_chunk'),
            'action_chunk': (msg.ActionChunk, '~/action_chunk'),
            'joint_trajectory': (JointTrajectory, 'joint_trajectory'),
            'forward_command': (Float64MultiArray, 'commands'),
            'joint_state': (JointState, 'joint_commands'),
        }[self._interface]
        self._publisher = node.create_lifecycle_publisher(kind, topic, ACTION_QOS)

    @property
    def topic(self) -> str:
        """Where the actions go, after namespace and remapping."""
        return self._publisher.topic_name

    @property
    def listeners(self) -> int:
        """How many subscribe to the topic."""
        return self._publisher.get_subscription_count()

    def publish(self, chunk: ActionChunk) -> None:
        """Encode the whole chunk, then send it: a failure in between sends nothing."""
        message = self._encode(chunk)
        with self._lock:
            self._publisher.publish(message)
            self._commanded = chunk.actions[0]

    def rehearse(self, chunk: ActionChunk) -> None:
        """Encode a chunk and send nothing."""
        self._encode(chunk)

    def hold(self, measured: Mapping[str, float]) -> bool:
        """Command the robot to stay where it is, once after the last action.

        A dry run commands nothing, and an action chunk carries no hold: who plays it has to stop
        at its end. Both send nothing here.

        Args:
            measured: joint -> position.
        Returns: whether a command was sent.
        Raises:
            HoldError: there is no such command; nothing was sent.
        """
        with self._lock:
            if self._commanded is None or self._interface in ('dry_run', 'action_chunk'):
                return False
            row = hold_row(self._robot.actions, self._commanded, measured)
            self._publisher.publish(self._encode_hold(row))
            self._commanded = None
        return True

    def release(self) -> None:
        """Hold no more: the last command has lapsed."""
        with self._lock:
            self._commanded = None

    def other_publishers(self) -> list[str]:
        """Name the nodes that publish on the same topic, beside this one."""
        own = _full_name(self._node.get_namespace(), self._node.get_name())
        names = [
            _full_name(found.node_namespace, found.node_name)
            for found in self._node.get_publishers_info_by_topic(self.topic)
        ]
        if own in names:
            names.remove(own)  # once: another node of the same name stays in the list
        return sorted(names)

    def destroy(self) -> None:
        """Remove the publisher, once the last command has arrived.

        What is still under way goes with its publisher: the hold of a process that ends.
        """
        if not self._publisher.wait_for_all_acked(_LAST_COMMAND_PATIENCE):
            self._node.get_logger().warning(
                f'{self.topic}: a subscriber has not confirmed the last command'
            )
        self._node.destroy_lifecycle_publisher(self._publisher)

    def _encode_hold(self, row: np.ndarray) -> JointTrajectory | Float64MultiArray | JointState:
        if self._interface == 'joint_trajectory':
            return hold_trajectory(row, self._joints, self._robot.step_s)
        if self._interface == 'joint_state':
            now_ns = self._node.get_clock().now().nanoseconds
            return joint_state_message(row, self._robot.actions, now_ns)
        return Float64MultiArray(data=array.array('d', row.tobytes()))

    def _encode(
        self, chunk: ActionChunk
    ) -> bytes | Float64MultiArray | JointState | msg.ActionChunk:
        if self._interface == 'joint_trajectory':
            return self._encoder.encode(chunk)
        if self._interface == 'forward_command':
            return command_message(chunk)
        if self._interface == 'joint_state':
            return joint_state_message(chunk.actions[0], self._robot.actions, chunk.stamp_ns)
        return chunk_message(chunk, self._origin, dry_run=self._interface == 'dry_run')

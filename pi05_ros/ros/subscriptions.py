"""Newest-at-tick inputs: the tick asks the middleware for what is newest, nothing is queued.

A callback that stores the image for a timer to use would hand a synchronous policy an old one:
the executor serves timers before subscriptions, so after a long inference the next tick runs
before the callback that holds the newest image. Here the executor never serves the input
subscriptions (their callback group says no), and :meth:`InputSubscriptions.poll` takes the newest
message itself. An executor that ignores callback groups calls the callback instead; it keeps the
message where the poll looks, so both work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from geometry_msgs.msg import PoseStamped
from rclpy.callback_groups import CallbackGroup
from rclpy.clock import ROSClock
from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    QoSCompatibility,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from pi05_ros.control.topics import InputTopic

from .direct_take import SLACK_BYTES, Allocate, DirectTake, Rcl, RclpyTake, Taken

IMAGE_TYPE = 'sensor_msgs/msg/Image'
MESSAGE_TYPES: dict[str, type] = {
    IMAGE_TYPE: Image,
    'sensor_msgs/msg/CompressedImage': CompressedImage,
    'sensor_msgs/msg/JointState': JointState,
    'geometry_msgs/msg/PoseStamped': PoseStamped,
    'std_msgs/msg/String': String,
}
# What the graph says of a node that was discovered by its topics before it told its name.
_UNKNOWN_NAME = '_NODE_NAME_UNKNOWN_'


class Push(Protocol):
    """Where a message goes: :meth:`pi05_ros.control.inputs.Inputs.push`."""

    def __call__(
        self, name: str, raw: bytes | memoryview, receive_ns: int, sequence: int | None = None
    ) -> None:
        """Take one raw message."""


class PolledGroup(CallbackGroup):
    """A callback group that the executor never serves: its entities are polled."""

    def can_execute(self, entity: Any) -> bool:
        """Refuse, so that the executor leaves the entity out of its wait set."""
        return False

    def beginning_execution(self, entity: Any) -> bool:
        """Refuse, as :meth:`can_execute`."""
        return False

    def ending_execution(self, entity: Any) -> None:
        """Do nothing: nothing was executed."""


class PolledSubscription:
    """One raw subscription of depth 1 that is asked for its newest message.

    Attributes:
        lost: messages that the middleware lost on the way; None where it cannot tell.
        was_delivered: the newest message came through the executor and was not taken here.
    """

    def __init__(self, node: Node, topic: InputTopic, group: CallbackGroup) -> None:
        self.topic = topic
        self.lost: int | None = 0
        self.was_delivered = False
        self._node = node
        self._take: RclpyTake | DirectTake = RclpyTake()
        self._message_bytes = 0
        self._delivered: Taken | None = None
        self._deliveries = 0
        self._mismatched = False
        self._publisher: Any = None
        self._sequence_offset = 0
        self._sequence = 0
        # rclpy's types know only callbacks of deserialised messages.
        deliver: Any = self._deliver
        self._subscription: Subscription = node.create_subscription(
            MESSAGE_TYPES[topic.type_name],
            topic.topic,
            deliver,
            input_qos(topic),
            callback_group=group,
            event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
            raw=True,
        )
        self._events = self._listen_to_events()

    @property
    def resolved_topic(self) -> str:
        """The topic's name after namespace and remapping."""
        return self._subscription.topic_name

    @property
    def qos_fault(self) -> str:
        """Why a publisher does not match, and what to change; empty while all match."""
        if not self._mismatched:
            return ''
        fault = find_mismatch(self._node, self.topic, self.resolved_topic)
        self._mismatched = bool(fault)  # the publisher may have gone
        return fault

    @property
    def fault(self) -> str:
        """What is wrong with who publishes, and what to change; empty if nothing is."""
        return self.qos_fault or find_rivals(self._node, self.topic, self.resolved_topic)

    def poll(self) -> Taken | None:
        """Take the newest message (raw CDR and the middleware's message info), if one came."""
        delivered, self._delivered = self._delivered, None
        taken = self._take.newest(self._subscription)
        newest = taken or delivered
        if newest is not None:
            self.was_delivered = taken is None
            self._message_bytes = len(newest[0])
        return newest

    def take_directly(self, rcl: Rcl, allocate: Allocate) -> None:
        """Take from now on into two buffers of the size of the newest message."""
        self._take = DirectTake(rcl, allocate, self._message_bytes + SLACK_BYTES)

    def take_through_rclpy(self) -> None:
        """Take into new memory, and let go of buffers: an executor may hold on to this object."""
        self._take = RclpyTake()

    def sequence_of(self, info: Mapping[str, Any]) -> int | None:
        """Return a count of the publisher's messages that goes on when the publisher changes."""
        sequence = info.get('publication_sequence_number')
        if sequence is None:
            return None
        publisher = info.get('publisher_gid')
        if publisher != self._publisher:
            self._publisher = publisher
            self._sequence_offset = self._sequence + 1 - sequence
        self._sequence = sequence + self._sequence_offset
        return self._sequence

    def destroy(self) -> None:
        """Unsubscribe."""
        self.take_through_rclpy()
        for event in self._events:
            self._node.remove_waitable(event)
            event.destroy()
        self._events = []
        self._node.destroy_subscription(self._subscription)

    def _deliver(self, raw: bytes) -> None:
        # Without message info: the events executor of rclpy 9.1 fails on callbacks that take it.
        self._deliveries += 1
        self._delivered = (raw, {'publication_sequence_number': self._deliveries})

    def _listen_to_events(self) -> list:
        """Serve the events through the default group: the polled one would never call them."""
        handlers = []
        for event in (
            SubscriptionEventCallbacks(
                incompatible_qos=self._on_mismatch, use_default_callbacks=False
            ),
            SubscriptionEventCallbacks(message_lost=self._on_lost, use_default_callbacks=False),
        ):
            try:
                created = event.create_event_handlers(
                    self._node.default_callback_group,
                    self._subscription.handle,
                    self._subscription.topic_name,
                )
            except UnsupportedEventTypeError:
                self.lost = None  # only the count of lost messages is not known everywhere
                continue
            handlers += created
        for handler in handlers:
            self._node.add_waitable(handler)
        return handlers

    def _on_mismatch(self, info: Any) -> None:
        self._mismatched = True
        if self.qos_fault:
            self._node.get_logger().error(self.qos_fault)

    def _on_lost(self, info: Any) -> None:
        self.lost = info.total_count


class InputSubscriptions:
    """All inputs of the robot: what :meth:`poll` takes goes into ``push`` at once.

    An image that was taken directly (:meth:`take_directly`) is a view into a buffer that the next
    but one is written into, see :class:`.direct_take.DirectTake`. All else is immutable.
    """

    def __init__(self, node: Node, topics: tuple[InputTopic, ...], push: Push) -> None:
        self._node = node
        self._push = push
        group = PolledGroup()
        self.by_name: dict[str, PolledSubscription] = {}
        try:
            for topic in topics:
                self.by_name[topic.name] = PolledSubscription(node, topic, group)
        except Exception:
            self.destroy()
            raise

    def poll(self) -> None:
        """Push the newest message of every input that has a new one."""
        clock = self._node.get_clock()
        now_ns, wall_ns = clock.now().nanoseconds, time.time_ns()
        if isinstance(clock, ROSClock) and clock.ros_time_is_active:
            wall_ns = 0
        for name, subscription in self.by_name.items():
            taken = subscription.poll()
            if taken is not None:
                raw, info = taken
                sequence = subscription.sequence_of(info)
                self._push(name, raw, _receive_ns(info, now_ns, wall_ns), sequence)

    def take_through_rclpy(self) -> None:
        """Take images as everything else again, and free the buffers."""
        for subscription in self._raw_images():
            subscription.take_through_rclpy()

    def take_directly(self, rcl: Rcl, allocate: Allocate) -> None:
        """Take images from now on straight into memory from ``allocate``.

        Only uncompressed ones: what is small is not worth it, and is read by other threads, too.
        """
        for subscription in self._raw_images():
            subscription.take_directly(rcl, allocate)

    def has_raw_images(self) -> bool:
        """Tell whether there is anything to take directly."""
        return bool(self._raw_images())

    def is_delivered(self) -> bool:
        """Tell whether the executor serves the images in spite of their callback group."""
        return any(subscription.was_delivered for subscription in self._raw_images())

    def wait(
        self,
        is_complete: Callable[[], bool],
        timeout_s: float,
        poll_interval_s: float = 0.01,
    ) -> bool:
        """Poll until ``is_complete``, on the steady clock: the ROS clock may stand still.

        The executor does not run meanwhile, as a transition is one of its callbacks; the
        middleware receives in threads of its own.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.poll()
            if is_complete():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(poll_interval_s)

    def explain(self, name: str) -> str:
        """Say why nothing comes on an input, from what the graph knows."""
        subscription = self.by_name[name]
        return explain_publishers(self._node, subscription.topic, subscription.resolved_topic)

    def destroy(self) -> None:
        """Unsubscribe from everything."""
        for subscription in self.by_name.values():
            subscription.destroy()
        self.by_name.clear()

    def _raw_images(self) -> list[PolledSubscription]:
        return [
            subscription
            for subscription in self.by_name.values()
            if subscription.topic.type_name == IMAGE_TYPE
        ]


def _receive_ns(info: Mapping[str, Any], now_ns: int, wall_ns: int) -> int:
    """Return when the message arrived, on the ROS clock.

    The middleware notes it in wall time; it is carried over to the ROS clock by how long ago
    it was. A simulated clock has no such relation, there it is the time of the poll.

    Args:
        now_ns: time of the poll on the ROS clock.
        wall_ns: the same in wall time; 0 where the ROS clock is simulated.
    """
    received_ns = info.get('received_timestamp') or 0
    if received_ns == 0 or wall_ns == 0:
        return now_ns
    return now_ns - max(0, wall_ns - received_ns)


def input_qos(topic: InputTopic) -> QoSProfile:
    """Return the newest-only profile of an input."""
    reliable = topic.reliability == 'reliable'
    return QoSProfile(
        depth=1,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=(
            DurabilityPolicy.TRANSIENT_LOCAL if topic.latched else DurabilityPolicy.VOLATILE
        ),
    )


def explain_publishers(node: Node, topic: InputTopic, resolved: str) -> str:
    """Say why nothing comes on a topic, with the remedy."""
    count = node.count_publishers(resolved)
    if not count:
        domain = node.context.get_domain_id()
        return f'nobody publishes on {resolved} (ROS_DOMAIN_ID {domain}); start it, or remap'
    fault = find_mismatch(node, topic, resolved)
    return fault or f'{count} publisher(s) on {resolved} match but send nothing'


def find_mismatch(node: Node, topic: InputTopic, resolved: str) -> str:
    """Name a publisher whose type or QoS keeps its messages from us; empty if there is none."""
    wanted = input_qos(topic)
    for publisher in node.get_publishers_info_by_topic(resolved):
        who = f'{publisher.node_namespace.rstrip("/")}/{publisher.node_name}'
        if publisher.topic_type != topic.type_name:
            return f'{who} publishes {publisher.topic_type} on {resolved}, not {topic.type_name}'
        verdict, _ = qos_check_compatible(publisher.qos_profile, wanted)
        if verdict == QoSCompatibility.ERROR:
            return f'{who} publishes {resolved} with other QoS: {_qos_remedy(topic, publisher)}'
    return ''


def find_rivals(node: Node, topic: InputTopic, resolved: str) -> str:
    """Say that images of several nodes come mixed on one topic; empty if they do not.

    A camera that was killed stays in the graph for a while beside its successor of the same name,
    and one that comes has no name at first; joint states may come from several broadcasters.
    """
    if topic.type_name not in ('sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'):
        return ''
    names = {
        f'{publisher.node_namespace.rstrip("/")}/{publisher.node_name}'
        for publisher in node.get_publishers_info_by_topic(resolved)
        if publisher.node_name != _UNKNOWN_NAME
    }
    if len(names) < 2:
        return ''
    return f'{" and ".join(sorted(names))} both publish on {resolved}; stop one, or remap it'


def _qos_remedy(topic: InputTopic, publisher: Any) -> str:
    offered = publisher.qos_profile
    if topic.reliability == 'reliable' and offered.reliability == ReliabilityPolicy.BEST_EFFORT:
        if topic.latched:
            return 'it offers best_effort; publish it reliable and transient_local'
        return f'it offers best_effort; set cameras.{topic.name}.reliability: best_effort'
    if topic.latched and offered.durability == DurabilityPolicy.VOLATILE:
        return (
            'it offers volatile; publish it latched '
            '(ros2 topic pub --qos-durability transient_local --qos-reliability reliable; '
            'ros2 bag play --qos-profile-overrides-path .../config/bag_play_qos.yaml)'
        )
    return f'it offers {offered}'

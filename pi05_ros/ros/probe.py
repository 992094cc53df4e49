"""Looks at the node's input topics from outside: who publishes, whether it matches, what arrives.

Used by ``pi05-ros doctor``. The subscriptions are those of the node but for a deeper queue, so
that a message counts as lost only if the middleware lost it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription

from pi05_ros.control.topics import InputTopic

from .subscriptions import MESSAGE_TYPES, PolledGroup, find_mismatch, input_qos

QUEUE_DEPTH = 20
POLL_S = 0.002
IMAGE_TYPES = ('sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage')


@dataclass(frozen=True)
class Publisher:
    """One publisher on an input's topic, with its QoS in words."""

    node: str
    type_name: str
    reliability: str
    durability: str

    def __str__(self) -> str:
        return f'{self.node} ({self.type_name}, {self.reliability}, {self.durability})'


@dataclass(frozen=True)
class InputProbe:
    """What was found on one input.

    Args:
        resolved: absolute topic name.
        mismatch: why a publisher's messages cannot arrive, and the remedy; empty if all match.
        received: messages within ``seconds``.
        lost: gaps in the publishers' numbering; None where the middleware does not number.
        elsewhere: other topics of the type that the node wants.
    """

    topic: InputTopic
    resolved: str
    publishers: tuple[Publisher, ...]
    mismatch: str
    received: int
    lost: int | None
    seconds: float
    elsewhere: tuple[str, ...]

    @property
    def rate_hz(self) -> float:
        """Messages per second that arrived."""
        return self.received / self.seconds

    @property
    def loss(self) -> float:
        """Lost messages as a fraction of those sent; 0 where it is not known."""
        sent = self.received + (self.lost or 0)
        return (self.lost or 0) / sent if sent else 0.0

    @property
    def is_image(self) -> bool:
        """Whether it is a camera."""
        return self.topic.type_name in IMAGE_TYPES


@dataclass
class Tally:
    """Counts one subscription's messages, per publisher."""

    received: int = 0
    first: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    numbered: int = 0

    def add(self, info: Mapping[str, Any]) -> None:
        """Count one message by the middleware's message info."""
        self.received += 1
        number = info.get('publication_sequence_number')
        if number is None:
            return
        publisher = str(info.get('publisher_gid'))  # its type differs between distributions
        self.numbered += 1
        self.first.setdefault(publisher, number)
        self.last[publisher] = number

    @property
    def lost(self) -> int | None:
        """Numbers that are missing between the first and the last; None without numbers."""
        if self.numbered < self.received:
            return None
        sent = sum(self.last[one] - self.first[one] + 1 for one in self.first)
        return max(0, sent - self.received)


def probe_inputs(
    node: Node, topics: Iterable[InputTopic], discovery_s: float, listen_s: float
) -> list[InputProbe]:
    """Listen to every input for a while.

    Args:
        node: with the namespace and remappings that the policy node has; nothing may spin it.
        discovery_s: how long to wait at most until every input has a publisher.
        listen_s: how long to count messages.
    """
    group = PolledGroup()
    listening = {topic: _subscribe(node, topic, group) for topic in topics}
    try:
        deadline_s = time.monotonic() + discovery_s
        while time.monotonic() < deadline_s and not all(
            node.count_publishers(subscription.topic_name) for subscription in listening.values()
        ):
            time.sleep(POLL_S)
        tallies, seconds = _listen(listening, listen_s)
        return [
            _describe(node, topic, subscription.topic_name, tallies[topic], seconds)
            for topic, subscription in listening.items()
        ]
    finally:
        for subscription in listening.values():
            node.destroy_subscription(subscription)


def _subscribe(node: Node, topic: InputTopic, group: PolledGroup) -> Subscription:
    wanted = input_qos(topic)
    qos = QoSProfile(
        depth=QUEUE_DEPTH, reliability=wanted.reliability, durability=wanted.durability
    )
    return node.create_subscription(
        MESSAGE_TYPES[topic.type_name], topic.topic, _ignore, qos, callback_group=group, raw=True
    )


def _ignore(message: Any) -> None:
    """Stand in for a callback: the subscription is polled."""


def _listen(
    listening: dict[InputTopic, Subscription], listen_s: float
) -> tuple[dict[InputTopic, Tally], float]:
    tallies = {topic: Tally() for topic in listening}
    began_s = time.monotonic()
    while time.monotonic() - began_s < listen_s:
        for topic, subscription in listening.items():
            _take_all(subscription, tallies[topic])
        time.sleep(POLL_S)
    return tallies, time.monotonic() - began_s


def _take_all(subscription: Subscription, tally: Tally) -> None:
    with subscription.handle:
        for _ in range(QUEUE_DEPTH):
            taken = subscription.handle.take_message(subscription.msg_type, True)
            if taken is None:
                return
            tally.add(taken[1])


def _describe(
    node: Node, topic: InputTopic, resolved: str, tally: Tally, seconds: float
) -> InputProbe:
    publishers = tuple(
        Publisher(
            node=f'{found.node_namespace.rstrip("/")}/{found.node_name}',
            type_name=found.topic_type,
            reliability=found.qos_profile.reliability.name.lower(),
            durability=found.qos_profile.durability.name.lower(),
        )
        for found in node.get_publishers_info_by_topic(resolved)
    )
    elsewhere = tuple(
        name
        for name, types in sorted(node.get_topic_names_and_types())
        if topic.type_name in types and name != resolved and node.count_publishers(name)
    )
    mismatch = find_mismatch(node, topic, resolved)
    return InputProbe(
        topic, resolved, publishers, mismatch, tally.received, tally.lost, seconds, elsewhere
    )

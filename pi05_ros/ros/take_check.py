"""Does a direct take bring what rclpy's take brings? Tried with known messages to ourselves."""

from __future__ import annotations

import array
import secrets
import time
from collections.abc import Mapping
from typing import Any

from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import Image

from .direct_take import DirectTake, DirectTakeError, Rcl, RclpyTake, Taken, plain_memory
from .subscriptions import PolledGroup

CHECK_TIMEOUT_S = 2.0
_POLL_S = 0.001
_NS_PER_S = 1_000_000_000
# One that fits into the first buffer, one for which each of the two has to grow, and one after.
_PIXELS = (100, 20_000, 30_000, 200)
_FIRST_BYTES = 1000
TRIAL_TOPIC = 'image_take_'  # below the node's name, and with a random end
# Nothing is lost, also if the subscription is matched only after the message was sent.
_QOS = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)


def checked_rcl(node: Node, timeout_s: float = CHECK_TIMEOUT_S) -> Rcl:
    """Return rcl's functions after they have been tried on a topic of our own.

    Args:
        timeout_s: how long all of it may take.
    Raises:
        DirectTakeError: they are not there, or bring anything else than rclpy does; says what.
    """
    rcl = Rcl()
    try:
        with _Loopback(node) as loopback:
            loopback.check(rcl, time.monotonic() + timeout_s)
    except DirectTakeError:
        raise
    except Exception as error:  # of the middleware: whatever fails here would fail in a tick
        raise DirectTakeError(f'the trial failed: {type(error).__name__}: {error}') from error
    return rcl


class _Loopback:
    """A topic with one publisher and two subscriptions, one for each way to take."""

    def __init__(self, node: Node) -> None:
        self._node = node
        # Nobody else's: a node of the same name may run beside this one.
        self._topic = f'~/{TRIAL_TOPIC}{secrets.token_hex(8)}'
        self._publishers: list[Publisher] = []
        self._subscriptions: list[Subscription] = []

    def __enter__(self) -> _Loopback:
        group = PolledGroup()
        for _ in range(2):
            self._subscriptions.append(
                self._node.create_subscription(
                    Image, self._topic, _ignore, _QOS, callback_group=group, raw=True
                )
            )
        self._publishers.append(self._node.create_publisher(Image, self._topic, _QOS))
        return self

    def __exit__(self, *failure: object) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        for publisher in self._publishers:
            self._node.destroy_publisher(publisher)

    def check(self, rcl: Rcl, deadline_s: float) -> None:
        """Send messages one by one and compare what comes.

        Raises:
            DirectTakeError: says what is different.
        """
        (publisher,), (reference, subscription) = self._publishers, self._subscriptions
        direct = DirectTake(rcl, plain_memory, _FIRST_BYTES)
        for number, count in enumerate(_PIXELS):
            pixels = array.array('B', (index * 7 + number & 0xFF for index in range(count)))
            sent = serialize_message(Image(height=1, width=count, step=count, data=pixels))
            publisher.publish(sent)
            expected = _wait_for(RclpyTake(), reference, deadline_s)
            found = _wait_for(direct, subscription, deadline_s)
            if not direct.is_intact:
                raise DirectTakeError('rcl writes a message info of another size than expected')
            if bytes(found[0]) != expected[0] or expected[0][: len(sent)] != sent:
                raise DirectTakeError(f'a message of {len(sent)} bytes came as another')
            _compare_info(found[1], expected[1])


def _compare_info(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in ('source_timestamp', 'publication_sequence_number'):
        if found[key] != expected[key]:
            raise DirectTakeError(f'{key} is {found[key]}, rclpy has {expected[key]}')
    # Two subscriptions do not receive in the same instant.
    late_ns = found['received_timestamp'] - expected['received_timestamp']
    if abs(late_ns) > CHECK_TIMEOUT_S * _NS_PER_S:
        raise DirectTakeError(f'received_timestamp is {late_ns} ns from what rclpy has')
    gid = found['publisher_gid']
    if 'publisher_gid' not in expected:  # Jazzy's rclpy does not tell it
        if not any(gid):
            raise DirectTakeError('publisher_gid is empty')
    elif gid != bytes(expected['publisher_gid']['data']):
        raise DirectTakeError(f'publisher_gid is {gid.hex()}, which rclpy does not have')


def _wait_for(
    take: RclpyTake | DirectTake, subscription: Subscription, deadline_s: float
) -> Taken:
    while True:
        taken = take.newest(subscription)
        if taken is not None:
            return taken
        if time.monotonic() >= deadline_s:
            raise DirectTakeError('a message to ourselves did not arrive')
        time.sleep(_POLL_S)


def _ignore(message: object) -> None:
    """Stand in for a callback; the executor does not serve the subscription."""

"""Publishes the statuses on /diagnostics: once a second, and at once when a level changes.

A round takes about a millisecond, and longer with a GPU that is asked how it is. Just before a
tick, it would make that tick late; so while ticks come fast, a round waits for the end of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile

from pi05_ros.control.status import Status

PERIOD_S = 1.0
# Ticks that are further apart than this are not waited for.
_PATIENCE_S = 0.1


class DiagnosticsPublisher:
    """Thin: what there is to say comes from ``collect``.

    The timer runs on the steady clock, so that a stopped ``/clock`` is reported, not suffered;
    stamps are of the node's clock.

    Args:
        collect: returns the present statuses, always the same ones.
    Attributes:
        hardware_id: what the model runs on.
    """

    def __init__(self, node: Node, collect: Callable[[], list[Status]]) -> None:
        self.hardware_id = 'none'
        self._node = node
        self._collect = collect
        self._is_due = False
        self._next_tick_s = 0.0  # on the steady clock; the latest time that counts as in time
        self._publisher = node.create_publisher(
            DiagnosticArray, '/diagnostics', QoSProfile(depth=10)
        )
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = node.create_timer(PERIOD_S, self._on_timer, clock=steady)

    def publish(self) -> None:
        """Send every status now."""
        self._is_due = False
        message = diagnostics_message(
            self._collect(), self._node.get_fully_qualified_name(), self.hardware_id
        )
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(message)

    def tick_ended(self, period_s: float) -> None:
        """Send what waited for the end of a tick.

        Args:
            period_s: until the next tick.
        """
        if self._is_due:
            self.publish()
        patience_s = 2.0 * period_s  # a tick may be late
        self._next_tick_s = time.monotonic() + patience_s if patience_s <= _PATIENCE_S else 0.0

    def _on_timer(self) -> None:
        # A round that still waits is sent at last: no tick came since, the clock may stand still.
        if self._is_due or time.monotonic() >= self._next_tick_s:
            self.publish()
        else:
            self._is_due = True


def diagnostics_message(
    statuses: list[Status], node_name: str, hardware_id: str
) -> DiagnosticArray:
    """Return the message, without a stamp; names are ``<node with namespace>: <part>``."""
    prefix = node_name.lstrip('/')
    return DiagnosticArray(
        status=[
            DiagnosticStatus(
                name=f'{prefix}: {status.part}',
                level=bytes([status.level]),
                message=status.message,
                hardware_id=hardware_id,
                values=[KeyValue(key=key, value=value) for key, value in status.values],
            )
            for status in statuses
        ]
    )

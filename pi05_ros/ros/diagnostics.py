"""Publishes the statuses on /diagnostics: once a second, and at once when a level changes."""

from __future__ import annotations

from collections.abc import Callable

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile

from pi05_ros.control.status import Status

PERIOD_S = 1.0


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
        self._publisher = node.create_publisher(
            DiagnosticArray, '/diagnostics', QoSProfile(depth=10)
        )
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = node.create_timer(PERIOD_S, self.publish, clock=steady)

    def publish(self) -> None:
        """Send every status now."""
        message = diagnostics_message(
            self._collect(), self._node.get_fully_qualified_name(), self.hardware_id
        )
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(message)


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

"""The robot description (URDF), received once while the node configures."""

from __future__ import annotations

from rclpy.node import Node

from pi05_ros.control.topics import description_topic
from pi05_ros.policy.errors import UrdfError

from .subscriptions import InputSubscriptions


def receive_description(node: Node, timeout_s: float) -> bytes:
    """Wait for the latched robot description and return it as raw CDR.

    Raises:
        UrdfError: none came; says what the graph knows of it, and what to do.
    """
    topic = description_topic()
    received: list[bytes] = []

    def push(
        name: str, raw: bytes | memoryview, receive_ns: int, sequence: int | None = None
    ) -> None:
        received.append(bytes(raw))

    feeds = InputSubscriptions(node, (topic,), push)
    try:
        if not feeds.wait(lambda: bool(received), timeout_s):
            raise UrdfError(
                f'no robot description came in {timeout_s:g} s: {feeds.explain(topic.name)}; '
                'robot_state_publisher sends it; or set limits_source: robot_file'
            )
        return received[-1]
    finally:
        feeds.destroy()

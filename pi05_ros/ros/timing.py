"""The numbers of every tick as a message with named fields, which rqt_plot can plot."""

from __future__ import annotations

from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile

from pi05_ros.msg import StageTiming
from pi05_ros.policy.types import ActionChunk

from .outputs import time_message


class TimingOutput:
    """Publishes ``~/timing`` for every tick that acted."""

    def __init__(self, node: LifecycleNode, backend: str) -> None:
        self._node = node
        self._backend = backend
        self._publisher = node.create_lifecycle_publisher(
            StageTiming, '~/timing', QoSProfile(depth=10)
        )

    def publish(self, chunk: ActionChunk, tick_ms: float, sensor_to_action_ms: float) -> None:
        """Send the stage times of one chunk, the whole tick and the age of its action."""
        message = StageTiming(
            tick=chunk.tick,
            backend=self._backend,
            tick_ms=tick_ms,
            sensor_to_action_ms=sensor_to_action_ms,
            **chunk.times.as_dict(),
        )
        message.header.stamp = time_message(chunk.stamp_ns)
        self._publisher.publish(message)

    def destroy(self) -> None:
        """Remove the publisher."""
        self._node.destroy_lifecycle_publisher(self._publisher)

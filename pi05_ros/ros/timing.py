"""The numbers of every tick as a message with named fields, which rqt_plot can plot."""

from __future__ import annotations

from dataclasses import dataclass

from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile

from pi05_ros.msg import StageTiming
from pi05_ros.policy.types import ActionChunk

from .trajectory import time_message

# A tick that is published while a plotter is busy is to be plotted, too.
TIMING_QOS = QoSProfile(depth=100)


@dataclass(frozen=True)
class TickTimes:
    """Milliseconds of one tick that acted, beside the stages of its inference.

    Args:
        transport_ms: from the stamp of the oldest input to its arrival in this process.
        wait_ms: from there to the start of the tick.
        inputs_ms: taking, checking and decoding the newest messages.
        publish_ms: encoding and publishing the actions.
        tick_ms: the whole tick; inputs, inference and publishing are parts of it.
    """

    transport_ms: float
    wait_ms: float
    inputs_ms: float
    publish_ms: float
    tick_ms: float

    @property
    def sensor_to_action_ms(self) -> float:
        """From the stamp of the oldest input to the end of publishing.

        The age is taken at the start of the tick and the host's time added: a simulated ROS
        clock stands still while the tick runs.
        """
        return self.transport_ms + self.wait_ms + self.tick_ms


class TimingOutput:
    """Publishes ``~/timing`` for every tick that acted."""

    def __init__(self, node: LifecycleNode, backend: str) -> None:
        self._node = node
        self._backend = backend
        self._publisher = node.create_lifecycle_publisher(StageTiming, '~/timing', TIMING_QOS)

    def publish(self, chunk: ActionChunk, times: TickTimes) -> None:
        """Send where the time of one chunk went."""
        message = StageTiming(
            tick=chunk.tick,
            backend=self._backend,
            sensor_to_action_ms=times.sensor_to_action_ms,
            **vars(times),
            **chunk.times.as_dict(),
        )
        message.header.stamp = time_message(chunk.stamp_ns)
        self._publisher.publish(message)

    def destroy(self) -> None:
        """Remove the publisher."""
        self._node.destroy_lifecycle_publisher(self._publisher)

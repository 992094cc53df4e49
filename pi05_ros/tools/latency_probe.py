"""Watches one policy node for ``pi05-ros bench --ros``: its times, its counters, its actions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lifecycle_msgs.msg import Transition
from rcl_interfaces.srv import SetParameters
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.control.cdr import parse_header
from pi05_ros.control.parameter_file import NODE_NAME
from pi05_ros.msg import ActionChunk, StageTiming

from .latency import Arrival, decompose, spreads
from .latency_report import Window
from .monitor import Monitor, MonitorError
from .report import TIMING_FIELDS

STEP_PATIENCE_S = 10.0
# What was sent before the node stopped may still be under way.
SETTLE_S = 1.0
_MESSAGES = {
    'joint_trajectory': (JointTrajectory, 'joint_trajectory'),
    'action_chunk': (ActionChunk, f'/{NODE_NAME}/action_chunk'),
}
ACTION_INTERFACES = tuple(_MESSAGES)


@dataclass(frozen=True)
class Inputs:
    """What one configuration of the node is fed with; (height, width) in pixels."""

    size_px: tuple[int, int]
    transport: str

    def __str__(self) -> str:
        return f'{self.size_px[1]}x{self.size_px[0]} {self.transport}'


class LatencyProbe:
    """Drives the node's lifecycle and receives its actions, as a controller would.

    Args:
        node: of the caller, not spun by anybody else.
        action_interface: one of :data:`ACTION_INTERFACES`.
        prefix: what relative topics of the node were remapped to begin with.
    """

    def __init__(self, node: Node, action_interface: str, prefix: str) -> None:
        self.monitor = Monitor(node)
        self._node = node
        self._timings: list[Mapping[str, float]] = []
        self._arrivals: list[Arrival] = []
        kind, topic = _MESSAGES[action_interface]
        self._action_topic = topic if topic.startswith('/') else f'{prefix}/{topic}'
        deep = QoSProfile(depth=1000)
        # rclpy's types know only callbacks of deserialised messages without info.
        take: Any = self._take_action
        node.create_subscription(kind, self._action_topic, take, deep, raw=True)
        node.create_subscription(StageTiming, f'/{NODE_NAME}/timing', self._take_timing, deep)
        self._set_parameters: Any = node.create_client(
            SetParameters, f'/{NODE_NAME}/set_parameters'
        )

    def configure(self, patience_s: float) -> None:
        """Configure the node and find its actions.

        Raises:
            MonitorError: it refuses, or takes longer.
        """
        monitor = self.monitor
        # A call in the moment of discovery may lose its answer; who is heard has found us, too.
        if not monitor.wait(lambda: monitor.state == 'unconfigured', patience_s):
            raise MonitorError(f'the node was not heard within {patience_s:g} s')
        monitor.transition(Transition.TRANSITION_CONFIGURE, 'configure', patience_s)
        topics = (self._action_topic, f'/{NODE_NAME}/timing')
        found = monitor.wait(
            lambda: all(self._node.count_publishers(topic) for topic in topics), STEP_PATIENCE_S
        )
        if not found:
            raise MonitorError(f'no publisher on {" and ".join(topics)}')
        monitor.wait(lambda: False, SETTLE_S)

    def run(self, inputs: Inputs, rate_hz: float, seconds: float) -> Window:
        """Let the node act at a rate for some time; return what was measured.

        Raises:
            MonitorError: the node refuses, or does not answer.
        """
        monitor = self.monitor
        self._set_rate(rate_hz)
        self._timings, self._arrivals = [], []
        monitor.transition(Transition.TRANSITION_ACTIVATE, 'activate', STEP_PATIENCE_S)
        began_s = time.monotonic()
        monitor.wait(lambda: False, seconds)
        ended = monitor.state != 'active'
        lasted_s = time.monotonic() - began_s
        if ended:
            raise MonitorError(
                f'the node is {monitor.state}: {monitor.value("Lifecycle", "last error")}'
            )
        monitor.transition(Transition.TRANSITION_DEACTIVATE, 'deactivate', STEP_PATIENCE_S)
        # The diagnostics of the new state hold the last counts.
        monitor.wait(lambda: monitor.state == 'inactive', STEP_PATIENCE_S)
        counts = monitor.counts()
        if counts is None or monitor.state != 'inactive':
            raise MonitorError('the node told no counts when it was deactivated')
        monitor.wait(
            lambda: min(len(self._timings), len(self._arrivals)) >= counts.actions, SETTLE_S
        )
        columns = decompose(self._timings, self._arrivals)
        return Window(
            inputs=str(inputs),
            rate_hz=rate_hz,
            seconds=lasted_s,
            ticks=counts.ticks,
            actions=counts.actions,
            skips=dict(counts.skips),
            timings=len(self._timings),
            arrivals=len(self._arrivals),
            matched=len(columns['sensor to action']),
            spreads=spreads(columns),
            diagnostics={part: found.values for part, found in monitor.parts.items()},
        )

    def close(self) -> None:
        """Stop serving callbacks, and forget the node."""
        self.monitor.close()
        self._node.destroy_node()

    def _set_rate(self, rate_hz: float) -> None:
        request = SetParameters.Request(
            parameters=[Parameter('rate_hz', value=rate_hz).to_parameter_msg()]
        )
        future: Any = self._set_parameters.call_async(request)
        if not self.monitor.wait(future.done, STEP_PATIENCE_S):
            raise MonitorError(f'rate_hz was not set within {STEP_PATIENCE_S:g} s')
        (result,) = future.result().results
        if not result.successful:
            raise MonitorError(f'rate_hz {rate_hz:g}: {result.reason}')

    def _take_action(self, raw: bytes, info: Mapping[str, Any]) -> None:
        stamp_ns = parse_header(raw).stamp_ns
        if stamp_ns:  # the hold that ends a run has none: it is to be executed at once
            self._arrivals.append(Arrival(stamp_ns, info['received_timestamp']))

    def _take_timing(self, message: StageTiming) -> None:
        stamp = message.header.stamp
        fields = {name: getattr(message, name) for name in TIMING_FIELDS}
        self._timings.append({'stamp_ns': stamp.sec * 10**9 + stamp.nanosec, **fields})

"""Watches and drives one policy node from outside: through its topics and services only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile

from pi05_ros.control.parameter_file import NODE_NAME
from pi05_ros.model.errors import Pi05Error
from pi05_ros.msg import ActionChunk, StageTiming

from .report import TIMING_FIELDS, TimingLog

CHUNK_TOPIC = f'/{NODE_NAME}/dry_run/action_chunk'
_SPIN_S = 0.05


class MonitorError(Pi05Error):
    """The node did not answer, or refused what was asked of it."""


@dataclass(frozen=True)
class PartStatus:
    """The newest diagnostics of one part of the node; ``level`` is 0 OK, 1 WARN, 2 ERROR."""

    level: int
    message: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Counts:
    """What the node says it did since it was activated."""

    ticks: int
    actions: int
    skips: Mapping[str, int]


class Monitor:
    """Everything that one policy node tells.

    Args:
        node: a node of the caller, not spun by anybody else.
    Attributes:
        idle_calls: called often while waiting; one may raise to give up.
        log: the ``~/timing`` of every tick.
        parts: diagnostics part (``Inputs``, ...) -> its newest status.
        chunks: action chunks received on ``~/dry_run/action_chunk``.
    """

    def __init__(self, node: Node) -> None:
        self.idle_calls: list[Callable[[], None]] = []
        self.log = TimingLog()
        self.parts: dict[str, PartStatus] = {}
        self.chunks = 0
        self._node = node
        self._executor = SingleThreadedExecutor(context=node.context)
        self._executor.add_node(node)
        deep = QoSProfile(depth=100)
        node.create_subscription(StageTiming, f'/{NODE_NAME}/timing', self._on_timing, deep)
        node.create_subscription(ActionChunk, CHUNK_TOPIC, self._on_chunk, deep)
        node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, deep)
        self._change_state: Any = node.create_client(ChangeState, f'/{NODE_NAME}/change_state')

    def value(self, part: str, key: str) -> str:
        """Return one figure of the diagnostics; empty while it was not received."""
        status = self.parts.get(part)
        return status.values.get(key, '') if status else ''

    @property
    def hears_chunks(self) -> bool:
        """Whether the publisher of the action chunks was found."""
        return self._node.count_publishers(CHUNK_TOPIC) > 0

    @property
    def state(self) -> str:
        """The lifecycle state that the node reports."""
        return self.value('Lifecycle', 'state') or 'starting'

    def counts(self) -> Counts | None:
        """Return the counters of the Action status; None while the node has none."""
        ticks = self.value('Action', 'ticks')
        if not ticks:
            return None
        skips = {}
        for entry in self.value('Action', 'skipped by reason').split(', '):
            reason, found, count = entry.partition('=')
            if found:
                skips[reason] = int(count)
        return Counts(int(ticks), int(self.value('Action', 'actions')), skips)

    def wait(self, condition: Callable[[], bool], patience_s: float) -> bool:
        """Serve callbacks until the condition holds; False if it does not in time."""
        deadline_s = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > deadline_s:
                return False
            self._executor.spin_once(timeout_sec=_SPIN_S)
            for call in self.idle_calls:
                call()
        return True

    def transition(self, transition_id: int, name: str, patience_s: float) -> None:
        """Ask for a lifecycle transition and wait until it is done.

        Args:
            transition_id: one of lifecycle_msgs/Transition's constants.
        Raises:
            MonitorError: no answer in time, or the node refused, with its reason.
        """
        if not self.wait(self._change_state.service_is_ready, patience_s):
            raise MonitorError(f'{NODE_NAME} did not come up within {patience_s:g} s')
        request = ChangeState.Request()
        request.transition.id = transition_id
        future: Any = self._change_state.call_async(request)
        if not self.wait(future.done, patience_s):
            raise MonitorError(f'{name} did not end within {patience_s:g} s')
        if not future.result().success:
            # The reason follows on /diagnostics, which may take a moment longer than the answer.
            self.wait(lambda: self._last_error() != '', 2.0)
            raise MonitorError(self._last_error() or f'{name} failed without a reason')

    def close(self) -> None:
        """Stop serving callbacks."""
        self._executor.shutdown()

    def _last_error(self) -> str:
        error = self.value('Lifecycle', 'last error')
        return '' if error == 'none' else error

    def _on_timing(self, message: StageTiming) -> None:
        self.log.add({name: getattr(message, name) for name in TIMING_FIELDS})

    def _on_chunk(self, message: ActionChunk) -> None:
        self.chunks += 1

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            node_name, _, part = status.name.partition(': ')
            if node_name == NODE_NAME:
                values = {entry.key: entry.value for entry in status.values}
                self.parts[part] = PartStatus(status.level[0], status.message, values)

"""SIGINT and SIGTERM: stop in order, not in the middle of a command.

rclpy's own handlers shut the context down at once, so that nothing can be published any more,
least of all a last safe command. They are switched off; this one only notes the signal, and the
spin loop ends between two callbacks. While a node loads, which can take long, the signal also
breaks off the loading.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(BaseException):
    """Raised inside of :meth:`StopSignal.interruptible` when a stop signal comes."""


class StopSignal:
    """Remembers that the process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False

    def install(self) -> None:
        """Take over SIGINT and SIGTERM; call it from the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a stop signal break off the block with :class:`StopRequested`."""
        if self.requested:
            raise StopRequested
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise StopRequested

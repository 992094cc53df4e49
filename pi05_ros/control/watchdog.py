"""Notices on the steady clock that no action came in time, also while a tick does not return."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """A thread that calls ``on_stall`` once per stall: when it was not fed for ``timeout_s``.

    A thread, not a timer of the node: its timers wait for the tick that hangs.

    Args:
        on_stall: runs in this object's thread.
    """

    def __init__(self, timeout_s: float, on_stall: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._on_stall = on_stall
        self._changed = threading.Condition()
        self._due_s = time.monotonic() + timeout_s
        self._is_stalled = False
        self._is_stopped = False
        self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
        self._thread.start()

    def feed(self) -> None:
        """Tell that an action came."""
        with self._changed:
            self._due_s = time.monotonic() + self._timeout_s
            if self._is_stalled:
                self._is_stalled = False
                self._changed.notify()

    def stop(self) -> None:
        """End the thread; ``on_stall`` is not called after this returns."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        while self._wait_for_stall():
            self._on_stall()

    def _wait_for_stall(self) -> bool:
        """Return True at the beginning of a stall, False at the end of the watch."""
        with self._changed:
            while not self._is_stopped:
                left_s = self._due_s - time.monotonic()
                if self._is_stalled:
                    self._changed.wait()
                elif left_s > 0.0:
                    self._changed.wait(left_s)
                else:
                    self._is_stalled = True
                    return True
            return False

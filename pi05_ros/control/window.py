"""Sliding windows of durations and of arrivals, for the figures in the diagnostics."""

from __future__ import annotations

from collections import deque

import numpy as np

# What happened earlier says nothing about the present rate.
RATE_WINDOW_NS = 5_000_000_000


class Window:
    """The newest ``size`` values; NaN values (not measured) are left out."""

    def __init__(self, size: int = 200) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Append a value and drop the oldest one beyond the window."""
        if value == value:
            self._values.append(value)

    @property
    def last(self) -> float:
        """The newest value; NaN while empty."""
        return self._values[-1] if self._values else float('nan')

    def percentile(self, percent: float) -> float:
        """Return the given percentile of the window; NaN while empty."""
        if not self._values:
            return float('nan')
        return float(np.percentile(np.fromiter(self._values, dtype=np.float64), percent))


class RateMeter:
    """How often something happened lately, on the clock that its stamps are of."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, int | None]] = deque(maxlen=256)

    def add(self, now_ns: int, count: int | None = None) -> None:
        """Note one event.

        Args:
            count: a counter of all events, where only some of them are noted here: those in
                between are then counted, too.
        """
        self._events.append((now_ns, count))

    def clear(self) -> None:
        """Forget everything, as after a jump of the clock."""
        self._events.clear()

    def rate_hz(self, now_ns: int) -> float:
        """Return events per second; 0.0 when fewer than two happened lately."""
        while self._events and now_ns - self._events[0][0] > RATE_WINDOW_NS:
            self._events.popleft()
        if len(self._events) < 2:
            return 0.0
        (first_ns, first_count), (last_ns, last_count) = self._events[0], self._events[-1]
        if last_ns <= first_ns:
            return 0.0
        events = len(self._events) - 1
        if first_count is not None and last_count is not None:
            events = max(events, last_count - first_count)
        return events * 1e9 / (last_ns - first_ns)

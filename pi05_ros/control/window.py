"""Sliding windows of durations, for the percentiles in the diagnostics."""

from __future__ import annotations

from collections import deque

import numpy as np


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

    def clear(self) -> None:
        """Drop every value."""
        self._values.clear()

    @property
    def last(self) -> float:
        """The newest value; NaN while empty."""
        return self._values[-1] if self._values else float('nan')

    def percentile(self, percent: float) -> float:
        """Return the given percentile of the window; NaN while empty."""
        if not self._values:
            return float('nan')
        return float(np.percentile(np.fromiter(self._values, dtype=np.float64), percent))

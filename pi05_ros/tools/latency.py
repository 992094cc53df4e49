"""From a camera's stamp to the action in a subscriber: the parts of every action.

Pure: what the node said of each tick (``StageTiming``) and when each action arrived go in. The
parts of one action add up to its way from sensor to subscriber, without a gap.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .report import STAGE_LABELS

# In the order in which they pass.
PARTS = {
    'transport': "stamp, arrival in the node's middleware",
    'wait': 'arrival, start of the tick',
    'inputs': 'take, check, decode the newest messages',
    'policy': 'tokens, noise, units, limits',
    'model host': 'inference beside its stages',
    'model': 'stages of the model (GPU: its events)',
    'publish': 'encode and publish the action',
    'delivery': 'published, arrival at the subscriber',
}
SUMS = {
    'sensor to action': 'all parts: stamp to arrival of the action',
    'tick to publish': 'start of the tick to end of publishing',
    'beside model and wait': 'sensor to action without these two',
    'until published': 'of that, without the delivery',
}
PERCENTILES = (50, 95, 99)
_NS_PER_MS = 1e6


@dataclass(frozen=True)
class Arrival:
    """One action in the subscriber: its header stamp, and when the middleware received it."""

    stamp_ns: int
    received_ns: int


@dataclass(frozen=True)
class Spread:
    """One duration over many actions, in milliseconds; NaN where nothing was measured."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    mean_ms: float

    @classmethod
    def of(cls, values_ms: np.ndarray) -> Spread:
        """Sum up (n,) milliseconds."""
        if not len(values_ms):
            return cls(*[math.nan] * 5)
        p50, p95, p99 = np.percentile(values_ms, PERCENTILES)
        highest, mean = values_ms.max(), values_ms.mean()
        return cls(float(p50), float(p95), float(p99), float(highest), float(mean))


def decompose(
    timings: Sequence[Mapping[str, float]], arrivals: Sequence[Arrival]
) -> dict[str, np.ndarray]:
    """Return every name of :data:`PARTS` and :data:`SUMS` -> (n,) milliseconds.

    Args:
        timings: the durations of ``StageTiming`` per tick, and ``stamp_ns``, that of its header.
        arrivals: the actions; those without a timing are left out, and the other way round.
    """
    rows = [_parts(timing, arrival) for timing, arrival in match(timings, arrivals)]
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in PARTS}
    total = sum(columns.values(), np.zeros(len(rows)))
    around_tick = columns['transport'] + columns['wait'] + columns['delivery']
    columns['sensor to action'] = total
    columns['tick to publish'] = total - around_tick
    beside = total - columns['wait'] - columns['model']
    columns['beside model and wait'] = beside
    columns['until published'] = beside - columns['delivery']
    return columns


def match(
    timings: Sequence[Mapping[str, float]], arrivals: Sequence[Arrival]
) -> list[tuple[Mapping[str, float], Arrival]]:
    """Pair each tick with its action.

    Both carry the stamp of the oldest input. Two ticks that used the same image share it; theirs
    are told apart by time: an action arrives near the end of its publishing.
    """
    by_stamp: dict[int, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        by_stamp[arrival.stamp_ns].append(arrival)
    pairs = []
    for timing in timings:
        candidates = by_stamp[int(timing['stamp_ns'])]
        if candidates:
            nearest = min(candidates, key=lambda arrival: abs(_delivery_ms(timing, arrival)))  # noqa: B023
            candidates.remove(nearest)
            pairs.append((timing, nearest))
    return pairs


def spreads(columns: Mapping[str, np.ndarray]) -> dict[str, Spread]:
    """Return the spread of every part and sum."""
    return {name: Spread.of(values) for name, values in columns.items()}


def _parts(timing: Mapping[str, float], arrival: Arrival) -> dict[str, float]:
    stages = [timing[name] for name in STAGE_LABELS]
    model_ms = math.fsum(value for value in stages if not math.isnan(value))
    inputs_ms, publish_ms, total_ms = (
        timing[name] for name in ('inputs_ms', 'publish_ms', 'total_ms')
    )
    return {
        'transport': timing['transport_ms'],
        'wait': timing['wait_ms'],
        'inputs': inputs_ms,
        'policy': timing['tick_ms'] - inputs_ms - total_ms - publish_ms,
        'model host': total_ms - model_ms,
        'model': model_ms,
        'publish': publish_ms,
        'delivery': _delivery_ms(timing, arrival),
    }


def _delivery_ms(timing: Mapping[str, float], arrival: Arrival) -> float:
    # Whole nanoseconds: a time of day in floating point has no digits left for a microsecond.
    way_ns = arrival.received_ns - int(timing['stamp_ns'])
    return way_ns / _NS_PER_MS - timing['sensor_to_action_ms']

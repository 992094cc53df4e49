"""Where the time went, as figures and as a table: stage, ms, percent of the tick.

Pure: the input is one mapping of ``StageTiming`` fields per tick, from wherever it came.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.table import Table

# StageTiming fields that together make up ``total_ms``, with the name that people read.
STAGE_LABELS = {
    'h2d_ms': 'host to device',
    'preprocess_ms': 'preprocess',
    'vision_ms': 'vision',
    'prefill_ms': 'KV prefill',
    'denoise_ms': 'denoise',
    'd2h_ms': 'device to host',
}
OTHER = 'other'
# The way from the sensor to the tick, and the tick beside its inference.
AROUND_FIELDS = ('transport_ms', 'wait_ms', 'inputs_ms', 'publish_ms')
TIMING_FIELDS = (*STAGE_LABELS, 'total_ms', *AROUND_FIELDS, 'tick_ms', 'sensor_to_action_ms')


@dataclass(frozen=True)
class Spread:
    """One duration over many ticks, in milliseconds; NaN where nothing was measured."""

    last_ms: float
    mean_ms: float
    std_ms: float
    p50_ms: float
    p95_ms: float
    max_ms: float
    count: int

    @classmethod
    def of(cls, values_ms: Sequence[float]) -> Spread:
        """Sum up ``values_ms``; NaN values (not measured) are left out."""
        values = np.asarray([v for v in values_ms if not math.isnan(v)], dtype=np.float64)
        if not values.size:
            nan = math.nan
            return cls(nan, nan, nan, nan, nan, nan, 0)
        p50, p95 = np.percentile(values, (50, 95))
        return cls(
            last_ms=float(values[-1]),
            mean_ms=float(values.mean()),
            std_ms=float(values.std()),
            p50_ms=float(p50),
            p95_ms=float(p95),
            max_ms=float(values.max()),
            count=int(values.size),
        )


@dataclass(frozen=True)
class StageRow:
    """One stage: its spread, and its share of the mean inference in percent."""

    label: str
    spread: Spread
    percent: float


class TimingLog:
    """Every tick's ``StageTiming`` fields, in order."""

    def __init__(self) -> None:
        self._ticks: list[Mapping[str, float]] = []

    def __len__(self) -> int:
        return len(self._ticks)

    def add(self, timing: Mapping[str, float]) -> None:
        """Add one tick: every name of :data:`TIMING_FIELDS`, in milliseconds."""
        self._ticks.append({name: float(timing[name]) for name in TIMING_FIELDS})

    def column(self, name: str) -> list[float]:
        """Return one field over all ticks."""
        return [tick[name] for tick in self._ticks]

    def spread(self, name: str) -> Spread:
        """Return the spread of one field."""
        return Spread.of(self.column(name))

    def other_ms(self) -> list[float]:
        """Return, per tick, what is in ``total_ms`` but in no stage."""
        return [
            max(tick['total_ms'] - math.fsum(_measured(tick)), 0.0)
            for tick in self._ticks
            if not math.isnan(tick['total_ms'])
        ]

    def rows(self) -> list[StageRow]:
        """Return the stages in the order in which they pass, and the rest of the inference."""
        total_ms = self.spread('total_ms').mean_ms
        spreads = [(label, self.spread(name)) for name, label in STAGE_LABELS.items()]
        spreads.append((OTHER, Spread.of(self.other_ms())))
        return [
            StageRow(label, spread, 100 * spread.mean_ms / total_ms) for label, spread in spreads
        ]


@dataclass(frozen=True)
class RunReport:
    """One run of the node: what ran, how often it acted and where the time went.

    Args:
        subject: what ran, e.g. checkpoint, backend and device, as (name, value) pairs.
        rate_hz: control ticks per second that were asked for.
        action_hz: actions per second that were published.
        received: how many of the actions arrived at the one who watches.
        skips: reason -> ticks that published no action because of it.
    """

    subject: Mapping[str, str]
    rate_hz: float
    action_hz: float
    ticks: int
    actions: int
    received: int
    skips: Mapping[str, int]
    log: TimingLog = field(repr=False)

    @property
    def possible_hz(self) -> float:
        """Inferences per second if one followed the other at once."""
        return 1000 / self.log.spread('total_ms').mean_ms


def stage_table(log: TimingLog) -> Table:
    """Return the stages as a table: last, mean, P50, P95 in ms and percent."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column('stage')
    for name in ('last ms', 'mean ms', 'P50 ms', 'P95 ms', '%'):
        table.add_column(name, justify='right', no_wrap=True)
    for row in log.rows():
        table.add_row(row.label, *_cells(row.spread), _figure(row.percent, 1))
    table.add_section()
    table.add_row('inference', *_cells(log.spread('total_ms')), '100.0', style='bold')
    table.add_row('whole tick', *_cells(log.spread('tick_ms')), '')
    table.add_row('sensor to action', *_cells(log.spread('sensor_to_action_ms')), '')
    return table


def summary_lines(report: RunReport) -> list[str]:
    """Return the figures around the table, one line each."""
    total = report.log.spread('total_ms')
    lines = [', '.join(f'{name} {value}' for name, value in report.subject.items() if value)]
    lines.append(
        f'inference mean / std / P50 / P95: {total.mean_ms:.2f} / {total.std_ms:.2f} / '
        f'{total.p50_ms:.2f} / {total.p95_ms:.2f} ms over {total.count}, '
        f'at most {report.possible_hz:.1f} Hz'
    )
    lines.append(
        f'{report.ticks} ticks, {report.actions} actions ({report.received} received), '
        f'{report.action_hz:.1f} Hz of {report.rate_hz:g} Hz; '
        f'skipped: {format_counts(report.skips)}'
    )
    return lines


def format_counts(counts: Mapping[str, int]) -> str:
    """Return ``reason 3, reason 1``, the most frequent first; ``none`` if all are zero."""
    present = Counter({name: count for name, count in counts.items() if count})
    return ', '.join(f'{name} {count}' for name, count in present.most_common()) or 'none'


def _measured(tick: Mapping[str, float]) -> list[float]:
    return [tick[name] for name in STAGE_LABELS if not math.isnan(tick[name])]


def _cells(spread: Spread) -> list[str]:
    values = (spread.last_ms, spread.mean_ms, spread.p50_ms, spread.p95_ms)
    return [_figure(value, 2) for value in values]


def _figure(value: float, decimals: int) -> str:
    return '-' if math.isnan(value) else f'{value:.{decimals}f}'

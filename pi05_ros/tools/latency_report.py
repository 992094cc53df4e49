"""Latencies of the running node as tables, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .latency import PARTS, SUMS, Spread
from .report import format_counts

# A rate is held if fewer of its ticks than this share did not act.
MAX_SKIP_SHARE = 0.01
_COLOURS = {
    'transport': '#2a7f9e',
    'wait': '#dfe3e8',
    'inputs': '#4fb0a5',
    'policy': '#8f9bab',
    'model host': '#e08e36',
    'model': '#7a5aa6',
    'publish': '#c0392b',
    'delivery': '#d9a5a0',
}
_INK = '#20262e'
_FAINT = '#6b7580'


@dataclass(frozen=True)
class Window:
    """The node acting at one rate on one kind of input, for a while.

    Args:
        inputs: what it was fed with, in words.
        seconds: how long it was active.
        ticks, actions, skips: by the node's own count; reason -> ticks.
        timings, arrivals: how many ``StageTiming`` and actions came here.
        matched: actions whose parts are known; ``spreads`` is over them.
        diagnostics: part -> what the node said on ``/diagnostics`` at the end.
    """

    inputs: str
    rate_hz: float
    seconds: float
    ticks: int
    actions: int
    skips: Mapping[str, int]
    timings: int
    arrivals: int
    matched: int
    spreads: Mapping[str, Spread]
    diagnostics: Mapping[str, Mapping[str, str]]

    @property
    def skip_share(self) -> float:
        """Share of the ticks that did not act; 1 where there was no tick."""
        return sum(self.skips.values()) / self.ticks if self.ticks else 1.0

    @property
    def holds(self) -> bool:
        """Tell whether so few ticks were skipped that the rate counts as held."""
        return self.skip_share < MAX_SKIP_SHARE

    def problems(self) -> list[str]:
        """Say which counts contradict each other."""
        found, skipped = [], sum(self.skips.values())
        if self.ticks != self.actions + skipped:
            found.append(f'{self.ticks} ticks are not {self.actions} actions and {skipped} skips')
        if self.matched != self.actions:
            found.append(
                f'of {self.actions} actions {self.arrivals} arrived here, with {self.timings} '
                f'timings; {self.matched} are measured'
            )
        return found

    def line(self) -> str:
        """Return counts and the figures that matter, as one line."""
        total, beside = self.spreads['sensor to action'], self.spreads['beside model and wait']
        return (
            f'{self.inputs}, {self.rate_hz:g} Hz for {self.seconds:.1f} s: {self.ticks} ticks, '
            f'{self.actions} actions, {100 * self.skip_share:.2f} % skipped '
            f'({format_counts(self.skips)}); sensor to action {total.p50_ms:.2f} / '
            f'{total.p99_ms:.2f} ms, beside model and wait {beside.p50_ms:.2f} / '
            f'{beside.p99_ms:.2f} ms (p50 / p99)'
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {'skip_share': self.skip_share, 'problems': self.problems()}


@dataclass(frozen=True)
class Failure:
    """A configuration of the node that could not be measured, or not to its end."""

    inputs: str
    reason: str


def parts_table(window: Window) -> Table:
    """Return every part and sum of one window with its percentiles."""
    title = f'{window.inputs}, {window.rate_hz:g} Hz, {window.matched} actions (ms)'
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify='left')
    table.add_column('part', no_wrap=True)
    for name in ('P50', 'P95', 'P99', 'max'):
        table.add_column(name, justify='right', no_wrap=True)
    table.add_column('from, to', overflow='fold')
    for names in (PARTS, SUMS):
        for name, meaning in names.items():
            spread = window.spreads[name]
            figures = (spread.p50_ms, spread.p95_ms, spread.p99_ms, spread.max_ms)
            table.add_row(name, *map(_figure, figures), meaning)
        table.add_section()
    return table


def highest_rates(windows: Sequence[Window]) -> dict[str, float | None]:
    """Return inputs -> the highest rate that was held, None where none was."""
    held: dict[str, list[float]] = {window.inputs: [] for window in windows}
    for window in windows:
        if window.holds:
            held[window.inputs].append(window.rate_hz)
    return {inputs: max(rates, default=None) for inputs, rates in held.items()}


def write_json(
    path: Path, subject: Mapping[str, str], windows: Sequence[Window], failures: Sequence[Failure]
) -> None:
    """Write everything measured so far; the file is whole at any moment.

    Raises:
        OSError: the file cannot be written.
    """
    document = {
        'subject': dict(subject),
        'parts': PARTS,
        'sums': SUMS,
        'windows': [window.as_json() for window in windows],
        'failures': [asdict(failure) for failure in failures],
        'highest_rate_hz': highest_rates(windows),
    }
    partial = path.with_name(path.name + '.part')
    partial.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')
    partial.replace(path)


def save_plot(subject: Mapping[str, str], windows: Sequence[Window], path: Path) -> None:
    """Draw a stacked bar of the mean parts per window, with P50 and P99 of the whole way.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [window for window in windows if window.matched]
    height = 2.1 + 0.55 * max(len(measured), 1)
    figure = Figure(figsize=(11, height), dpi=130, facecolor='white')
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.38 / height, 'From camera to action', size=16, weight='bold',
                color=_INK)  # fmt: skip
    line = ' · '.join(value for value in subject.values() if value)
    figure.text(0.02, 1 - 0.68 / height, line, size=9.5, color=_FAINT)
    axes = figure.add_axes((0.17, 0.75 / height, 0.8, 1 - 1.85 / height))
    for place, window in enumerate(measured):
        _draw_bar(axes, place, window)
    axes.set_yticks(
        range(len(measured)), [f'{window.inputs}\n{window.rate_hz:g} Hz' for window in measured],
        size=9.5,
    )  # fmt: skip
    axes.invert_yaxis()
    longest_ms = max((w.spreads['sensor to action'].mean_ms for w in measured), default=1.0)
    axes.set_xlim(0, 1.22 * longest_ms)
    axes.set_xlabel('mean of every part (ms); at the end P50 / P99 of sensor to action', size=9.5,
                    color=_FAINT)  # fmt: skip
    for side in ('top', 'right', 'left'):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis='y', length=0)
    if measured:
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1.0), ncols=len(PARTS), frameon=False,
                    fontsize=9, handlelength=1.0, columnspacing=1.2)  # fmt: skip
    figure.savefig(path, format='png')


def _draw_bar(axes: Any, place: int, window: Window) -> None:
    left = 0.0
    for name in PARTS:
        width = max(window.spreads[name].mean_ms, 0.0)
        axes.barh(place, width, left=left, color=_COLOURS[name], edgecolor='white', height=0.62,
                  linewidth=0.5, label=name if place == 0 else None)  # fmt: skip
        left += width
    total = window.spreads['sensor to action']
    axes.text(left, place, f'  {total.p50_ms:.1f} / {total.p99_ms:.1f}', va='center', size=9.5,
              color=_INK)  # fmt: skip


def _figure(value_ms: float) -> str:
    return '-' if math.isnan(value_ms) else f'{value_ms:.3f}'

"""Pictures of several replays of one recording: their actions over time, their stage times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .action_log import ActionLog
from .plots import COLOURS
from .report import TimingLog

# Told apart also with a colour deficiency, and in grey.
_LINES = ('#20262e', '#d1495b', '#2a7f9e', '#e08e36', '#7a5aa6', '#5b8c5a')
_STYLES = ('-', '--', ':', '-.', (0, (5, 1)), (0, (1, 1)))
_INK, _FAINT = '#20262e', '#6b7580'
_COLUMNS = 2


def save_traces(logs: Mapping[str, ActionLog], path: Path) -> None:
    """Draw the first row of every chunk, which a robot executes first, and the distance to the
    first of ``logs``, for each dimension over time.

    Raises:
        OSError: the file cannot be written.
    """
    reference = next(iter(logs.values()))
    count = len(reference.names)
    rows = math.ceil(count / _COLUMNS)
    figure = _figure((13, 1.1 + 2.3 * rows))
    grid = figure.add_gridspec(
        rows, _COLUMNS, left=0.075, right=0.985, hspace=0.5, wspace=0.18,
        top=1 - 0.95 / (1.1 + 2.3 * rows), bottom=0.5 / (1.1 + 2.3 * rows),
    )  # fmt: skip
    handles: list[Any] = []
    for index in range(count):
        place = grid[index // _COLUMNS, index % _COLUMNS]
        upper, lower = place.subgridspec(2, 1, height_ratios=(2, 1), hspace=0.12).subplots(
            sharex=True
        )
        handles = _draw_dimension(upper, lower, logs, index)
        if index // _COLUMNS == rows - 1:
            lower.set_xlabel('time since the first tick (s)', size=9, color=_FAINT)
    figure.suptitle(
        'First action of every chunk (above), absolute difference to the reference (below)',
        x=0.075, y=0.995, ha='left', va='top', size=12, color=_INK,
    )  # fmt: skip
    figure.legend(
        handles, _labels(list(logs)), ncols=len(logs), loc='upper left', frameon=False,
        bbox_to_anchor=(0.068, 1 - 0.28 / (1.1 + 2.3 * rows)), fontsize=9.5,
    )  # fmt: skip
    figure.savefig(path, format='png')


def save_stages(timings: Mapping[str, TimingLog], path: Path) -> None:
    """Draw the mean time of each stage as one bar per replay.

    Raises:
        OSError: the file cannot be written.
    """
    figure = _figure((11, 1.5 + 0.62 * len(timings)))
    axes = figure.add_axes((0.19, 0.62 / (1.5 + 0.62 * len(timings)), 0.74, 0.55))
    seen: dict[str, Any] = {}
    widest = max(log.spread('total_ms').mean_ms for log in timings.values())
    for place, log in enumerate(timings.values()):
        left = 0.0
        for row in log.rows():
            width = row.spread.mean_ms
            if math.isnan(width) or width <= 0.0:
                continue
            bar = axes.barh(
                place, width, left=left, color=COLOURS[row.label], edgecolor='white', height=0.66
            )
            if width > 0.002 * widest:
                seen.setdefault(row.label, bar)
            left += width
        spread = log.spread('total_ms')
        axes.text(
            left + 0.01 * widest, place, f'{spread.mean_ms:.1f} ms', va='center', size=9.5,
            color=_INK,
        )  # fmt: skip
    axes.set_yticks(range(len(timings)), _labels(list(timings)), size=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * widest)
    axes.set_xlabel('mean inference (ms)', size=9.5, color=_FAINT)
    _quiet(axes)
    axes.legend(
        list(seen.values()), list(seen), ncols=len(seen), loc='lower left', frameon=False,
        bbox_to_anchor=(-0.01, 1.0), fontsize=9.5,
    )  # fmt: skip
    figure.savefig(path, format='png', bbox_inches='tight', pad_inches=0.15)


def _draw_dimension(
    upper: Any, lower: Any, logs: Mapping[str, ActionLog], index: int
) -> list[Any]:
    """Draw one dimension of every replay; return the lines for the legend."""
    reference = next(iter(logs.values()))
    start_ns = int(reference.times_ns[0])
    handles = []
    for number, log in enumerate(logs.values()):
        style = {
            'color': _LINES[number % len(_LINES)],
            'linestyle': _STYLES[number % len(_STYLES)],
            'marker': '.',  # an action between two skipped ticks has no line
            'markersize': 3,
        }
        seconds = (log.times_ns - start_ns) / 1e9
        width = 1.9 if number == 0 else 1.4
        handles += upper.plot(
            *with_gaps(log.ticks, seconds, log.actions[:, 0, index]), linewidth=width, **style
        )
        _, ours, theirs = np.intersect1d(
            reference.ticks, log.ticks, assume_unique=True, return_indices=True
        )
        if number > 0:
            error = np.abs(log.actions[theirs, 0, index] - reference.actions[ours, 0, index])
            lower.plot(
                *with_gaps(log.ticks[theirs], seconds[theirs], error), linewidth=1.2, **style
            )
    unit = '' if reference.units[index] == '1' else f' ({reference.units[index]})'
    upper.set_title(f'{reference.names[index]}{unit}', loc='left', size=10, color=_INK)
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        _quiet(axes)
        # matplotlib's own format would put a power of ten over the axes above.
        axes.yaxis.set_major_formatter(lambda value, place: f'{value:g}')
        axes.grid(axis='y', color='#e6e9ed', linewidth=0.8)
    upper.tick_params(labelbottom=False)
    lower.locator_params(axis='y', nbins=3)
    return handles


def with_gaps(
    ticks: np.ndarray, seconds: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return times and values with a NaN where ticks were skipped, so that no line spans them."""
    breaks = np.flatnonzero(np.diff(ticks) > 1) + 1
    return np.insert(seconds, breaks, np.nan), np.insert(values, breaks, np.nan)


def _labels(names: list[str]) -> list[str]:
    return [f'{name} (reference)' if place == 0 else name for place, name in enumerate(names)]


def _figure(size_in: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_in, dpi=120, facecolor='white')
    FigureCanvasAgg(figure)
    return figure


def _quiet(axes: Any) -> None:
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    for side in ('left', 'bottom'):
        axes.spines[side].set_color('#b7c0cc')
    axes.tick_params(colors=_FAINT, labelsize=8.5)

"""The stage times of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .report import OTHER, STAGE_LABELS, RunReport, StageRow

# One colour per stage, in every picture of the project; the three model stages stand out.
COLOURS = {
    'host to device': '#b7c0cc',
    'preprocess': '#8f9bab',
    'vision': '#2a7f9e',
    'KV prefill': '#e08e36',
    'denoise': '#7a5aa6',
    'device to host': '#b7c0cc',
    OTHER: '#dfe3e8',
}
_INK = '#20262e'
_FAINT = '#6b7580'
# A segment narrower than this share of the bar has no room for its figure.
_MIN_LABELLED_PERCENT = 6.0


def save_stage_plot(report: RunReport, path: Path) -> None:
    """Draw where one inference goes, the stages with P50 and P95, and every tick over time.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), dpi=130, facecolor='white')
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 2, height_ratios=(1, 2.6), width_ratios=(1.15, 1),
        left=0.12, right=0.97, top=0.80, bottom=0.10, hspace=0.55, wspace=0.24,
    )  # fmt: skip
    total = report.log.spread('total_ms')
    figure.text(0.03, 0.945, 'π0.5: one inference per control tick', size=16, weight='bold',
                color=_INK)  # fmt: skip
    subject = ' · '.join(f'{name} {value}' for name, value in report.subject.items() if value)
    figure.text(0.03, 0.905, subject, size=9.5, color=_FAINT)
    figure.text(
        0.03, 0.87,
        f'{total.count} inferences, mean {total.mean_ms:.1f} ms, P50 {total.p50_ms:.1f}, '
        f'P95 {total.p95_ms:.1f}; {report.action_hz:.1f} actions/s of {report.rate_hz:g} asked',
        size=9.5, color=_FAINT,
    )  # fmt: skip
    rows = [row for row in report.log.rows() if not math.isnan(row.spread.mean_ms)]
    _draw_share(figure.add_subplot(grid[0, :]), rows)
    _draw_stages(figure.add_subplot(grid[1, 0]), rows)
    _draw_ticks(figure.add_subplot(grid[1, 1]), report)
    figure.savefig(path, format='png')


def _draw_share(axes: Any, rows: list[StageRow]) -> None:
    """Draw one stacked bar: the mean inference, stage by stage."""
    left = 0.0
    for row in rows:
        width = row.spread.mean_ms
        axes.barh(0, width, left=left, color=COLOURS[row.label], edgecolor='white', height=0.7)
        if row.percent >= _MIN_LABELLED_PERCENT:
            ink = 'white' if row.label in ('vision', 'KV prefill', 'denoise') else _INK
            axes.text(left + width / 2, 0, f'{row.label}\n{width:.1f} ms, {row.percent:.0f} %',
                      ha='center', va='center', size=9, color=ink)  # fmt: skip
        left += width
    axes.set_xlim(0, left)
    axes.set_yticks([])
    axes.set_title('mean inference (ms)', loc='left', size=10, color=_INK)
    _quiet(axes)


def _draw_stages(axes: Any, rows: list[StageRow]) -> None:
    """Draw each stage's P50 as a bar and its P95 as a mark."""
    widest = max(row.spread.p95_ms for row in rows)
    for place, row in enumerate(rows):
        spread = row.spread
        axes.barh(place, spread.p50_ms, color=COLOURS[row.label], height=0.62)
        axes.plot([spread.p95_ms] * 2, [place - 0.31, place + 0.31], color=_INK, linewidth=1.6)
        axes.text(spread.p95_ms + 0.015 * widest, place, f'{spread.p50_ms:.2f} / '
                  f'{spread.p95_ms:.2f}', va='center', size=9, color=_INK)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.label for row in rows], size=9.5)
    axes.set_xlim(0, widest * 1.34)
    axes.invert_yaxis()
    axes.set_title('stages (ms): P50 as a bar / P95 as a mark', loc='left', size=10, color=_INK)
    _quiet(axes)
    axes.tick_params(axis='y', length=0)


def _draw_ticks(axes: Any, report: RunReport) -> None:
    """Draw every tick's stages, stacked, against the tick period."""
    from matplotlib.ticker import MaxNLocator

    columns = [report.log.column(name) for name in STAGE_LABELS]
    columns = [[0.0 if math.isnan(v) else v for v in column] for column in columns]
    columns.append(report.log.other_ms())
    colours = [COLOURS[label] for label in (*STAGE_LABELS.values(), OTHER)]
    axes.stackplot(range(len(report.log)), columns, colors=colours)
    totals = report.log.column('total_ms')
    period_ms = 1000 / report.rate_hz
    top = max(totals)
    if period_ms < 3 * top:
        axes.axhline(period_ms, color='#c0392b', linewidth=1.2, linestyle='--')
        axes.text(len(totals) - 1, period_ms, f'period {period_ms:.0f} ms', ha='right',
                  va='center', size=8.5, color='#c0392b',
                  bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1.5})  # fmt: skip
        top = max(top, period_ms)
    axes.set_xlim(0, max(len(totals) - 1, 1))
    axes.set_ylim(0, top * 1.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_title('every inference (ms) by number', loc='left', size=10, color=_INK)
    _quiet(axes)


def _quiet(axes: Any) -> None:
    """Leave only the axis that carries figures."""
    for side in ('top', 'right', 'left'):
        axes.spines[side].set_visible(False)
    axes.spines['bottom'].set_color(_FAINT)
    axes.tick_params(colors=_FAINT, labelsize=9)
    for label in axes.get_yticklabels():
        label.set_color(_INK)

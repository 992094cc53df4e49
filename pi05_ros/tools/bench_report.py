"""A benchmark's result as tables on the terminal and as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pi05_ros.engine.pipeline import STAGES

from .bench import CaseResult, Report, Sweep

_PARTS = ('h2d', 'preprocess', *STAGES, 'd2h', 'total')
_COLOURS = {
    'h2d': '#b7c0cc',
    'preprocess': '#8f9bab',
    'vision': '#2a7f9e',
    'prefill': '#e08e36',
    'denoise': '#7a5aa6',
    'd2h': '#b7c0cc',
}


def print_report(report: Report, console: Console) -> None:
    """Print everything that was measured."""
    for name, value in report.subject.items():
        console.print(f'{name:>15}  {value}', highlight=False, markup=False)
    ceilings = report.ceilings
    console.print(
        f'{"measured here":>15}  copy {ceilings.bytes_per_s / 1e9:,.0f} GB/s, '
        f'matmul {ceilings.flops_per_s / 1e9:,.0f} GFLOP/s',
        highlight=False,
    )
    for build in report.builds:
        console.print(
            f'{"start-up":>15}  {build.start_up_s:.1f} s for {build.views} views, peak memory '
            f'{build.peak_memory_bytes / 1e9:.2f} GB, stages {build.stage_backends}',
            highlight=False,
        )
    for result in report.cases:
        console.print(_case_table(result))
        console.print(_case_line(result), highlight=False, markup=False)
    for sweep in report.sweeps:
        console.print(_sweep_line(sweep), highlight=False, markup=False)


def _case_table(result: CaseResult) -> Table:
    table = Table(title=str(result.case), box=box.SIMPLE_HEAD, title_justify='left')
    table.add_column('stage')
    for column in ('p50 ms', 'p95 ms', 'p99 ms', 'floor ms', 'times floor', 'oracle p50 ms'):
        table.add_column(column, justify='right')
    for part in _PARTS:
        times = result.timing.percentiles_ms[part]
        floor = result.floors_ms.get(part)
        oracle = result.oracle.p50_ms(part) if result.oracle else None
        table.add_row(
            part,
            *(f'{times[p]:.3f}' for p in (50, 95, 99)),
            '' if floor is None else f'{floor:.3f}',
            '' if floor is None else f'{times[50] / floor:.2f}',
            '' if oracle is None else f'{oracle:.2f}',
            style='bold' if part == 'total' else '',
        )
    return table


def _case_line(result: CaseResult) -> str:
    times = result.timing.percentiles_ms['total']
    parts = [
        f'p99/p50 {times[99] / times[50]:.3f}',
        f'prompt change {result.prompt_change_ms:+.3f} ms',
    ]
    if result.oracle:
        parts.append(f'{result.oracle.p50_ms("total") / times[50]:.1f} times the oracle')
    if result.cosine is not None:
        parts.append(f'cosine to the oracle {result.cosine:.6f}')
    return '  ' + ', '.join(parts)


def _sweep_line(sweep: Sweep) -> str:
    points = ', '.join(f'{steps}: {value:.3f}' for steps, value in sweep.total_ms.items())
    line = sweep.line
    return (
        f'{sweep.case.views} views, {sweep.case.prompt_tokens} tokens, total ms by steps: {points}'
        f'\n  = {line.fixed_ms:.3f} + {line.per_step_ms:.3f} per step, '
        f'off by at most {line.max_error_percent:.1f} %'
    )


def save_plot(report: Report, path: Path) -> None:
    """Draw the stages of each case as a stacked bar, with the floor of the three model stages.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.8 + 0.9 * len(report.cases)), dpi=130, facecolor='white')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, result in enumerate(report.cases):
        _draw_bar(axes, row, result)
    axes.set_yticks(range(len(report.cases)), [str(result.case) for result in report.cases])
    axes.invert_yaxis()
    axes.set_xlabel('ms, median')
    axes.spines[['top', 'right']].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(
        unique.values(), unique.keys(), frameon=False, ncols=5, loc='upper center',
        bbox_to_anchor=(0.4, -0.13 - 0.2 / len(report.cases)),
    )  # fmt: skip
    axes.set_xlim(0, 1.12 * max(result.timing.p50_ms('total') for result in report.cases))
    subject = report.subject
    axes.set_title(
        f'π0.5 on {subject["device"]}: {subject["backend"]}, {subject["precision"]}', loc='left'
    )
    figure.tight_layout()
    figure.savefig(path, format='png')


def _draw_bar(axes: Any, row: int, result: CaseResult) -> None:
    left = 0.0
    for part in _PARTS[:-1]:
        width = result.timing.p50_ms(part)
        label = part if part in STAGES else 'copies, resize'
        axes.barh(row, width, left=left, height=0.55, color=_COLOURS[part], label=label)
        if part in STAGES:
            axes.text(left + width / 2, row, f'{width:.2f}', ha='center', va='center', size=8,
                      color='white')  # fmt: skip
        left += width
    total, floor = result.timing.p50_ms('total'), result.floors_ms['total']
    axes.plot([floor, floor], [row - 0.38, row + 0.38], color='black', lw=1.5, label='floor')
    axes.text(total, row, f'  {total:.2f} ms', va='center', size=9, weight='bold')

"""A benchmark's result as tables on the terminal and as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pi05_ros.engine.pipeline import STAGES

from .bench import CaseResult, Report, Sweep
from .bench_rate import AtRate, GpuLoad
from .measure import PERCENTILES, Timing

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
        for found in result.at_rates:
            if found.timing is not None:
                console.print(_rate_table(result, found.rate_hz, found.timing))
            console.print(_rate_line(found), highlight=False, markup=False)
    for sweep in report.sweeps:
        console.print(_sweep_line(sweep), highlight=False, markup=False)


def _case_table(result: CaseResult) -> Table:
    oracle = result.oracle
    beside = {part: f'{oracle.p50_ms(part):.2f}' for part in _PARTS} if oracle else {}
    title = str(result.case)
    return _stage_table(title, result.timing, result.floors_ms, 'oracle p50 ms', beside)


def _rate_table(result: CaseResult, rate_hz: float, timing: Timing) -> Table:
    beside = {part: f'{result.timing.p50_ms(part):.3f}' for part in _PARTS}
    title = f'{result.case}, at {rate_hz:g} Hz'
    return _stage_table(title, timing, result.floors_ms, 'back to back p50 ms', beside)


def _stage_table(
    title: str,
    timing: Timing,
    floors_ms: dict[str, float],
    last_column: str,
    beside: dict[str, str],
) -> Table:
    """Return the times of every stage; the last column is what to compare them with."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify='left')
    table.add_column('stage')
    for column in (*(f'p{p} ms' for p in PERCENTILES), 'floor ms', 'times floor', last_column):
        table.add_column(column, justify='right')
    for part in _PARTS:
        times, floor = timing.percentiles_ms[part], floors_ms.get(part)
        table.add_row(
            part,
            *(f'{times[p]:.3f}' for p in PERCENTILES),
            '' if floor is None else f'{floor:.3f}',
            '' if floor is None else f'{times[50] / floor:.2f}',
            beside.get(part, ''),
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
    return '  ' + ', '.join(parts + _load_parts(result.gpu))


def _rate_line(found: AtRate) -> str:
    if found.timing is None:
        return f'  not measured at {found.rate_hz:g} Hz: {found.refused}'
    times = found.timing.percentiles_ms['total']
    parts = [
        f'p99/p50 {times[99] / times[50]:.3f}',
        f'{found.missed} of {found.timing.calls + found.missed} slots missed',
    ]
    return '  ' + ', '.join(parts + _load_parts(found.gpu))


def _load_parts(load: GpuLoad | None) -> list[str]:
    """Return what to print of a GPU under calls; a figure that it does not tell is left out."""
    if load is None:
        return []
    parts = []
    if load.sm_clock_mhz is not None:
        lowest = f', at least {load.lowest_sm_clock_mhz:.0f}'
        parts.append(f'SM clock {load.sm_clock_mhz:.0f} MHz{lowest}')
    if load.power_w is not None:
        limit = '' if load.power_limit_w is None else f' of {load.power_limit_w:.0f}'
        parts.append(f'power {load.power_w:.0f}{limit} W')
    return [*parts, f'throttled by {", ".join(load.throttle_reasons) or "nothing"}']


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

    bars = _bars(report)
    figure = Figure(figsize=(10, 1.8 + 0.9 * len(bars)), dpi=130, facecolor='white')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, (_, timing, floor_ms) in enumerate(bars):
        _draw_bar(axes, row, timing, floor_ms)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel('ms, median')
    axes.spines[['top', 'right']].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(
        unique.values(), unique.keys(), frameon=False, ncols=5, loc='upper center',
        bbox_to_anchor=(0.4, -0.13 - 0.2 / len(bars)),
    )  # fmt: skip
    axes.set_xlim(0, 1.12 * max(timing.p50_ms('total') for _, timing, _ in bars))
    subject = report.subject
    axes.set_title(
        f'π0.5 on {subject["device"]}: {subject["backend"]}, {subject["precision"]}', loc='left'
    )
    figure.tight_layout()
    figure.savefig(path, format='png')


def _bars(report: Report) -> list[tuple[str, Timing, float]]:
    """Return label, times and floor of each bar: a case back to back, then at its rates."""
    bars = []
    for result in report.cases:
        floor_ms = result.floors_ms['total']
        bars.append((str(result.case), result.timing, floor_ms))
        bars += [
            (f'at {found.rate_hz:g} Hz', found.timing, floor_ms)
            for found in result.at_rates
            if found.timing is not None
        ]
    return bars


def _draw_bar(axes: Any, row: int, timing: Timing, floor_ms: float) -> None:
    left = 0.0
    for part in _PARTS[:-1]:
        width = timing.p50_ms(part)
        label = part if part in STAGES else 'copies, resize'
        axes.barh(row, width, left=left, height=0.55, color=_COLOURS[part], label=label)
        if part in STAGES:
            axes.text(left + width / 2, row, f'{width:.2f}', ha='center', va='center', size=8,
                      color='white')  # fmt: skip
        left += width
    total = timing.p50_ms('total')
    axes.plot([floor_ms, floor_ms], [row - 0.38, row + 0.38], color='black', lw=1.5, label='floor')
    axes.text(total, row, f'  {total:.2f} ms', va='center', size=9, weight='bold')

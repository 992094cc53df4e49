"""The result of ``pi05-ros bench-inputs`` as tables."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .input_measure import PARTS, PERCENTS, WAYS, InputsReport

_HEADS = {50: 'p50', 95: 'p95', 99: 'p99', 100: 'max'}


def print_inputs_report(report: InputsReport, console: Console) -> None:
    """Print everything that was measured."""
    for name, value in report.subject.items():
        console.print(f'{name:>12}  {value}', highlight=False, markup=False)
    console.print(_times_table(report))
    console.print(_messages_table(report))
    rss_mib = report.rss_mib
    first, half, last = rss_mib[0], rss_mib[len(rss_mib) // 2], rss_mib[-1]
    console.print(
        f'memory of this process {first:.1f} MiB at the start, {half:.1f} at half time, '
        f'{last:.1f} at the end',
        highlight=False,
    )
    skipped = ', '.join(f'{why}={count}' for why, count in report.skipped.items())
    console.print(f'ticks that did not act: {skipped or "none"}', highlight=False)


def _times_table(report: InputsReport) -> Table:
    ticks = {way: len(report.times_ms[way][PARTS[0]]) for way in WAYS}
    title = 'host time of a tick in ms: ' + ', '.join(f'{ticks[way]} {way}' for way in WAYS)
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify='left')
    table.add_column('part', no_wrap=True)
    for way in WAYS:
        table.add_column(f'{way} {_HEADS[PERCENTS[0]]}', justify='right')
        for percent in PERCENTS[1:]:
            table.add_column(_HEADS[percent], justify='right')
    for part in PARTS:
        values = [report.percentile_ms(way, part, p) for way in WAYS for p in PERCENTS]
        table.add_row(part, *(f'{value:.3f}' for value in values))
    return table


def _messages_table(report: InputsReport) -> Table:
    table = Table(title='messages', box=box.SIMPLE_HEAD, title_justify='left')
    for head in ('input', 'sent', 'taken by a tick', 'lost by the middleware'):
        table.add_column(head, justify='left' if head == 'input' else 'right')
    for name, count in report.received.items():
        lost = 'unknown' if count.lost is None else str(count.lost)
        table.add_row(name, str(count.sent), str(count.taken), lost)
    return table

"""What the demo shows while it runs, and the report that remains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pi05_ros.engine.pipeline import STAGES

from .report import RunReport, format_counts, stage_table

if TYPE_CHECKING:
    from .monitor import Monitor

_LEVEL_STYLES = ('green', 'yellow', 'red')
_AGE, _RATE, _LOST, _SIZE = ' age (ms)', ' rate (Hz)', ' lost', ' size (px)'


class DemoView:
    """Draws what a monitor knows."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def draw(self) -> RenderableType:
        """Return the whole picture for a terminal."""
        monitor = self._monitor
        parts: list[RenderableType] = [self._headline()]
        if len(monitor.log):
            parts.append(stage_table(monitor.log))
        return Group(*parts, self._inputs_table(), self._counters())

    def line(self) -> str:
        """Return the same as one line, for pipes and logs."""
        monitor = self._monitor
        counts = monitor.counts()
        if counts is None or not len(monitor.log):
            status = monitor.parts.get('Lifecycle')
            return status.message if status else 'waiting for the node'
        total, age = monitor.log.spread('total_ms'), monitor.log.spread('sensor_to_action_ms')
        return (
            f'{monitor.state}: {counts.ticks} ticks, {counts.actions} actions, '
            f'inference P50 {total.p50_ms:.1f} P95 {total.p95_ms:.1f} ms, '
            f'sensor to action P50 {age.p50_ms:.1f} ms, skipped: {format_counts(counts.skips)}'
        )

    def report(self, active_s: float) -> RunReport:
        """Return what remains of a run that was active for ``active_s`` seconds."""
        monitor = self._monitor
        counts = monitor.counts()
        actions = counts.actions if counts else 0
        return RunReport(
            subject=self._subject(),
            rate_hz=float(monitor.value('Action', 'Target frequency (Hz)') or 'nan'),
            action_hz=actions / active_s,
            ticks=counts.ticks if counts else 0,
            actions=actions,
            received=monitor.chunks,
            skips=dict(counts.skips) if counts else {},
            log=monitor.log,
        )

    def _subject(self) -> dict[str, str]:
        value = self._monitor.value
        backends = [value('Pipeline', f'{stage} backend') for stage in STAGES]
        return {
            'robot': value('Model', 'robot'),
            'backend': '/'.join(dict.fromkeys(filter(None, backends))),
            'device': value('Model', 'device'),
            'precision': value('Model', 'precision'),
            'Euler steps': value('Model', 'num_steps'),
        }

    def _headline(self) -> Text:
        text = Text.assemble(('pi05_policy ', 'bold'), (self._monitor.state, 'bold green'))
        status = self._monitor.parts.get('Lifecycle')
        if status and status.message != self._monitor.state:
            text.append(f'  {status.message}', _LEVEL_STYLES[min(status.level, 2)])
        facts = ' · '.join(filter(None, self._subject().values()))
        return text.append(f'   {facts}', 'dim')

    def _inputs_table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column('input')
        for title in ('age ms', 'rate Hz', 'lost', 'size px'):
            table.add_column(title, justify='right')
        status = self._monitor.parts.get('Inputs')
        values = status.values if status else {}
        for key in values:
            if key.endswith(_AGE):
                name = key.removesuffix(_AGE)
                figures = [values.get(name + suffix, '') for suffix in (_AGE, _RATE, _LOST, _SIZE)]
                table.add_row(name, *figures)
        return table

    def _counters(self) -> Text:
        counts = self._monitor.counts()
        if counts is None:
            return Text('')
        status = self._monitor.parts['Action']
        task = self._monitor.value('Model', 'task')
        return Text.assemble(
            f'ticks {counts.ticks}   actions {counts.actions}   '
            f'skipped: {format_counts(counts.skips)}   ',
            ('Ctrl-C ends it\n', 'dim'),
            (status.message, _LEVEL_STYLES[min(status.level, 2)]),
            f'\ntask: {task}',
        )

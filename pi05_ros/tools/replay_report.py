"""What a replay found: as plain JSON data and as tables."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from pi05_ros import __version__
from pi05_ros.control.reasons import Reason, Skip
from pi05_ros.model.errors import Pi05Error

from .compare import Comparison, dimension_table, summary
from .replayer import Replay, TickCost
from .report import Spread, TimingLog, stage_table

# Facts of the policy that say what the actions depend on; paths differ from machine to machine.
_ORIGIN_FACTS = (
    'checkpoint_sha256', 'robot', 'normalization', 'vision_backend', 'prefill_backend',
    'denoise_backend', 'precision', 'device', 'horizon',
)  # fmt: skip
_COST_LABELS = {
    'read_ms': 'read the bag',
    'push_ms': 'take messages',
    'gate_ms': 'gates, decode',
    'policy_ms': 'policy without model',
    'other_ms': 'other',
}


class ReportError(Pi05Error):
    """The report cannot be written."""


def origin_of(replay: Replay) -> dict[str, Any]:
    """Return what determined the actions, besides the recording."""
    facts = replay.policy_info or {}
    return {
        'version': __version__,
        'settings': asdict(replay.settings) | {'checkpoint': ''},
        'relative_topics': {topic.name: topic.topic for topic in replay.topics.values()},
        'topics': {topic.name: name for name, topic in replay.topics.items()},
        'model': {name: facts[name] for name in _ORIGIN_FACTS if name in facts},
    }


def timing_log(replay: Replay) -> TimingLog:
    """Return the stage times of the ticks that acted.

    ``sensor_to_action_ms`` is the age of the oldest input at the tick plus what the tick took
    here, as the clock of a replay stands still meanwhile. Nothing is published.
    """
    log = TimingLog()
    for result in replay.results:
        if result.chunk is not None:
            tick_ms = result.gate_ms + result.act_ms
            times = result.chunk.times.as_dict() | {
                'transport_ms': result.transport_ms,
                'wait_ms': result.wait_ms,
                'inputs_ms': result.gate_ms,
                'publish_ms': float('nan'),
                'tick_ms': tick_ms,
                'sensor_to_action_ms': result.observation_age_ms + tick_ms,
            }
            log.add(times)
    return log


def skip_counts(replay: Replay) -> Counter[Reason]:
    """Return reason -> ticks that published no action because of it."""
    return Counter(r.skip.reason for r in replay.results if r.skip is not None)


def first_skips(replay: Replay) -> dict[Reason, tuple[int, Skip]]:
    """Return reason -> the first tick that was skipped for it, and what it said."""
    first: dict[Reason, tuple[int, Skip]] = {}
    for result in replay.results:
        if result.skip is not None:
            first.setdefault(result.skip.reason, (result.tick, result.skip))
    return first


def as_dict(
    bag: Path,
    replay: Replay | None,
    comparison: Comparison | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """Return the report as plain JSON data; ``replay`` is None if it could not even begin."""
    content: dict[str, Any] = {'version': __version__, 'bag': str(bag), 'error': error}
    if replay is None:
        return content | {'ticks': 0, 'actions': 0, 'skips': {}}
    log = replay.action_log({})
    acted = [r for r in replay.results if r.chunk is not None]
    return without_nan(
        content
        | {
            'settings': asdict(replay.settings),
            'topics': {topic.name: name for name, topic in replay.topics.items()},
            'messages': replay.messages,
            'model': replay.policy_info,
            'first_tick_ns': replay.results[0].now_ns if replay.results else None,
            'period_ns': replay.settings.period_ns,
            'ticks': len(replay.results),
            'actions': len(acted),
            'actions_sha256': log.sha256,
            'skips': {str(reason): count for reason, count in skip_counts(replay).items()},
            'first_skips': {
                str(reason): {'tick': tick, 'detail': skip.detail}
                for reason, (tick, skip) in first_skips(replay).items()
            },
            'stages': _stages(timing_log(replay)),
            'overhead_per_tick_ms': asdict(overhead(replay.costs)),
            'overhead_parts_mean_ms': cost_means(replay.costs),
            'comparison': comparison.as_dict() if comparison else None,
        }
    )


def overhead(costs: list[TickCost]) -> Spread:
    """Return the spread of what a tick cost outside of the model."""
    return Spread.of([cost.overhead_ms for cost in costs])


def cost_means(costs: list[TickCost]) -> dict[str, float]:
    """Return the mean of each part of the overhead, by its field name."""
    if not costs:
        return dict.fromkeys(_COST_LABELS, math.nan)
    return {name: float(np.mean([getattr(cost, name) for cost in costs])) for name in _COST_LABELS}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the report as JSON.

    Raises:
        ReportError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    except OSError as error:
        raise ReportError(f'cannot write {path}: {error}') from error


def show(console: Console, replay: Replay, comparison: Comparison | None) -> None:
    """Print the tables and figures."""
    if replay.policy_info:
        console.print(_subject(replay), markup=False, highlight=False, soft_wrap=True)
    log = timing_log(replay)
    if len(log):
        console.print(stage_table(log))
    console.print(_tick_table(replay))
    if replay.costs:
        console.print(_overhead_line(replay.costs), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f'SHA-256 of the actions: {replay.action_log({}).sha256}',
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if comparison is not None:
        console.print(dimension_table(comparison, 'against the reference'))
        for line in summary(comparison):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _subject(replay: Replay) -> str:
    facts, settings = replay.policy_info or {}, replay.settings
    stages = [facts[f'{stage}_backend'] for stage in ('vision', 'prefill', 'denoise')]
    backend = '/'.join(dict.fromkeys(stages))
    return (
        f'robot {facts["robot"]}, {backend} {facts["precision"]} on {facts["device"]}, '
        f'{settings.num_steps} steps, seed {settings.seed}, {settings.rate_hz:g} Hz, '
        f'checkpoint {facts["checkpoint_sha256"][:12]}'
    )


def _tick_table(replay: Replay) -> Table:
    """Return ticks by what came of them."""
    skips = skip_counts(replay)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column('ticks')
    table.add_column('count', justify='right', no_wrap=True)
    table.add_column('the first one', overflow='fold')
    table.add_row('action', str(len(replay.results) - skips.total()), '')
    first = first_skips(replay)
    for reason, count in skips.most_common():
        tick, skip = first[reason]
        table.add_row(f'skip: {reason}', str(count), f'tick {tick}: {skip.detail}', style='yellow')
    table.add_section()
    table.add_row('all', str(len(replay.results)), '', style='bold')
    return table


def _overhead_line(costs: list[TickCost]) -> str:
    spread = overhead(costs)
    parts = ', '.join(
        f'{_COST_LABELS[name]} {mean_ms:.2f}' for name, mean_ms in cost_means(costs).items()
    )
    return (
        f'outside of the model: mean {spread.mean_ms:.2f} ms per tick, P50 {spread.p50_ms:.2f}, '
        f'P95 {spread.p95_ms:.2f}, max {spread.max_ms:.2f} ({parts})'
    )


def _stages(log: TimingLog) -> dict[str, Any]:
    rows = {row.label: asdict(row.spread) for row in log.rows()}
    return rows | {
        'inference': asdict(log.spread('total_ms')),
        'tick': asdict(log.spread('tick_ms')),
        'sensor to action': asdict(log.spread('sensor_to_action_ms')),
    }


def without_nan(value: Any) -> Any:
    """Replace what JSON lacks, NaN and infinity, by None."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

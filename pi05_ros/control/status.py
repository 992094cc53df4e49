"""What the diagnostics say, as plain data: names, levels, texts and figures.

Keys carry their unit, come always in the same order, and figures have fixed decimals, so that a
table of them stays still and a plot finds them. No ROS types here: the node turns a
:class:`Status` into a message, and tests compare its text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .core import ControlCore
from .gates import NS_PER_MS, check_age, check_skew, skew_of
from .inputs import Inputs
from .parameters import NodeSettings
from .statistics import TickStatistics
from .window import Window

OK, WARN, ERROR = 0, 1, 2
LEVEL_NAMES = ('OK', 'WARN', 'ERROR')
UNKNOWN = 'n/a'
# Begins the text on how images are taken where they should be taken directly, but are not.
SLOW_TAKE = 'rclpy: '
# Parts that exist only while the node is configured; the last ones need the loaded model.
MODEL_PARTS = ('Pipeline', 'Action', 'Model', 'GPU')
CONFIGURED_PARTS = ('Inputs', *MODEL_PARTS)


@dataclass(frozen=True)
class Status:
    """One diagnostic_msgs/DiagnosticStatus; ``values`` in the order in which they are shown."""

    part: str
    level: int
    message: str
    values: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """Return all of it as lines, as tests and the terminal show it."""
        lines = [f'[{LEVEL_NAMES[self.level]}] {self.part}: {self.message}']
        return '\n'.join(lines + [f'  {key}: {value}' for key, value in self.values])


@dataclass(frozen=True)
class LifecycleView:
    """State of the node, and what it runs in.

    Args:
        progress: what a running transition is doing; empty outside of one.
        clock: one word on the clock that drives the ticks.
        clock_stopped: it did not move since the last report, so nothing ticks.
    """

    state: str
    progress: str
    last_error: str
    clock: str = 'system'
    clock_stopped: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputView:
    """Where actions go.

    Args:
        topic: after namespace and remapping.
        listeners: how many subscribe to it.
        limits_from: which limit comes from where, see :mod:`pi05_ros.policy.limits`.
    """

    topic: str
    listeners: int
    limits_from: str


def lifecycle_status(view: LifecycleView) -> Status:
    """Say in which state the node is, and why the last transition failed."""
    level, message = OK, view.state
    if view.progress:
        level, message = WARN, f'{view.state}: {view.progress}'
    elif view.last_error:
        level, message = ERROR, f'{view.state}; {view.last_error}'
    elif view.clock_stopped and view.state == 'active':
        level, message = WARN, 'active, but the ROS clock stands still: nothing ticks'
    values = (
        ('state', view.state),
        ('last error', view.last_error or 'none'),
        ('clock', view.clock),
        *view.environment.items(),
    )
    return Status('Lifecycle', level, message, values)


def not_configured(part: str) -> Status:
    """Stand in for a part that exists only while the node is configured."""
    return Status(part, OK, 'not configured')


def inputs_status(
    inputs: Inputs,
    settings: NodeSettings,
    now_ns: int,
    lost: Mapping[str, int | None],
    faults: Mapping[str, str],
    image_take: str,
) -> Status:
    """Say how fresh every input is.

    Args:
        lost: input -> messages that the middleware lost; None where it cannot tell.
        faults: input -> why its publisher does not match; only those that do not.
        image_take: how images come from the middleware; the slow way is :data:`SLOW_TAKE` and why.
    """
    problems: list[tuple[int, str]] = [(ERROR, fault) for fault in faults.values()]
    missing = inputs.missing()
    if missing is not None:
        problems.append((ERROR, missing.detail))
    values: list[tuple[str, str]] = []
    for name, slot in inputs.sensors.items():
        camera = inputs.cameras.get(name)
        _, limit_ms = settings.age_limit(name)
        age_ms = math.nan
        if not slot.is_empty:
            stamp_ns = slot.stamp_ns(settings.stamp_source)
            age_ms = (now_ns - stamp_ns) / NS_PER_MS
            aged = check_age(slot.title, stamp_ns, now_ns, limit_ms, settings.max_future_ms)
            if slot.fault is not None:
                problems.append((ERROR, f'{slot.title}: {slot.fault}'))
            elif aged is not None:
                problems.append((WARN, aged.detail))
        values += [
            (f'{name} age (ms)', _number(age_ms)),
            (f'{name} rate (Hz)', _number(slot.rate_hz(now_ns))),
            (f'{name} lost', _count(lost.get(name))),
        ]
        if camera is not None:
            values += [
                (f'{name} encoding', camera.encoding or UNKNOWN),
                (f'{name} size (px)', _size(camera.size_px)),
            ]
    stamps = {
        slot.title: slot.stamp_ns(settings.stamp_source)
        for slot in inputs.cameras.values()
        if not slot.is_empty
    }
    # A camera that stopped is further and further behind the others: its age says it already.
    skewed = None if problems else check_skew(stamps, settings.max_skew_ms)
    if image_take.startswith(SLOW_TAKE):
        problems.append((WARN, f'images are taken the slow way, through {image_take}'))
    for skip in (skewed, inputs.prompt_skip()):
        if skip is not None:
            problems.append((WARN, skip.detail))
    values += [
        ('camera skew (ms)', _number(skew_of(stamps) if len(stamps) > 1 else math.nan)),
        ('task from', inputs.prompt.source),
        ('image take', image_take),
    ]
    return Status('Inputs', *_worst(problems, 'all inputs fresh'), tuple(values))


def pipeline_status(
    statistics: TickStatistics,
    settings: NodeSettings,
    stage_backends: Mapping[str, str],
    device: str,
) -> Status:
    """Say how long each stage takes, and what ran it.

    Args:
        device: of the model, e.g. 'cuda:0'.
    """
    period_ms = settings.period_ns / NS_PER_MS
    tick = statistics.tick
    backends = '/'.join(dict.fromkeys(stage_backends.values()))
    level, message = OK, f'backend {backends}'
    if settings.backend == 'auto' and backends == 'eager' and device.startswith('cuda'):
        level = WARN
        message += ', slow, though there is a GPU: the log of configuring says why'
    if len(tick):
        message = f'tick {tick.percentile(50):.1f} ms of {period_ms:.1f} ms; {message}'
        # First what is wrong: a monitor shows the beginning of the line.
        if tick.percentile(50) > period_ms:
            level, message = ERROR, f'ticks take longer than the period: {message}'
        elif tick.percentile(99) > period_ms:
            level, message = WARN, f'1 % of the ticks take longer than the period: {message}'
    values = [('backend asked', settings.backend)]
    values += [(f'{stage} backend', backend) for stage, backend in stage_backends.items()]
    for name, window in (*statistics.stages.items(), ('tick', tick)):
        values += _window(name, window, (50, 95))
    return Status('Pipeline', level, message, tuple(values))


def aim(settings: NodeSettings, topic: str) -> str:
    """Say where actions go, and whether they move a robot."""
    return f'{"dry run" if settings.dry_run else "acting"} on {topic}'


def action_status(
    core: ControlCore,
    statistics: TickStatistics,
    output: OutputView,
    is_active: bool,
    now_ns: int,
    clock_stopped: bool = False,
) -> Status:
    """Say whether actions go out, how old they are, and what kept ticks from acting.

    Args:
        clock_stopped: nothing ticks, so what the last ticks did says nothing of the present.
    """
    settings, counters, last = core.settings, core.counters, core.last
    topic = output.topic
    skip = last.skip if last is not None else None
    level, message = OK, aim(settings, topic) if is_active else 'not active'
    if is_active and clock_stopped:
        level, message = WARN, 'no ticks: the ROS clock stands still'
    elif is_active and core.health:
        level, acted = core.health, sum(core.recent)
        why = str(skip) if skip is not None else 'overrun: ticks take longer than the period'
        message = f'{acted} of the last {len(core.recent)} ticks acted; {why}'
    if is_active and not output.listeners and not settings.dry_run:
        level, message = max(level, WARN), f'{message}; nobody subscribes to {topic}'
    by_reason = ', '.join(f'{reason}={count}' for reason, count in sorted(counters.skips.items()))
    clipped = ', '.join(f'{name}={count}' for name, count in sorted(core.guard.clips.items()))
    values = [
        ('Target frequency (Hz)', _number(settings.rate_hz)),
        ('Actual frequency (Hz)', _number(core.action_rate.rate_hz(now_ns))),
        *_window('sensor to action', statistics.sensor_to_action, (50, 95, 99)),
        ('ticks', str(counters.ticks)),
        ('actions', str(counters.actions)),
        ('skipped', str(sum(counters.skips.values()))),
        ('skipped by reason', by_reason or 'none'),
        ('reused images', str(counters.reused_images)),
        ('clock jumps', str(counters.clock_jumps)),
        ('clipped by joint', clipped or 'none'),
        ('limits from', output.limits_from),
        ('watchdog trips', str(counters.watchdog_trips)),
        ('emergency stop', 'latched' if core.estopped else 'off'),
        ('topic', topic),
        ('dry run', str(settings.dry_run).lower()),
    ]
    return Status('Action', level, message, tuple(values))


def model_status(facts: Mapping[str, str], settings: NodeSettings, prompt: str) -> Status:
    """Say what was loaded.

    Args:
        facts: of the policy; the backends are left to the Pipeline status.
    """
    shown = {key: fact for key, fact in facts.items() if not key.endswith('_backend')}
    shown['num_steps'] = str(settings.num_steps)  # the present one, not that of loading
    values = (*shown.items(), ('seed', str(settings.seed)), ('task', prompt or 'none'))
    return Status('Model', OK, facts.get('checkpoint', 'loaded'), values)


def _worst(problems: list[tuple[int, str]], fine: str) -> tuple[int, str]:
    """Return the highest level, and every problem in one line, the worst first."""
    if not problems:
        return OK, fine
    ordered = sorted(problems, key=lambda problem: -problem[0])
    return ordered[0][0], '; '.join(text for _, text in ordered)


def _window(name: str, window: Window, percents: tuple[int, ...]) -> list[tuple[str, str]]:
    values = [(f'{name} last (ms)', _number(window.last, 2))]
    for percent in percents:
        values.append((f'{name} p{percent} (ms)', _number(window.percentile(percent), 2)))
    return values


def _number(value: float, decimals: int = 1) -> str:
    return f'{value:.{decimals}f}' if math.isfinite(value) else UNKNOWN


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def _size(size_px: tuple[int, int] | None) -> str:
    return UNKNOWN if size_px is None else f'{size_px[1]}x{size_px[0]}'

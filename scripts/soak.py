#!/usr/bin/env python3
"""Let the node run for long on the looped bag, and judge whether it stays as it was.

    python scripts/soak.py                                   30 minutes at 20 Hz
    python scripts/soak.py --minutes 3 --json soak.json      shorter, with every sample
    python scripts/soak.py --checkpoint DIR --ros-args -p backend:=cuda

Bag player and node are processes of their own, as in ``pi05-ros demo``; the node runs dry. Every
10 s this notes memory, threads and open files of the node's process and the node's own counters.
Exit status 1 if a criterion fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich import box
from rich.console import Console
from rich.table import Table

from pi05_ros.model.errors import Pi05Error
from pi05_ros.tools.demo import (
    LOAD_PATIENCE_S,
    STEP_PATIENCE_S,
    make_tiny_checkpoint,
    private_network,
    start_node,
    start_player,
)
from pi05_ros.tools.processes import Child, Children, ProcessError, children, wait_until
from pi05_ros.tools.report import format_counts
from pi05_ros.tools.terminal import make_console, output_file, positive

SAMPLE_S = 10.0
WARM_UP_S = 120.0
MAX_GROWTH = 0.02
STOP_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Sample:
    """The node at one moment, ``at_s`` after it was activated."""

    at_s: float
    rss_mib: float
    threads: int
    files: int
    ticks: int
    actions: int
    skips: dict[str, int]
    lost: int

    @property
    def is_consistent(self) -> bool:
        """Whether every tick is an action or a skip with a reason."""
        return self.ticks == self.actions + sum(self.skips.values())


@dataclass(frozen=True)
class Verdict:
    """One criterion, what was found, and whether that is enough."""

    criterion: str
    found: str
    passed: bool


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=positive, default=30.0)
    parser.add_argument('--rate-hz', type=positive, default=20.0)
    parser.add_argument('--checkpoint', metavar='DIR', help='default: a tiny one is made')
    parser.add_argument('--out', type=Path, default=Path('soak_output'), help='logs go here')
    parser.add_argument(
        '--json', type=output_file, metavar='FILE', help='write samples and verdicts'
    )
    parser.add_argument(
        '--ros-args', nargs=argparse.REMAINDER, default=[], help='more, for the node'
    )
    return parser.parse_args()


def main() -> int:
    """Run and judge; return the exit status."""
    args = parse_arguments()
    console = make_console()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.update(private_network())
    try:
        with children() as group:
            start_player(group, out)
            checkpoint = args.checkpoint or make_tiny_checkpoint(out, console)
            rate = ['-p', f'rate_hz:={args.rate_hz}']
            node = start_node(group, Path(checkpoint).resolve(), out, [*rate, *args.ros_args])
            soak = Soak(args.minutes * 60, args.rate_hz, console, group, node)
            soak.run()
            verdicts = [*soak.judge(), judge_end(node)]
    except KeyboardInterrupt:
        console.print('interrupted; player and node are stopped')
        return 130
    except Pi05Error as error:
        console.print(f'soak failed: {error}', markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(verdict_table(verdicts))
    if args.json:
        found = {'samples': soak.samples, 'verdicts': verdicts}
        text = {name: [asdict(item) for item in items] for name, items in found.items()}
        args.json.write_text(json.dumps(text, indent=1) + '\n', encoding='utf-8')
    return 0 if all(verdict.passed for verdict in verdicts) else 1


class Soak:
    """Drives the node from configure to deactivate and takes the samples.

    Attributes:
        samples: one every :data:`SAMPLE_S`, and a last one after the node stopped acting.
    """

    def __init__(
        self, seconds: float, rate_hz: float, console: Console, group: Children, node: Child
    ) -> None:
        self.samples: list[Sample] = []
        self._seconds = seconds
        self._rate_hz = rate_hz
        self._console = console
        self._group = group
        self._node = node
        self._active_s = 0.0

    def run(self) -> None:
        """Configure, activate, sample, deactivate.

        Raises:
            Pi05Error: the node refused, or a process ended.
        """
        import rclpy
        from lifecycle_msgs.msg import Transition
        from rclpy.signals import SignalHandlerOptions

        from pi05_ros.tools.monitor import Monitor

        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        try:
            monitor = Monitor(rclpy.create_node('pi05_soak', enable_rosout=False))
            monitor.idle_calls.append(self._check_children)
            monitor.transition(Transition.TRANSITION_CONFIGURE, 'configure', LOAD_PATIENCE_S)
            monitor.transition(Transition.TRANSITION_ACTIVATE, 'activate', STEP_PATIENCE_S)
            began_s = time.monotonic()
            while (at_s := time.monotonic() - began_s) < self._seconds:
                monitor.wait(lambda: False, min(SAMPLE_S, self._seconds - at_s))
                self._sample(monitor, time.monotonic() - began_s)
            monitor.transition(Transition.TRANSITION_DEACTIVATE, 'deactivate', STEP_PATIENCE_S)
            self._active_s = time.monotonic() - began_s
            monitor.wait(lambda: monitor.state == 'inactive', STEP_PATIENCE_S)
            self._sample(monitor, self._active_s)
            monitor.close()
        finally:
            rclpy.try_shutdown()

    def judge(self) -> list[Verdict]:
        """Return every criterion on the samples."""
        return judge(self.samples, self._rate_hz, self._active_s)

    def _sample(self, monitor: Any, at_s: float) -> None:
        counts = monitor.counts()
        inputs = monitor.parts.get('Inputs')
        if counts is None or inputs is None:
            return
        lost = [inputs.values[key] for key in inputs.values if key.endswith(' lost')]
        process = Path(f'/proc/{self._node.pid}')
        self.samples.append(
            Sample(
                at_s=round(at_s, 1),
                rss_mib=rss_mib(process),
                threads=len(list((process / 'task').iterdir())),
                files=len(list((process / 'fd').iterdir())),
                ticks=counts.ticks,
                actions=counts.actions,
                skips=dict(counts.skips),
                lost=sum(int(count) for count in lost if count.isdecimal()),
            )
        )
        line = line_of(self.samples[-1])
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _check_children(self) -> None:
        for child in self._group.running:
            child.check()


def rss_mib(process: Path) -> float:
    """Return the memory of a process that is in RAM, from its directory in /proc."""
    for line in (process / 'status').read_text().splitlines():
        if line.startswith('VmRSS:'):
            return int(line.split()[1]) / 1024
    raise ProcessError(f'{process} has no VmRSS; the process is gone')


def line_of(sample: Sample) -> str:
    """Return one sample as a line."""
    return (
        f'{sample.at_s:6.0f} s  {sample.rss_mib:7.1f} MiB  {sample.threads} threads  '
        f'{sample.files} files  {sample.ticks} ticks  {sample.actions} actions  '
        f'skipped: {format_counts(sample.skips)}  lost {sample.lost}'
    )


def judge(samples: Sequence[Sample], rate_hz: float, active_s: float) -> list[Verdict]:
    """Compare the beginning with the end, after a warm-up, and the counters with the clock.

    Args:
        samples: in the order of time; the last one of after the node stopped acting.
        active_s: how long the node was active.
    """
    last = samples[-1]
    wrong = [sample for sample in samples if not sample.is_consistent]
    # The transitions themselves take a part of a second.
    expected = rate_hz * active_s
    missed = expected - last.ticks
    return [
        Verdict(
            'every tick is an action or a skip with a reason',
            f'{len(wrong)} of {len(samples)} samples inconsistent',
            not wrong,
        ),
        Verdict(
            'no tick is missing without a reason',
            f'{last.ticks} ticks in {active_s:.1f} s, {expected:.0f} due',
            abs(missed) <= rate_hz,
        ),
        Verdict(
            'it acts',
            f'{last.actions} actions; skipped: {format_counts(last.skips)}; lost {last.lost}',
            last.actions > 0,
        ),
        judge_trend(samples, 'memory (MiB)', lambda s: s.rss_mib, MAX_GROWTH),
        judge_trend(samples, 'threads', lambda s: s.threads, 0.0),
        judge_trend(samples, 'open files', lambda s: s.files, 0.0),
    ]


def judge_trend(
    samples: Sequence[Sample], name: str, figure: Callable[[Sample], float], tolerance: float
) -> Verdict:
    """Compare the median of the last fifth with that of the first, after the warm-up.

    Args:
        tolerance: allowed change, as a share of the first.
    """
    warm_s = min(WARM_UP_S, samples[-1].at_s / 4)
    warm = [figure(sample) for sample in samples[:-1] if sample.at_s >= warm_s]
    fifth = max(1, len(warm) // 5)
    first, last = median(warm[:fifth]), median(warm[-fifth:])
    return Verdict(
        f'{name} flat within {tolerance:.0%}',
        f'{first:.1f} -> {last:.1f} ({last / first - 1:+.2%}), after {warm_s:.0f} s',
        abs(last - first) <= tolerance * first,
    )


def judge_end(node: Child) -> Verdict:
    """End the inactive node as Ctrl-C does, and look at what is left."""
    import signal

    node.signal_group(signal.SIGINT)
    gone = wait_until(lambda: not node.group_exists(), STOP_PATIENCE_S)
    found = f'exit code {node.exit_code}' if gone else 'a process is left'
    return Verdict('it ends by SIGINT with exit code 0', found, gone and node.exit_code == 0)


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Return the verdicts as a table."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ('criterion', 'found', ''):
        table.add_column(name)
    for verdict in verdicts:
        table.add_row(verdict.criterion, verdict.found, 'ok' if verdict.passed else 'FAILED')
    return table


if __name__ == '__main__':
    sys.exit(main())

"""``pi05-ros demo``: the shipped bag as live topics, the real node, and what it does.

Bag player and node are two further processes, as they would be on a robot; this one drives the
node's lifecycle and watches. Nothing that the node sends can move anything: it runs dry, on this
machine only.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pi05_ros.model.errors import Pi05Error
from pi05_ros.resources import config_dir, demo_bag

from .demo_view import DemoView
from .plots import save_stage_plot
from .processes import Child, Children, ProcessError, children
from .report import RunReport, format_counts, stage_table, summary_lines
from .terminal import Progress, make_console, positive

# Shares of the ticks from which on the demo counts as failed. A busy machine may be late now and
# then; that is shown, but says nothing about the node.
MAX_OVERRUN_SHARE = 0.05
MAX_INCOMPLETE_SHARE = 0.2
MIN_RECEIVED_SHARE = 0.9
OVERRUN = 'overrun'
# Reasons for which a tick had no complete observation to act on.
INCOMPLETE = frozenset(
    {'missing_input', 'stale_input', 'future_stamp', 'skewed_inputs', 'clock_jump_back'}
)
STEP_PATIENCE_S = 10.0
# A full-size checkpoint is read, captured and warmed up in here.
LOAD_PATIENCE_S = 600.0
# Two cores that also play the bag leave the tiny checkpoint about 80 ms per inference; twice that
# on a busy machine still fits.
CPU_RATE_HZ = 5.0


class DemoError(Pi05Error):
    """The demo ran, but the node did not do what it should have."""


def add_parser(subparsers: Any) -> None:
    """Add ``demo`` to the command line."""
    parser = subparsers.add_parser(
        'demo',
        help='run the real node on the shipped bag and show what it does',
        description='Play the shipped bag as live topics, run the real node on it (dry run), show '
        'the stages, rates and ages, and end with a table and a picture.',
    )
    parser.add_argument(
        '--seconds', type=positive, default=20.0, help='how long the node acts (default 20)'
    )
    parser.add_argument(
        '--checkpoint', metavar='DIR', help='default: a tiny one of random weights is made'
    )
    parser.add_argument(
        '--out', default='demo_output', metavar='DIR', help='where logs, figures and picture go'
    )
    parser.add_argument(
        '--ros-args',
        nargs=argparse.REMAINDER,
        default=[],
        help='standard ROS arguments for the node, e.g. -p robot:=libero -p num_steps:=3',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 if every tick with a complete observation acted, else 1."""
    console = make_console()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.update(private_network())
    console.print(
        f'ROS_DOMAIN_ID {os.environ["ROS_DOMAIN_ID"]}, on this machine only', highlight=False
    )
    node: list[Child] = []
    try:
        with children() as group:
            start_player(group, out)
            checkpoint = args.checkpoint or make_tiny_checkpoint(out, console)
            node.append(start_node(group, Path(checkpoint).resolve(), out, args.ros_args))
            Demo(args.seconds, out, console, group).run()
            return 0
    except KeyboardInterrupt:
        console.print('interrupted; player and node are stopped')
        return 130
    except ProcessError as error:
        console.print(f'demo failed: {error}', markup=False, highlight=False, soft_wrap=True)
    except Pi05Error as error:
        console.print(f'demo failed: {error}', markup=False, highlight=False, soft_wrap=True)
        for child in node:
            text = f'the end of {child.log_path}:\n{child.tail()}'
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 1


def private_network() -> dict[str, str]:
    """Return the environment that keeps the demo away from robots on the network.

    What the user has set stays.
    """
    wanted = {
        'ROS_DOMAIN_ID': str(random.randint(1, 99)),
        'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
        'PYTHONUNBUFFERED': '1',
    }
    return {name: os.environ.get(name) or value for name, value in wanted.items()}


def make_tiny_checkpoint(out: Path, console: Console) -> Path:
    """Write a new tiny checkpoint of random weights and return its directory."""
    from .random_checkpoint import make_checkpoint

    directory = out / 'tiny_checkpoint'
    shutil.rmtree(directory, ignore_errors=True)
    console.print('making a tiny checkpoint of random weights: the actions mean nothing')
    make_checkpoint('tiny', directory, seed=0)
    return directory


def start_player(group: Children, out: Path) -> Child:
    """Play the shipped bag, again and again, with stamps of now."""
    command = [sys.executable, '-m', 'pi05_ros.tools.cli', 'play', str(demo_bag()), '--loop']
    return group.start('bag player', command, os.environ, out / 'play.log')


def start_node(group: Children, checkpoint: Path, out: Path, ros_args: list[str]) -> Child:
    """Start the real node with the shipped parameters; ``ros_args`` of the user come last."""
    overrides: dict[str, Any] = {'checkpoint': str(checkpoint), 'dry_run': True}
    if not _has_cuda():
        overrides['rate_hz'] = CPU_RATE_HZ
    parameter_file = out / 'demo_parameters.yaml'
    parameter_file.write_text(yaml.safe_dump({'/**': {'ros__parameters': overrides}}))
    command = [
        sys.executable, '-m', 'pi05_ros.policy_node', '--ros-args',
        '--params-file', str(config_dir() / 'policy.yaml'),
        '--params-file', str(parameter_file), *ros_args,
    ]  # fmt: skip
    return group.start('policy node', command, os.environ, out / 'node.log')


class Demo:
    """Drives the node through its life and watches it.

    Args:
        seconds: how long the node is active.
    """

    def __init__(self, seconds: float, out: Path, console: Console, group: Children) -> None:
        self._seconds = seconds
        self._out = out
        self._console = console
        self._group = group

    def run(self) -> None:
        """Configure, activate, watch, deactivate, report.

        Raises:
            Pi05Error: something of it did not work, or the node did not act as it should.
        """
        import rclpy
        from rclpy.signals import SignalHandlerOptions

        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        try:
            node = rclpy.create_node(
                'pi05_demo', enable_rosout=False, start_parameter_services=False
            )
            report = self._watch(node)
        finally:
            rclpy.try_shutdown()
        self._show(report)
        if problems := find_problems(report):
            raise DemoError('; '.join(problems))

    def _watch(self, node: Any) -> RunReport:
        from lifecycle_msgs.msg import Transition

        from .monitor import Monitor

        monitor = Monitor(node)
        view = DemoView(monitor)
        with Progress(self._console, view.draw, view.line) as progress:
            monitor.idle_calls += [self._check_children, progress.update]
            monitor.transition(Transition.TRANSITION_CONFIGURE, 'configure', LOAD_PATIENCE_S)
            monitor.wait(lambda: monitor.hears_chunks, STEP_PATIENCE_S)
            monitor.transition(Transition.TRANSITION_ACTIVATE, 'activate', STEP_PATIENCE_S)
            began_s = time.monotonic()
            monitor.wait(lambda: False, self._seconds)
            active_s = time.monotonic() - began_s
            monitor.transition(Transition.TRANSITION_DEACTIVATE, 'deactivate', STEP_PATIENCE_S)
            monitor.wait(lambda: monitor.state == 'inactive', STEP_PATIENCE_S)
        report = view.report(active_s)
        monitor.close()
        return report

    def _show(self, report: RunReport) -> None:
        self._console.print('', stage_table(report.log), '', sep='\n')
        for line in summary_lines(report):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        if len(report.log):
            picture = self._out / 'stages.png'
            save_stage_plot(report, picture)
            self._console.print(f'picture: {picture}', markup=False, soft_wrap=True)

    def _check_children(self) -> None:
        for child in self._group.running:
            child.check()


def find_problems(report: RunReport) -> list[str]:
    """Say what kept the node from acting on every tick that had a complete observation."""
    ticks, actions, skips = report.ticks, report.actions, report.skips
    if not actions:
        return [f'no action in {ticks} ticks; skipped: {format_counts(skips)}']
    problems = []
    broken = {r: n for r, n in skips.items() if r not in INCOMPLETE and r != OVERRUN}
    if broken:
        problems.append(f'complete observations without an action: {format_counts(broken)}')
    if skips.get(OVERRUN, 0) > MAX_OVERRUN_SHARE * ticks:
        problems.append(
            f'{skips[OVERRUN]} of {ticks} ticks fell out because an inference took too long '
            f'({report.log.spread("total_ms").p50_ms:.0f} ms for a period of '
            f'{1000 / report.rate_hz:.0f} ms)'
        )
    incomplete = {r: n for r, n in skips.items() if r in INCOMPLETE}
    if sum(incomplete.values()) > MAX_INCOMPLETE_SHARE * ticks:
        problems.append(f'too few complete observations: {format_counts(incomplete)}')
    if ticks != actions + sum(skips.values()):
        problems.append(f'{ticks} ticks are not {actions} actions and {sum(skips.values())} skips')
    if report.received < MIN_RECEIVED_SHARE * actions:
        problems.append(f'only {report.received} of {actions} actions arrived here')
    return problems


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()

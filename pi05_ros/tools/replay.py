"""``pi05-ros replay BAG``: the actions that a recording leads to, the same ones every time.

When ticks happen is defined in :mod:`pi05_ros.tools.replayer`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pi05_ros.control.images import ForeignDecoder
from pi05_ros.control.parameters import NodeSettings
from pi05_ros.model.errors import Pi05Error
from pi05_ros.resources import demo_bag

from . import replay_report
from .action_log import ActionLog
from .bag import open_bag
from .compare import Comparison, compare
from .remapping import Remapping, parameter_override, remap_rule
from .replayer import Replay, ReplayError, Setup
from .terminal import Progress, make_console, output_file

BAR_COLUMNS = 24
# Options that are parameters of the node under a shorter name.
_PARAMETER_OPTIONS = ('checkpoint', 'backend', 'precision', 'seed', 'rate_hz')


def add_parser(subparsers: Any) -> None:
    """Add ``replay`` to the command line."""
    parser = subparsers.add_parser(
        'replay',
        help='run a recording through the policy without ROS, the same way every time',
        description='Run a rosbag2 recording (MCAP or sqlite3) through the control code of the '
        'node, without middleware and without a wall clock: the same command gives the same '
        'actions, bit for bit. Exit status: 0, 1 if no tick acted, 2 after an error (the report '
        'is written all the same).',
    )
    add_input_arguments(parser)
    parser.add_argument('--backend', help='default: as the node (auto)')
    parser.add_argument('--precision', help='bfloat16 or float32; default: as the node (auto)')
    parser.add_argument('--seed', type=int, metavar='N', help='of the noise; default: 0')
    parser.add_argument('--out', type=output_file, metavar='JSON', help='write the report here')
    parser.add_argument(
        '--actions', type=output_file, metavar='NPZ', help='write the actions here'
    )
    parser.add_argument(
        '--record-golden', type=output_file, metavar='NPZ',
        help='as --actions, but only of a whole replay that acted: a reference for '
        'pi05_ros.testing.check_golden',
    )  # fmt: skip
    parser.add_argument(
        '--compare', type=Path, metavar='NPZ', help='compare with the actions of another replay'
    )
    parser.set_defaults(run=run)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to replay and with which node: bag, checkpoint, parameters and remaps."""
    parser.add_argument(
        'bag', nargs='?', type=Path, help='directory, .mcap or .db3; default: the shipped bag'
    )
    parser.add_argument(
        '--checkpoint', metavar='DIR', help='default: a tiny one of random weights is made'
    )
    parser.add_argument('--rate-hz', type=float, metavar='R', help='ticks per second; default: 20')
    parser.add_argument('--params-file', type=Path, metavar='YAML', help='as for the node')
    parser.add_argument(
        '-p', '--param', dest='params', action='append', default=[], type=parameter_override,
        metavar='NAME:=VALUE', help='as for the node, e.g. cameras.base.transport:=compressed',
    )  # fmt: skip
    parser.add_argument(
        '-r', '--remap', dest='remaps', action='append', default=[], type=remap_rule,
        metavar='FROM:=TO', help='as for the node, also __ns:=/NAMESPACE',
    )  # fmt: skip


def setup_of(args: argparse.Namespace) -> Setup:
    """Return what the options say; options win over ``-p``, and both over the file."""
    overrides = dict(args.params)
    for name in _PARAMETER_OPTIONS:
        value = getattr(args, name, None)
        if value is not None:
            overrides[name] = value
    return Setup(args.params_file, overrides, Remapping(tuple(args.remaps)))


def run(args: argparse.Namespace) -> int:
    """Replay, print, write; return 0, or 1 if no tick acted."""
    console = make_console()
    bag: Path = args.bag or demo_bag()
    reference = ActionLog.load(args.compare) if args.compare else None
    session = ReplaySession(bag, setup_of(args), console)
    comparison: Comparison | None = None
    failure: Pi05Error | None = None
    try:
        session.run()
        if reference is not None and session.replay is not None:
            comparison = compare(reference, session.log())
    except Pi05Error as error:
        failure = error
    if args.out:
        text = str(failure) if failure else None
        replay_report.write(args.out, replay_report.as_dict(bag, session.replay, comparison, text))
    if session.replay is not None and session.replay.results:
        if args.actions:
            session.log().save(args.actions)
        replay_report.show(console, session.replay, comparison)
    if failure is not None:
        raise failure
    log = session.log()
    if args.record_golden:
        if not log.ticks.size:
            raise ReplayError(f'no tick of {bag} acted, so there is nothing to pin')
        log.save(args.record_golden)
    return 0 if log.ticks.size else 1


class ReplaySession:
    """A replay with its progress on the terminal.

    Attributes:
        replay: None until the settings were found to be usable.
    """

    def __init__(self, bag: Path, setup: Setup, console: Console) -> None:
        self.bag = bag
        self.setup = setup
        self.replay: Replay | None = None
        self._console = console
        self._start_ns = self._duration_ns = 0

    def run(self) -> None:
        """Replay the whole bag.

        Raises:
            Pi05Error: it cannot be replayed, or not to its end.
        """
        settings = self.setup.settings()
        with (
            checkpoint_for(settings, self._console) as settings,
            Progress(self._console, self._draw, self._line) as progress,
        ):
            self.replay = replay = Replay(
                settings,
                self.setup.remapping,
                foreign_decoder=installed_decoder(),
                on_tick=lambda replay: progress.update(),
            )
            with open_bag(self.bag) as bag:
                self._start_ns, self._duration_ns = bag.start_ns, bag.duration_ns
                replay.run(bag)

    def log(self) -> ActionLog:
        """Return the actions; call after :meth:`run` has made :attr:`replay`."""
        assert self.replay is not None
        return self.replay.action_log(replay_report.origin_of(self.replay))

    def _draw(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(max(self._duration_ns, 1), self._done_ns, width=BAR_COLUMNS)
        grid.add_row(bar, Text(self._line(), no_wrap=True, overflow='ellipsis'))
        return grid

    def _line(self) -> str:
        ticks = len(self.replay.results) if self.replay else 0
        return (
            f'{self.bag.name}: {self._done_ns / 1e9:.1f} of {self._duration_ns / 1e9:.1f} s, '
            f'{ticks} ticks'
        )

    @property
    def _done_ns(self) -> int:
        if self.replay is None or not self.replay.last_ns:
            return 0
        return self.replay.last_ns - self._start_ns


@contextmanager
def checkpoint_for(settings: NodeSettings, console: Console) -> Iterator[NodeSettings]:
    """Yield the settings with a checkpoint: where they name none, a tiny one is made for now."""
    if settings.checkpoint:
        yield settings
        return
    from .random_checkpoint import make_checkpoint

    console.print('no checkpoint given: a tiny one of random weights is made for this replay')
    with TemporaryDirectory(prefix='pi05_ros_') as directory:
        path = Path(directory) / 'tiny'
        make_checkpoint('tiny', path, seed=0)
        yield replace(settings, checkpoint=str(path))


def installed_decoder() -> ForeignDecoder | None:
    """Return what the live node would use for encodings that are not read natively."""
    if find_spec('cv_bridge') is None:
        return None
    from pi05_ros.ros.bridge import find_converter

    return find_converter().decode

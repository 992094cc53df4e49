"""``pi05-ros recompute BAG``: do the recorded actions follow from the recorded inputs?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .action_log import ActionLog
from .bag import Bag, open_bag
from .compare import compare, dimension_table, summary
from .recomputer import Outcome, RecomputeError, Recomputer
from .replay import add_input_arguments, checkpoint_for, installed_decoder, setup_of
from .terminal import Progress, make_console

_SHOWN_FAULTS = 5


def add_parser(subparsers: Any) -> None:
    """Add ``recompute`` to the command line."""
    parser = subparsers.add_parser(
        'recompute',
        help='prove that recorded actions follow from the recorded inputs',
        description='Compute every recorded ActionChunk once more from the inputs, seed and tick '
        'that it names, and compare bit by bit. Exit status: 0 if all are identical, else 1.',
    )
    add_input_arguments(parser)
    parser.add_argument(
        '--topic', metavar='TOPIC', help='where the chunks are; default: the only such topic'
    )
    parser.add_argument('--backend', help='default: as the chunk says')
    parser.add_argument('--precision', help='default: as the chunk says')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Recompute every chunk, print what came of it; return 0 if all are identical, else 1."""
    if args.bag is None:
        raise RecomputeError('give a recording of the node: its inputs and its action chunks')
    console = make_console()
    setup = setup_of(args)
    with checkpoint_for(setup.settings(), console) as settings, open_bag(args.bag) as bag:
        recomputer = Recomputer(
            bag,
            settings,
            setup.remapping,
            topic=args.topic,
            overrides=setup.overrides,
            foreign_decoder=installed_decoder(),
        )
        outcomes = _collect(recomputer, bag, console)
        return _show(console, recomputer, outcomes)


def _collect(recomputer: Recomputer, bag: Bag, console: Console) -> list[Outcome]:
    outcomes: list[Outcome] = []
    count = bag.topics[recomputer.chunk_topic].count

    def line() -> str:
        return f'{Path(bag.path).name}: {len(outcomes)} of {count} action chunks recomputed'

    with Progress(console, line, line) as progress:
        for outcome in recomputer.run():
            outcomes.append(outcome)
            progress.update()
    if not outcomes:
        raise RecomputeError(f'{bag.path}: nothing was recorded on {recomputer.chunk_topic}')
    return outcomes


def _show(console: Console, recomputer: Recomputer, outcomes: list[Outcome]) -> int:
    done = [outcome for outcome in outcomes if outcome.found is not None]
    faults = [outcome for outcome in outcomes if outcome.found is None]
    identical = sum(outcome.is_identical for outcome in outcomes)
    lines = [
        f'{len(outcomes)} action chunks on {recomputer.chunk_topic}: {identical} identical bit '
        f'for bit, {len(done) - identical} different, {len(faults)} not recomputed'
    ]
    lines += [f'tick {o.recorded.tick}: {o.fault}' for o in faults[:_SHOWN_FAULTS]]
    if len(faults) > _SHOWN_FAULTS:
        lines.append(f'and {len(faults) - _SHOWN_FAULTS} more')
    if done and recomputer.policy is not None:
        made, info = done[0].recorded, recomputer.policy.info
        backend = '/'.join(dict.fromkeys(info.stage_backends.values()))
        lines.append(
            f'recorded with {made.backend} {made.precision}, recomputed with {backend} '
            f'{info.precision} on {info.device}'
        )
    if identical < len(done):
        comparison = compare(*_logs(done))
        console.print(dimension_table(comparison, 'recomputed against recorded'))
        lines += summary(comparison)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if identical == len(outcomes) else 1


def _logs(done: list[Outcome]) -> tuple[ActionLog, ActionLog]:
    """Return what was recorded and what came out now, as two logs of the same ticks."""
    ticks = [outcome.recorded.tick for outcome in done]
    if len(set(ticks)) < len(ticks):  # the node was activated more than once
        ticks = list(range(len(done)))
    names = done[0].recorded.names
    number = np.array(ticks, dtype='<i8')

    def log(actions: list[np.ndarray]) -> ActionLog:
        return ActionLog(names, ('',) * len(names), np.stack(actions), number, number, number)

    return (
        log([outcome.recorded.actions for outcome in done]),
        log([outcome.found.actions for outcome in done if outcome.found]),
    )

"""``pi05-ros ab BAG``: what another backend, precision or step count costs and saves."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pi05_ros.engine.build import BACKENDS
from pi05_ros.model.errors import Pi05Error
from pi05_ros.resources import demo_bag

from .ab_plots import save_stages, save_traces
from .action_log import ActionLog
from .compare import Comparison, compare
from .replay import ReplaySession, add_input_arguments, checkpoint_for, setup_of
from .replay_report import timing_log, without_nan
from .replayer import Setup
from .report import TimingLog
from .terminal import make_console

_VARIANT = re.compile(r'^(?P<backend>\w+):(?P<precision>\w+):(?P<steps>[1-9]\d*)$')
_PRECISIONS = ('float32', 'bfloat16', 'auto')


class AbError(Pi05Error):
    """The variants cannot be compared."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model, written ``backend:precision:steps``."""

    backend: str
    precision: str
    num_steps: int

    def __str__(self) -> str:
        return f'{self.backend}:{self.precision}:{self.num_steps}'

    def applied_to(self, setup: Setup, checkpoint: str) -> Setup:
        """Return the setup with this variant's parameters."""
        chosen = {
            'checkpoint': checkpoint,
            'backend': self.backend,
            'precision': self.precision,
            'num_steps': self.num_steps,
        }
        return replace(setup, overrides={**setup.overrides, **chosen})


@dataclass(frozen=True)
class Result:
    """What one variant did; ``comparison`` is None for the first one, the reference."""

    variant: Variant
    log: ActionLog
    timing: TimingLog
    comparison: Comparison | None

    @property
    def p50_ms(self) -> float:
        """Median inference."""
        return self.timing.spread('total_ms').p50_ms


def add_parser(subparsers: Any) -> None:
    """Add ``ab`` to the command line."""
    parser = subparsers.add_parser(
        'ab',
        help='compare backends, precisions and step counts on a recording',
        description='Replay a recording once per variant and compare latency and actions with '
        'those of the first variant.',
    )
    add_input_arguments(parser)
    parser.add_argument(
        '--variant', dest='variants', action='append', type=variant, required=True,
        metavar='BACKEND:PRECISION:STEPS',
        help='give two or more; the first is the reference, e.g. eager:float32:10',
    )  # fmt: skip
    parser.add_argument('--seed', type=int, metavar='N', help='of the noise; default: 0')
    parser.add_argument(
        '--out', type=Path, metavar='DIR',
        help='write ab.json, traces.png, stages.png and the actions of each variant there',
    )  # fmt: skip
    parser.set_defaults(run=run)


def variant(text: str) -> Variant:
    """Parse ``backend:precision:steps`` of the command line."""
    match = _VARIANT.match(text)
    if not match or match['backend'] not in BACKENDS or match['precision'] not in _PRECISIONS:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not BACKEND:PRECISION:STEPS with one of {", ".join(BACKENDS)} and one '
            f'of {", ".join(_PRECISIONS)}'
        )
    return Variant(match['backend'], match['precision'], int(match['steps']))


def run(args: argparse.Namespace) -> int:
    """Replay every variant, compare, print; return 0."""
    variants: list[Variant] = args.variants
    if len(set(variants)) < 2 or len(set(variants)) < len(variants):
        raise AbError('give two or more different variants; the first one is the reference')
    console = make_console()
    bag: Path = args.bag or demo_bag()
    results = run_variants(bag, setup_of(args), variants, console)
    console.print(table_of(results))
    if args.out:
        _write(args.out, bag, results)
        console.print(f'written to {args.out}', markup=False, highlight=False, soft_wrap=True)
    return 0


def run_variants(
    bag: Path, setup: Setup, variants: list[Variant], console: Console
) -> list[Result]:
    """Replay the recording once per variant.

    Raises:
        Pi05Error: the recording cannot be replayed, or a variant cannot run or never acts.
    """
    results: list[Result] = []
    with checkpoint_for(setup.settings(), console) as settings:
        for chosen in variants:
            session = ReplaySession(bag, chosen.applied_to(setup, settings.checkpoint), console)
            try:
                session.run()
                log = session.log()
                comparison = compare(results[0].log, log) if results else None
            except Pi05Error as error:
                raise AbError(f'variant {chosen}: {error}') from error
            if not log.ticks.size:
                raise AbError(f'variant {chosen}: no tick acted; see "pi05-ros replay {bag}"')
            assert session.replay is not None
            results.append(Result(chosen, log, timing_log(session.replay), comparison))
    return results


def table_of(results: list[Result]) -> Table:
    """Return latency, cosine and errors of every variant as one table, a column per variant.

    Errors are means of the absolute difference to the reference in the unit of the dimension:
    over all rows of a chunk, and over its first row, which a robot executes first.
    """
    reference = results[0]
    table = Table(
        title=f'{len(reference.log.ticks)} actions; reference: {reference.variant}',
        title_justify='left',
        box=box.SIMPLE_HEAD,
    )
    table.add_column('', no_wrap=True)
    table.add_column('unit', no_wrap=True)
    for result in results:
        table.add_column(str(result.variant), justify='right')
    spreads = [result.timing.spread('total_ms') for result in results]
    table.add_row('what ran', '', *map(what_ran, results))
    table.add_row('inference P50', 'ms', *(f'{spread.p50_ms:.2f}' for spread in spreads))
    table.add_row('inference P95', 'ms', *(f'{spread.p95_ms:.2f}' for spread in spreads))
    table.add_row('speed', '', *(f'{reference.p50_ms / spread.p50_ms:.2f}x' for spread in spreads))
    table.add_row('cosine', '', *(_cosine(result.comparison) for result in results))
    for title, field in (('MAE', 'mean_abs_error'), ('first action', 'first_action_error')):
        table.add_section()
        for index, name in enumerate(reference.log.names):
            errors = (_error(result.comparison, index, field) for result in results)
            table.add_row(f'{title} {name}', reference.log.units[index], *errors)
    return table


def what_ran(result: Result) -> str:
    """Return backend, precision and device that ran, not those that were asked for."""
    facts = result.log.origin['model']
    stages = [facts[f'{stage}_backend'] for stage in ('vision', 'prefill', 'denoise')]
    return f'{"/".join(dict.fromkeys(stages))} {facts["precision"]} {facts["device"]}'


def _cosine(comparison: Comparison | None) -> str:
    if comparison is None:
        return '-'
    return 'identical' if comparison.is_identical else f'{comparison.cosine:.8f}'


def _error(comparison: Comparison | None, index: int, field: str) -> str:
    if comparison is None:
        return '-'
    return f'{getattr(comparison.dimensions[index], field):.3g}'


def _write(out: Path, bag: Path, results: list[Result]) -> None:
    content = {
        'bag': str(bag),
        'reference': str(results[0].variant),
        'variants': {
            str(r.variant): {
                'ran': what_ran(r),
                'actions_sha256': r.log.sha256,
                'p50_ms': r.p50_ms,
                'p95_ms': r.timing.spread('total_ms').p95_ms,
                'stages_p50_ms': {row.label: row.spread.p50_ms for row in r.timing.rows()},
                'comparison': r.comparison.as_dict() if r.comparison else None,
            }
            for r in results
        },
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'ab.json').write_text(json.dumps(without_nan(content), indent=2) + '\n')
        labelled = {str(r.variant): r.log for r in results}
        save_traces(labelled, out / 'traces.png')
        save_stages({str(r.variant): r.timing for r in results}, out / 'stages.png')
    except OSError as error:
        raise AbError(f'cannot write to {out}: {error}') from error
    for name, log in labelled.items():
        log.save(out / f'actions_{name.replace(":", "_")}.npz')

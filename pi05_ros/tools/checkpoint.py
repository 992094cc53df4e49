"""``pi05-ros checkpoint make`` and ``pi05-ros checkpoint inspect``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from pi05_ros.model.config import Pi05Config

from .checkpoint_report import CheckpointReport, report_on
from .random_checkpoint import SIZES, make_checkpoint
from .terminal import make_console


def add_parser(subparsers: Any) -> None:
    """Add ``checkpoint`` with its two actions to the command line."""
    parser = subparsers.add_parser(
        'checkpoint', help='make a random checkpoint, or show what is in one'
    )
    actions = parser.add_subparsers(dest='action', required=True)
    make = actions.add_parser(
        'make',
        help='write a complete checkpoint of random weights',
        description="Write a complete checkpoint of random weights in openpi's layout, with "
        'statistics of a Franka arm and a small tokenizer: for demos, tests and benchmarks.',
    )
    make.add_argument('--size', required=True, choices=SIZES, help='tiny runs on a CPU')
    make.add_argument('--out', required=True, type=Path, metavar='DIR', help='new or empty')
    make.add_argument('--seed', type=int, default=0, metavar='N', help='default: 0')
    make.set_defaults(run=run_make)
    inspect = actions.add_parser(
        'inspect',
        help='show what a checkpoint holds and what it lacks',
        description='Show what a checkpoint holds and what it lacks. Exit status: 0 if a robot '
        'can be driven with it, 1 if something is missing.',
    )
    inspect.add_argument('directory', type=Path, metavar='DIR')
    inspect.add_argument('--json', action='store_true', help='print one JSON object')
    inspect.set_defaults(run=run_inspect)


def run_make(args: argparse.Namespace) -> int:
    """Write a random checkpoint; return 0."""
    make_checkpoint(args.size, args.out, args.seed)
    make_console().print(f'wrote a {args.size} checkpoint of random weights to {args.out}')
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds; return 0 if nothing is missing, else 1."""
    report = report_on(args.directory)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)
    return 1 if report.missing else 0


def _print(report: CheckpointReport) -> None:
    console = make_console()
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style='bold')
    table.add_column(overflow='fold')
    for name, text in _rows(report):
        table.add_row(name, text)
    console.print(table)
    for fault in report.missing:
        console.print(f'missing: {fault}', markup=False, soft_wrap=True)
    if not report.missing:
        console.print('nothing is missing')


def _rows(report: CheckpointReport) -> list[tuple[str, str]]:
    checkpoint = report.checkpoint
    dtypes = ', '.join(f'{count:,} {name}' for name, count in report.dtypes.items())
    rows = [
        ('directory', str(checkpoint.path)),
        ('layout', checkpoint.layout),
        ('weights', f'{checkpoint.weights_path.name}, {report.weights_bytes / 1e9:.3f} GB'),
        ('sha256', checkpoint.sha256),
        ('parameters', f'{report.parameters:,} in {report.tensors} tensors'),
        ('dtypes', dtypes),
        *_dimension_rows(checkpoint.config),
    ]
    rows += [('statistics', text) for text in report.statistics]
    rows.append(('tokenizer', report.tokenizer or 'none'))
    return rows


def _dimension_rows(config: Pi05Config) -> list[tuple[str, str]]:
    vision, vlm, expert = config.vision, config.vlm, config.expert
    return [
        (
            'vision',
            f'{vision.depth} layers of {vision.width}, mlp {vision.mlp_dim}, {vision.num_heads} '
            f'heads, {vision.tokens_per_view} tokens of a {vision.image_px} px view',
        ),
        *(
            (
                name,
                f'{gemma.depth} layers of {gemma.width}, mlp {gemma.mlp_dim}, {gemma.num_heads} '
                f'heads of {gemma.head_dim}, {gemma.num_kv_heads} for K and V',
            )
            for name, gemma in (('language model', vlm), ('action expert', expert))
        ),
        ('vocabulary', f'{config.vocab_size:,}'),
        ('actions', f'horizon {config.action_horizon}, {config.action_dim} dimensions'),
        ('prompt', f'at most {config.max_prompt_tokens} tokens'),
    ]

"""``pi05-ros tune``: time the kernels on this GPU and keep the fastest for the next start."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from pi05_ros.engine.build import choose_backend
from pi05_ros.engine.pipeline import PipelineShape
from pi05_ros.engine.tuning import TunedChoices, user_path
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.config import Pi05Config

from .random_weights import random_state
from .terminal import make_console


def add_parser(subparsers: Any) -> None:
    """Add ``tune`` to the command line."""
    parser = subparsers.add_parser(
        'tune',
        help='find the fastest kernels for this GPU and store them',
        description='Time the candidates of every GEMM and attention of vision and prefill. '
        'Takes about a minute; a pipeline that is built afterwards uses the result.',
    )
    parser.add_argument(
        '--checkpoint', metavar='DIR', help='take the dimensions from here; default: released'
    )
    parser.add_argument('--views', type=int, nargs='+', metavar='N', help='default: all that fit')
    parser.add_argument('--device', default='auto', help='default: auto')
    parser.add_argument(
        '--output', type=Path, metavar='FILE', help='default: the file that a start reads'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, print what was gained, store; return the exit status."""
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

    _, device = choose_backend('cuda', args.device)
    config = open_checkpoint(args.checkpoint).config if args.checkpoint else Pi05Config.full()
    gpu = torch.cuda.get_device_name(device)
    choices, console = TunedChoices(gpu), make_console()
    table = Table(title=gpu, box=box.SIMPLE_HEAD)
    for column in ('kernel', 'default µs', 'best µs', 'tried'):
        table.add_column(column, justify='left' if column == 'kernel' else 'right')
    for views in args.views or range(1, config.max_views + 1):
        size = (config.vision.image_px,) * 2
        shape = PipelineShape((size,) * views, config.max_prompt_tokens, 10, 1, 1)
        pipeline = CudaPipeline(random_state(config, str(device)), config, shape, 'bfloat16',
                                str(device))  # fmt: skip
        found, results = pipeline.tune()
        pipeline.close()
        choices = choices.merged(found)
        for result in results:
            table.add_row(
                result.key, f'{result.default_us:.2f}', f'{result.best_us:.2f}', str(result.tried)
            )
    path = args.output or user_path(gpu)
    choices.save(path)
    console.print(table)
    console.print(f'written to {path}', highlight=False)
    return 0

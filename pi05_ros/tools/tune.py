"""``pi05-ros tune``: time the kernels on this GPU and keep the fastest for the next start."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from pi05_ros.engine.build import choose_backend
from pi05_ros.engine.chips import file_name, user_path
from pi05_ros.engine.denoise_layers import row_block
from pi05_ros.engine.denoise_tuning import DenoiseTuning, save_denoise_tuning
from pi05_ros.engine.pipeline import PipelineShape
from pi05_ros.engine.tuning import TunedChoices
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.config import Pi05Config

from .measure import draw_inputs
from .random_weights import random_state
from .terminal import make_console

if TYPE_CHECKING:
    from pi05_ros.engine.autotune import TunedKernel
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

_STEPS = 3  # of the denoise runs that are timed


def add_parser(subparsers: Any) -> None:
    """Add ``tune`` to the command line."""
    parser = subparsers.add_parser(
        'tune',
        help='find the fastest kernels for this GPU and store them',
        description='Time the candidates of every kernel of vision, prefill and denoise. Takes '
        'a few minutes; a pipeline that is built afterwards uses the result.',
    )
    parser.add_argument(
        '--checkpoint', metavar='DIR', help='take the dimensions from here; default: released'
    )
    parser.add_argument('--views', type=int, nargs='+', metavar='N', help='default: all that fit')
    parser.add_argument('--device', default='auto', help='default: auto')
    parser.add_argument(
        '--output', type=Path, metavar='DIR', help='default: the folder that a start reads'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, print what was gained, store; return the exit status."""
    _, device = choose_backend('cuda', args.device)
    config = open_checkpoint(args.checkpoint).config if args.checkpoint else Pi05Config.full()
    gpu = torch.cuda.get_device_name(device)
    choices = TunedChoices(gpu)
    results: list[TunedKernel] = []
    denoise: DenoiseTuning | None = None
    counts = args.views or range(1, config.max_views + 1)
    for views in counts:
        pipeline = _build(config, views, str(device))
        found, gained = pipeline.tune()
        choices = choices.merged(found)
        results += gained
        if views == counts[-1]:
            _call(pipeline)
            tuned = pipeline.tune_denoise()
            if tuned is not None:
                denoise, step = tuned
                results.append(step)
        pipeline.close()
    prefix_path, denoise_path = (
        args.output / file_name(kind, gpu) if args.output else user_path(kind, gpu)
        for kind in ('prefix', 'denoise')
    )
    choices.save(prefix_path)
    console = make_console()
    console.print(_table(gpu, results))
    console.print(f'written to {prefix_path}', highlight=False)
    if denoise is None:
        console.print('the denoise runs the Hopper kernels, which have nothing to choose')
    else:
        rows = row_block(config.action_horizon)
        save_denoise_tuning(denoise_path, config.expert, rows, denoise)
        console.print(f'written to {denoise_path}', highlight=False)
    return 0


def _build(config: Pi05Config, views: int, device: str) -> CudaPipeline:
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

    sizes = ((config.vision.image_px,) * 2,) * views
    shape = PipelineShape(sizes, config.max_prompt_tokens, config.action_horizon, _STEPS, _STEPS)
    return CudaPipeline(random_state(config, device), config, shape, 'bfloat16', device)


def _call(pipeline: CudaPipeline) -> None:
    """Leave the prefix and the noise of one longest call in the buffers."""
    config, shape = pipeline.config, pipeline.shape
    inputs = draw_inputs(
        shape.view_sizes_px, config.vocab_size, shape.max_prompt_tokens,
        (shape.horizon, config.action_dim),
    )  # fmt: skip
    pipeline.infer(inputs.images, inputs.tokens, inputs.noise)


def _table(gpu: str, results: list[TunedKernel]) -> Table:
    table = Table(title=gpu, box=box.SIMPLE_HEAD)
    for column in ('kernel', 'default µs', 'best µs', 'tried'):
        table.add_column(column, justify='left' if column == 'kernel' else 'right')
    for result in results:
        table.add_row(
            result.key, f'{result.default_us:.2f}', f'{result.best_us:.2f}', str(result.tried)
        )
    return table

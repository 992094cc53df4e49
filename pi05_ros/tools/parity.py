"""``pi05-ros parity``: compare a backend with a golden file, item by item."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from pi05_ros.engine.build import BACKENDS, build_pipeline
from pi05_ros.engine.pipeline import STAGES, BackendError, Pipeline, PipelineShape
from pi05_ros.engine.trace import Trace, Traceable
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.precision import PRECISIONS

from .golden import Golden, GoldenError, read_golden
from .terminal import make_console


@dataclass(frozen=True)
class Tolerance:
    """What an item must keep; None is not checked."""

    max_abs_error: float | None = None
    min_cosine: float | None = None

    def accepts(self, max_abs_error: float, cosine: float) -> bool:
        """Return whether both figures are within the limits."""
        # Written so that NaN is never accepted.
        small = self.max_abs_error is None or max_abs_error <= self.max_abs_error
        aligned = self.min_cosine is None or cosine >= self.min_cosine
        return small and aligned

    def __str__(self) -> str:
        limits = []
        if self.max_abs_error is not None:
            limits.append(f'error ≤ {self.max_abs_error:g}')
        if self.min_cosine is not None:
            limits.append(f'cosine ≥ {self.min_cosine:g}')
        return ', '.join(limits) or 'reported only'


FLOAT32_TOLERANCE = Tolerance(max_abs_error=2e-4, min_cosine=0.99999)
BFLOAT16_TOLERANCE = Tolerance(min_cosine=0.9995)


@dataclass(frozen=True)
class Comparison:
    """One item against its golden value."""

    item: str
    max_abs_error: float
    cosine: float
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """Whether the item is within its tolerance."""
        return self.tolerance.accepts(self.max_abs_error, self.cosine)


def add_parser(subparsers: Any) -> None:
    """Add ``parity`` to the command line."""
    parser = subparsers.add_parser(
        'parity',
        help="compare a backend with a golden file of openpi's own model",
        description='Compare prefix embeddings, K/V, velocities and actions with a golden file. '
        'Exit status: 0 within tolerance, 1 above it, 2 if the comparison could not be made.',
    )
    parser.add_argument(
        '--checkpoint', required=True, metavar='DIR', help='checkpoint or golden directory'
    )
    parser.add_argument(
        '--golden', required=True, metavar='FILE.npz', help='inputs and outputs to compare with'
    )
    parser.add_argument('--backend', default='eager', choices=BACKENDS, help='default: eager')
    parser.add_argument(
        '--precision', choices=PRECISIONS,
        help="default: as the golden file's name ends, otherwise float32",
    )  # fmt: skip
    parser.add_argument('--device', default='auto', help="'cpu', 'cuda:N' or 'auto' (default)")
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, print, and return 0 (all items pass) or 1."""
    checkpoint = open_checkpoint(args.checkpoint)
    golden = read_golden(args.golden, checkpoint.config)
    precision = args.precision or precision_of_name(Path(args.golden))
    px = checkpoint.config.vision.image_px
    steps = golden.step_counts
    shape = PipelineShape(
        view_sizes_px=((px, px),) * golden.views.shape[0],
        max_prompt_tokens=max(1, golden.tokens.shape[0]),
        horizon=golden.noise.shape[0],
        num_steps=steps[-1],
        max_steps=steps[-1],
    )
    pipeline = build_pipeline(
        checkpoint, shape, backend=args.backend, precision=precision, device=args.device
    )
    try:
        comparisons = compare(pipeline, golden, precision)
        summary = _summary(args, pipeline, golden, precision, comparisons)
    finally:
        pipeline.close()
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        _print(make_console(), summary, comparisons)
    return 0 if summary['passed'] else 1


def compare(pipeline: Pipeline, golden: Golden, precision: str) -> list[Comparison]:
    """Run a pipeline once per step count of a golden file and compare every item in it."""
    if not isinstance(pipeline, Traceable):
        raise BackendError(
            f'backend {dict(pipeline.stage_backends)} does not show what it computes on the way, '
            "so it cannot be compared; use backend 'eager'"
        )
    found: dict[str, np.ndarray] = {}
    for steps in golden.step_counts:
        trace = pipeline.trace(golden.views, golden.tokens, golden.noise, steps)
        found |= _items(trace, steps)
    return [
        _compare(name, found[name], expected, tolerance_of(name, precision))
        for name, expected in golden.outputs.items()
    ]


def tolerance_of(item: str, precision: str) -> Tolerance:
    """Return what an item must keep: in bfloat16 only velocities and actions are judged."""
    if precision == 'float32':
        return FLOAT32_TOLERANCE
    return Tolerance() if item.startswith('prefix_') else BFLOAT16_TOLERANCE


def precision_of_name(path: Path) -> str:
    """Return the precision with which a golden file's name ends, otherwise float32."""
    return next((p for p in PRECISIONS if path.stem.endswith(p)), 'float32')


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays, as one vector each, in float64."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    if norms == 0.0:
        return 1.0 if np.array_equal(x, y) else 0.0
    return float(x @ y / norms)


def _items(trace: Trace, steps: int) -> dict[str, np.ndarray]:
    return {
        'prefix_embs': trace.prefix_embs,
        'prefix_keys': trace.keys,
        'prefix_values': trace.values,
        f'v_{steps}': trace.velocities,
        f'actions_{steps}': trace.actions,
    }


def _compare(
    item: str, found: np.ndarray, expected: np.ndarray, tolerance: Tolerance
) -> Comparison:
    if found.shape != expected.shape:
        raise GoldenError(
            f'{item}: the backend gives {found.shape}, the file has {expected.shape}'
        )
    error = float(np.abs(found.astype(np.float64) - expected).max())
    return Comparison(item, error, cosine_similarity(found, expected), tolerance)


def _summary(
    args: argparse.Namespace,
    pipeline: Pipeline,
    golden: Golden,
    precision: str,
    comparisons: list[Comparison],
) -> dict[str, Any]:
    return {
        'checkpoint': str(args.checkpoint),
        'golden': str(args.golden),
        'backend': dict(pipeline.stage_backends),
        'device': pipeline.device,
        'precision': precision,
        'views': golden.views.shape[0],
        'prompt_tokens': golden.tokens.shape[0],
        'horizon': golden.noise.shape[0],
        'items': {
            c.item: {
                'max_abs_error': c.max_abs_error,
                'cosine': c.cosine,
                'tolerance': str(c.tolerance),
                'passed': c.passed,
            }
            for c in comparisons
        },
        'not_compared': list(golden.ignored),
        'passed': all(c.passed for c in comparisons),
    }


def _print(console: Console, summary: dict[str, Any], comparisons: list[Comparison]) -> None:
    stages = ', '.join(f'{stage} {summary["backend"][stage]}' for stage in STAGES)
    table = Table(box=box.SIMPLE_HEAD, title=Path(summary['golden']).name, title_justify='left')
    for heading in ('item', 'max abs error', 'cosine', 'tolerance', ''):
        table.add_column(
            heading, justify='right' if heading in ('max abs error', 'cosine') else 'left'
        )
    for c in comparisons:
        verdict = 'ok' if c.passed else '[bold red]FAILED[/]'
        table.add_row(
            c.item, f'{c.max_abs_error:.3g}', f'{c.cosine:.8f}', str(c.tolerance), verdict
        )
    console.print(
        f'{summary["views"]} views, {summary["prompt_tokens"]} prompt tokens, horizon '
        f'{summary["horizon"]}; {summary["precision"]} on {summary["device"]}: {stages}'
    )
    console.print(table)
    if summary['not_compared']:
        console.print(f'not compared: {", ".join(summary["not_compared"])}')
    console.print('within tolerance' if summary['passed'] else '[bold red]above tolerance[/]')

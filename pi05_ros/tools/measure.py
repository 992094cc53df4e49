"""Measurements of a pipeline and of the machine under it, for ``pi05-ros bench``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pi05_ros.engine.pipeline import Pipeline, StageTimes

from .roofline import Ceilings

PERCENTILES = (50, 95, 99)
_WARM_UP_CALLS = 10


@dataclass(frozen=True)
class Inputs:
    """One drawn observation: images per view, prompt tokens, noise."""

    images: Sequence[np.ndarray]
    tokens: np.ndarray
    noise: np.ndarray

    def with_tokens(self, count: int) -> Inputs:
        """Return the same observation with the first ``count`` prompt tokens."""
        return Inputs(self.images, self.tokens[:count], self.noise)

    def lent_by(self, pipeline: Pipeline) -> Inputs:
        """Return the same with images in the pipeline's own memory, where the node takes them."""
        images = []
        for image in self.images:
            lent = pipeline.image_buffer(image.nbytes)[: image.nbytes].reshape(image.shape)
            lent[...] = image
            images.append(lent)
        return Inputs(images, self.tokens, self.noise)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of many calls: stage name -> percentile -> value."""

    percentiles_ms: dict[str, dict[int, float]]
    calls: int

    def p50_ms(self, stage: str) -> float:
        """Return the median of a stage, such as 'vision' or 'total'."""
        return self.percentiles_ms[stage][50]


@dataclass(frozen=True)
class LinearModel:
    """Latency over Euler steps N: ``fixed_ms + per_step_ms * N``."""

    fixed_ms: float
    per_step_ms: float
    max_error_percent: float


def draw_inputs(
    view_sizes_px: Sequence[tuple[int, int]],
    vocab_size: int,
    prompt_tokens: int,
    noise_shape: tuple[int, int],
    seed: int = 0,
) -> Inputs:
    """Draw an observation. Random, not zeros: arithmetic on zeros runs faster than on data."""
    random = np.random.default_rng(seed)
    return Inputs(
        images=[random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in view_sizes_px],
        tokens=random.integers(0, vocab_size, prompt_tokens),
        noise=random.standard_normal(noise_shape).astype(np.float32),
    )


def time_calls(pipeline: Pipeline, inputs: Inputs, steps: int, calls: int) -> Timing:
    """Run one observation many times back to back, after a warm-up; collect the stage times."""
    run_calls(pipeline, inputs, steps, warm_up_calls(calls))
    return percentiles(run_calls(pipeline, inputs, steps, calls))


def warm_up_calls(calls: int) -> int:
    """Return how many calls come before so many that are measured."""
    return min(_WARM_UP_CALLS, calls)


def run_calls(
    pipeline: Pipeline,
    inputs: Inputs,
    steps: int,
    calls: int,
    wait: Callable[[], None] = lambda: None,
) -> list[StageTimes]:
    """Run one observation many times.

    Args:
        wait: called before each call, outside of what is measured.
    """
    rows = []
    for _ in range(calls):
        wait()
        rows.append(_infer(pipeline, inputs, steps))
    return rows


def percentiles(rows: Sequence[StageTimes]) -> Timing:
    """Return the percentiles of every stage, each on its own."""
    names = [name.removesuffix('_ms') for name in rows[0].as_dict()]
    values = np.array([list(row.as_dict().values()) for row in rows])
    found = np.percentile(values, PERCENTILES, axis=0)
    return Timing(
        {
            name: dict(zip(PERCENTILES, found[:, column].tolist(), strict=True))
            for column, name in enumerate(names)
        },
        len(rows),
    )


def prompt_change_ms(pipeline: Pipeline, inputs: Inputs, steps: int, changes: int) -> float:
    """Return how much longer a call takes when its prompt differs from the last one's.

    Lengths alternate between the whole prompt and a fifth of it; each first call after a change is
    compared with calls of the same prompt that follow.
    """
    short = inputs.with_tokens(max(1, len(inputs.tokens) // 5))
    extra = []
    for index in range(changes):
        chosen = short if index % 2 else inputs
        first, *others = [_infer(pipeline, chosen, steps).total_ms for _ in range(4)]
        extra.append(first - float(np.median(others)))
    return float(np.median(extra))


def fit_steps(total_ms: dict[int, float]) -> LinearModel:
    """Fit a line through (steps, milliseconds); the error is the largest relative deviation."""
    steps = np.array(list(total_ms), dtype=float)
    found = np.array(list(total_ms.values()))
    per_step, fixed = np.polyfit(steps, found, 1)
    error = np.abs(fixed + per_step * steps - found) / found
    return LinearModel(float(fixed), float(per_step), float(error.max()) * 100)


def measure_ceilings(device: torch.device, precision: str) -> Ceilings:
    """Measure the fastest copy and the fastest matrix product of this machine, now."""
    on_gpu = device.type == 'cuda'
    dtype = getattr(torch, precision)
    source = torch.empty(1 << (31 if on_gpu else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device)
    side = 8192 if on_gpu else 1024
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    product = torch.empty_like(left)
    matmul_s = _best_s(lambda: torch.mm(left, right, out=product), device)
    return Ceilings(2 * source.numel() / copy_s, 2 * side**3 / matmul_s)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Return the cosine between two arrays, in double precision."""
    a, b = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _infer(pipeline: Pipeline, inputs: Inputs, steps: int) -> StageTimes:
    return pipeline.infer(inputs.images, inputs.tokens, inputs.noise, steps).times


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a few runs after two unmeasured ones."""
    times = []
    for _ in range(12):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def _synchronise(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)

"""Finds fast block sizes for the denoise stage on the GPU at hand, one kernel at a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from pi05_ros.engine.denoise import DenoiseStage
from pi05_ros.engine.denoise_layers import TritonLayer
from pi05_ros.engine.denoise_tuning import AttentionTiling, DenoiseTuning, GemmTiling
from pi05_ros.engine.pipeline import BackendError

_NORMED = [
    GemmTiling(columns, depth, 1, warps, stages)
    for columns, depth, warps, stages in (
        (16, 128, 4, 4), (16, 256, 4, 3), (32, 64, 4, 4), (32, 64, 4, 6), (32, 128, 4, 3),
        (32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6),
        (64, 64, 8, 4), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 8, 4), (128, 64, 8, 4),
    )
]  # fmt: skip
_RESIDUAL = [
    GemmTiling(columns, depth, splits, warps, stages)
    for columns, depth, splits, warps, stages in (
        (16, 128, 2, 4, 4), (32, 64, 2, 4, 6), (32, 64, 4, 4, 4), (32, 64, 4, 4, 6),
        (32, 128, 2, 4, 4), (32, 128, 4, 4, 3), (32, 128, 4, 4, 4), (32, 128, 4, 4, 6),
        (32, 256, 4, 4, 2), (32, 256, 4, 4, 3), (32, 128, 8, 4, 4), (64, 64, 8, 4, 4),
        (64, 128, 8, 4, 3), (64, 128, 8, 4, 4),
    )
]  # fmt: skip
_ATTENTION = [
    AttentionTiling(rows, keys, splits, warps, stages)
    for rows, keys, splits, warps, stages in (
        (64, 16, 8, 4, 3), (64, 32, 6, 4, 3), (64, 32, 8, 4, 2), (64, 32, 8, 4, 3),
        (64, 32, 12, 4, 2), (64, 64, 6, 4, 2), (64, 64, 7, 4, 2), (64, 64, 8, 8, 1),
        (64, 64, 12, 8, 1), (128, 64, 6, 8, 1), (32, 64, 6, 4, 1),
    )
]  # fmt: skip
CANDIDATES: dict[str, list[Any]] = {
    'gate_up': _NORMED,
    'down': _RESIDUAL,
    'attention_out': _RESIDUAL,
    'qkv': _NORMED,
    'attention': _ATTENTION,
    'merge_warps': [1, 2, 4, 8],
    'pdl': [True, False],
}
# A choice that asks for more shared memory, registers or a smaller shape than there is.
UNFIT = (OutOfResources, CompilationError, BackendError)


def time_run_us(stage: DenoiseStage, num_steps: int, replays: int = 20) -> float:
    """Return the median microseconds of a graph replay of ``stage.launch(num_steps)``."""
    return time_graph_us(lambda: stage.launch(num_steps), replays)


def time_graph_us(enqueue: Callable[[], object], replays: int = 20) -> float:
    """Return the median microseconds per replay of a CUDA graph of what ``enqueue`` launches."""
    enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    for _ in range(3):
        graph.replay()
    times_us = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times_us)


def tune(
    stage: DenoiseStage,
    report: Callable[[str, Any, float | str], None],
    num_steps: int = 3,
    candidates: dict[str, list[Any]] | None = None,
) -> DenoiseTuning:
    """Try every candidate of every field, keeping the fastest before the next field.

    Args:
        stage: gets the result; its weights and prefix must be realistic random values.
        report: called with field, candidate, and microseconds per step or why it cannot run.
    """
    for field, choices in (candidates or CANDIDATES).items():
        best = _tuning(stage)
        best_us = time_run_us(stage, num_steps)
        for choice in choices:
            try:
                stage.use_tuning(replace(best, **{field: choice}))
                time_us = time_run_us(stage, num_steps)
            except UNFIT as unfit:
                report(field, choice, f'{type(unfit).__name__}: {unfit}'.splitlines()[0])
                continue
            report(field, choice, time_us / num_steps)
            if time_us < best_us:
                best, best_us = _tuning(stage), time_us
        stage.use_tuning(best)
    return _tuning(stage)


def _tuning(stage: DenoiseStage) -> DenoiseTuning:
    if not isinstance(stage.layer, TritonLayer):
        raise BackendError(f'only the Triton kernels have block sizes, not {stage.backend}')
    return stage.layer.tuning

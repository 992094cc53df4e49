"""Finds fast block sizes for the denoise stage on the GPU at hand, one kernel at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from pi05_ros.engine.denoise import DenoiseStage
from pi05_ros.engine.denoise_tuning import AttentionTiling, DenoiseTuning, GemmTiling
from pi05_ros.engine.pipeline import BackendError

# What bounds these kernels on a GH100 is the traffic between L2 and the multiprocessors and the
# latency at both ends. Every tile of columns reads all activations again, so wide tiles read less
# and narrow ones spread over more multiprocessors; both are here, each shallow enough in shared
# memory for two kernels per multiprocessor, and so deep that all operands are asked for at once.
_QKV = [
    GemmTiling(columns, depth, 1, warps, stages)
    for columns, depth, warps, stages in (
        (16, 128, 4, 4), (16, 256, 4, 2), (16, 256, 4, 3), (16, 256, 4, 5), (32, 128, 4, 4),
        (32, 128, 4, 6), (32, 128, 4, 9), (32, 128, 8, 4), (32, 256, 4, 4), (64, 64, 4, 6),
        (64, 128, 4, 3), (64, 128, 4, 6), (64, 128, 8, 4),
    )
]  # fmt: skip
_GATE_UP = [
    GemmTiling(columns, depth, 1, warps, stages)
    for columns, depth, warps, stages in (
        (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 6), (64, 128, 8, 3), (64, 128, 8, 4),
        (64, 128, 8, 6), (64, 256, 8, 3), (128, 64, 8, 6), (128, 128, 8, 4),
    )
]  # fmt: skip
_ATTENTION_OUT = [
    GemmTiling(columns, depth, splits, warps, stages)
    for columns, depth, splits, warps, stages in (
        (16, 128, 2, 4, 4), (16, 256, 1, 4, 4), (16, 256, 2, 4, 3), (32, 128, 2, 4, 4),
        (32, 128, 2, 4, 6), (32, 128, 4, 4, 4), (32, 256, 2, 4, 4), (64, 128, 4, 4, 4),
        (64, 128, 4, 8, 4),
    )
]  # fmt: skip
_DOWN = [
    GemmTiling(columns, depth, splits, warps, stages)
    for columns, depth, splits, warps, stages in (
        (32, 128, 4, 4, 4), (32, 128, 4, 4, 6), (32, 128, 4, 4, 9), (32, 256, 4, 4, 3),
        (32, 256, 4, 4, 4), (64, 64, 4, 4, 6), (64, 128, 4, 4, 4), (64, 128, 4, 8, 4),
        (64, 128, 4, 8, 6), (64, 128, 8, 4, 3),
    )
]  # fmt: skip
_ATTENTION = [
    AttentionTiling(rows, keys, splits, warps, stages)
    for rows, keys, splits, warps, stages in (
        (64, 16, 16, 4, 3), (64, 32, 8, 4, 2), (64, 32, 8, 4, 3), (64, 32, 8, 8, 2),
        (64, 32, 12, 4, 2), (64, 64, 6, 8, 2), (64, 64, 12, 8, 1),     )
]  # fmt: skip
# How kernels start comes first: it decides how many of them share a multiprocessor.
STARTS: list[dict[str, Any]] = [
    {'pdl': True, 'prefetch': True},
    {'pdl': True, 'prefetch': False},
    {'pdl': False, 'prefetch': False},
]
# The columns of down and attention_out decide how many parts the norm behind them adds, so they
# come before qkv and gate_up, whose programs depend on it.
CANDIDATES: list[dict[str, Any]] = [
    {field: choice}
    for field, choices in (
        ('attention', _ATTENTION), ('merge_warps', [1, 2, 4]), ('down', _DOWN),
        ('attention_out', _ATTENTION_OUT), ('qkv', _QKV), ('gate_up', _GATE_UP),
    )
    for choice in choices
]  # fmt: skip
_LEAST_COSINE = 0.999
# A choice that asks for more shared memory, registers or a smaller shape than there is.
UNFIT = (TritonError, RuntimeError, BackendError)


def programs(base: DenoiseTuning) -> list[DenoiseTuning]:
    """Return tunings that together use every kernel program that :func:`tune` may run.

    Those that it is least likely to need come last.
    """
    started = [replace(base, **start) for start in STARTS]
    usual = [replace(s, **change) for s in started if s.pdl for change in CANDIDATES]
    other_parts = [
        replace(s, **{producer: replace(getattr(base, producer), columns=columns), field: tiling})
        for field, tilings, producer, choices in (
            ('qkv', _QKV, 'down', _DOWN), ('gate_up', _GATE_UP, 'attention_out', _ATTENTION_OUT)
        )
        for columns in sorted({c.columns for c in choices} - {getattr(base, producer).columns})
        for s in started if s.pdl
        for tiling in tilings
    ]  # fmt: skip
    return started + usual + other_parts


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
    report: Callable[[dict[str, Any], float | str], None],
    num_steps: int = 3,
    seconds: float = 3600.0,
) -> DenoiseTuning:
    """Try :data:`STARTS`, then :data:`CANDIDATES`, keeping whatever is right and faster.

    Args:
        stage: runs the Triton kernels and gets the result; its weights and prefix must be
            realistic random values.
        report: called with what was changed, and microseconds per step or why it cannot run.
        seconds: what is left of the candidates after this time is not tried.
    Raises:
        BackendError: the stage runs the Hopper kernels.
    """
    end = time.perf_counter() + seconds
    expected = stage.eager(num_steps)
    best, best_us = stage.tuning, time_run_us(stage, num_steps)
    if best is None:
        raise BackendError('the Hopper kernels have no block sizes to tune')
    for change in STARTS + CANDIDATES:
        if time.perf_counter() > end:
            report(change, 'no time left for this and the rest')
            break
        candidate = replace(best, **change)
        if candidate == best:
            continue
        try:
            stage.use_tuning(candidate)
            time_us = time_run_us(stage, num_steps)
        except UNFIT as unfit:
            report(change, f'{type(unfit).__name__}: {unfit}'.splitlines()[0])
            continue
        if not _agrees(stage.actions, expected):
            report(change, 'wrong actions')
            continue
        report(change, time_us / num_steps)
        if time_us < best_us:
            best, best_us = candidate, time_us
    stage.use_tuning(best)
    return best


def _agrees(actions: Tensor, expected: Tensor) -> bool:
    """Return whether a run computed what its plain twin does; False for what is not a number."""
    cosine = torch.cosine_similarity(actions.flatten(), expected.flatten(), dim=0)
    return cosine.item() >= _LEAST_COSINE

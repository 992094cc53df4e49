"""Find the fastest GEMM algorithms and block sizes of a built pipeline, by timing them.

Each candidate runs over every layer's own operands inside a CUDA graph, so that weights come from
device memory and launches cost what they cost in a call. Results are scratch: nothing that a call
reads is changed, apart from buffers that every call rewrites.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from .kernels import geglu, prefill_attention, vision_attention
from .kernels.cublaslt import LinearSignature, signature_of
from .ops import FusedOps
from .tuning import TunedChoices

_FINALISTS = 4
# A challenger must be this much faster than the default to be stored: less is noise.
_MIN_GAIN = 0.01

_KERNEL_CANDIDATES: dict[str, list[dict[str, int]]] = {
    'vision_attention': [
        {'block_m': rows, 'warps': warps}
        for rows, warps in product((32, 64, 128), (4, 8))
    ],
    'prefill_attention': [
        {'block_m': rows, 'block_n': keys, 'warps': warps, 'stages': stages}
        for rows, keys, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    ],
    'geglu': [
        {'block': columns, 'warps': warps}
        for columns, warps in product((1024, 2048, 4096, 8192), (4, 8))
    ],
}
_KERNELS = {
    'vision_attention': vision_attention.vision_attention,
    'prefill_attention': prefill_attention.prefill_attention,
    'geglu': geglu.geglu,
}


@dataclass(frozen=True)
class TunedKernel:
    """One result, in microseconds per launch."""

    key: str
    default_us: float
    best_us: float
    tried: int


@dataclass(frozen=True)
class _LinearCall:
    arguments: tuple[torch.Tensor, torch.Tensor]
    out: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    gelu: bool


def tune_stage(
    ops: FusedOps, launch: Callable[[], None], stream: torch.cuda.Stream
) -> tuple[TunedChoices, list[TunedKernel]]:
    """Time every candidate for each operation of a stage.

    Args:
        ops: what the stage runs on.
        launch: enqueues the stage.
        stream: where to capture and run.
    Returns: the choices to store, and what was gained.
    """
    with _recorded(ops) as (linears, kernels), torch.cuda.stream(stream):
        launch()
    stream.synchronize()
    algorithms, chosen, results = {}, {}, []
    for signature, calls in linears.items():
        best, result = _tune_linear(ops, signature, calls, stream)
        results.append(result)
        if best is not None:
            algorithms[signature.key] = best
            ops.gemm.use(signature, best)
    for key, (name, arguments) in kernels.items():
        settings, result = _tune_kernel(key, name, arguments, stream)
        results.append(result)
        if settings is not None:
            chosen[key] = settings
    choices = TunedChoices(
        gpu=ops.choices.gpu,
        cublaslt_version=ops.gemm.version(),
        algorithms=algorithms,
        kernels=chosen,
        source='timed now',
    )
    return choices, results


def graph_time_us(
    run: Callable[[], Any], launches: int, stream: torch.cuda.Stream, replays: int
) -> float:
    """Return the median microseconds per launch of ``run`` captured into a graph."""
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        marks[0].record(stream)
        for mark in marks[1:]:
            graph.replay()
            mark.record(stream)
        stream.synchronize()
    pairs = zip(marks[:-1], marks[1:], strict=True)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3 / launches


@contextmanager
def _recorded(
    ops: FusedOps,
) -> Iterator[tuple[dict[LinearSignature, list[_LinearCall]], dict[str, Any]]]:
    """Note the operands of every call while it runs as usual."""
    linears: dict[LinearSignature, list[_LinearCall]] = {}
    kernels: dict[str, Any] = {}
    linear = ops.linear

    def record_linear(x, weight, out, *, bias=None, residual=None, gelu=False) -> None:
        signature = signature_of(x, weight, out, bias, residual, gelu)
        call = _LinearCall((x, weight), out, bias, residual, gelu)
        linears.setdefault(signature, []).append(call)
        linear(x, weight, out, bias=bias, residual=residual, gelu=gelu)

    def recorder(name: str) -> Callable[..., None]:
        original = getattr(ops, name)

        def record(first: torch.Tensor, *arguments: Any) -> None:
            kernels.setdefault(f'{name}-{first.shape[0]}', (name, (first, *arguments)))
            original(first, *arguments)

        return record

    replaced: Mapping[str, Any] = {name: recorder(name) for name in _KERNELS}
    vars(ops).update(replaced, linear=record_linear)
    try:
        yield linears, kernels
    finally:
        for name in replaced:
            del vars(ops)[name]
        ops.linear = linear


def _tune_linear(
    ops: FusedOps,
    signature: LinearSignature,
    calls: Sequence[_LinearCall],
    stream: torch.cuda.Stream,
) -> tuple[str | None, TunedKernel]:
    scratch = torch.empty_like(calls[0].out)

    def run_with(algorithm: str) -> Callable[[], None]:
        def run() -> None:
            ops.gemm.use(signature, algorithm)
            for call in calls:
                ops.gemm.linear(
                    *call.arguments, scratch, bias=call.bias, residual=call.residual, gelu=call.gelu
                )

        return run

    candidates = ops.gemm.candidates(signature)
    times = _race([run_with(candidate) for candidate in candidates], len(calls), stream)
    best = min(times, key=times.__getitem__)
    ops.gemm.use(signature, candidates[0])
    result = TunedKernel(signature.key, times[0], times[best], len(candidates))
    return candidates[best] if times[best] < times[0] * (1 - _MIN_GAIN) else None, result


def _tune_kernel(
    key: str, name: str, arguments: tuple[Any, ...], stream: torch.cuda.Stream
) -> tuple[dict[str, int] | None, TunedKernel]:
    module = {'geglu': geglu, 'prefill_attention': prefill_attention}.get(name, vision_attention)
    default = dict(module.DEFAULT_LAUNCH)
    candidates = [default] + [c for c in _KERNEL_CANDIDATES[name] if c != default]
    launches = 10

    def run_with(settings: dict[str, int]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(launches):
                _KERNELS[name](*arguments, launch=settings)

        return run

    times = _race([run_with(candidate) for candidate in candidates], launches, stream)
    best = min(times, key=times.__getitem__)
    result = TunedKernel(key, times[0], times[best], len(candidates))
    return candidates[best] if times[best] < times[0] * (1 - _MIN_GAIN) else None, result


def _race(
    runs: Sequence[Callable[[], None]], launches: int, stream: torch.cuda.Stream
) -> dict[int, float]:
    """Time all quickly, then the fastest and the default again with more replays.

    A candidate that this GPU cannot launch (too much shared memory, say) is left out; the
    default, index 0, must run.
    """
    quick: dict[int, float] = {}
    for index, run in enumerate(runs):
        try:
            quick[index] = graph_time_us(run, launches, stream, 5)
        except Exception:
            if index == 0:
                raise
    finalists = {0, *sorted(quick, key=quick.__getitem__)[:_FINALISTS]}
    return {
        index: min(graph_time_us(runs[index], launches, stream, 15) for _ in range(2))
        for index in sorted(finalists)
    }

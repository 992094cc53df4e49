"""Find the fastest GEMM algorithms and block sizes of a built pipeline, by timing them.

Each candidate runs over every layer's own operands inside a CUDA graph, so that weights come from
device memory and launches cost what they cost in a call. Results go to scratch memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from .kernels import prefill_attention, vision_attention
from .kernels.cublaslt import LinearSignature, signature_of
from .ops import FusedOps
from .tuning import TunedChoices

_FINALISTS = 4
# A challenger must be this much faster than the default to be preferred: less is noise.
_MIN_GAIN = 0.01
_QUICK_CALLS = 6

_KERNELS: dict[str, tuple[ModuleType, list[dict[str, int]]]] = {
    'vision_attention': (
        vision_attention,
        [{'block_m': 32, 'warps': 4}, {'block_m': 128, 'warps': 8}],
    ),
    'prefill_attention': (
        prefill_attention,
        [
            {'block_m': 64, 'block_n': 64, 'warps': 4, 'stages': 2},
            {'block_m': 64, 'block_n': 32, 'warps': 4, 'stages': 4},
            {'block_m': 128, 'block_n': 64, 'warps': 8, 'stages': 2},
        ],
    ),
}


@dataclass(frozen=True)
class TunedKernel:
    """One result, in microseconds per launch."""

    key: str
    default_us: float
    best_us: float
    tried: int


@dataclass(frozen=True)
class LinearCall:
    """The operands of one linear layer."""

    x: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    gelu: bool


@dataclass(frozen=True)
class Recording:
    """What the launches of a pipeline consist of."""

    linears: dict[LinearSignature, list[LinearCall]]
    kernels: dict[str, tuple[str, tuple[Any, ...]]]


def tune(
    ops: FusedOps, launches: Sequence[Callable[[], None]], stream: torch.cuda.Stream
) -> tuple[TunedChoices, list[TunedKernel]]:
    """Time every candidate for each operation of some stages.

    Args:
        ops: what the stages run on.
        launches: each enqueues a stage, or a stage for one number of rows.
        stream: where to capture and run.
    Returns: the choices to store, and what was gained.
    """
    with _recorded(ops) as recording, torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    algorithms, kernels, results = {}, {}, []
    for signature, calls in recording.linears.items():
        relatives = [s for s in recording.linears if replace(s, rows=signature.rows) == signature]
        algorithm, result = _tune_linear(ops, signature, relatives, calls, stream)
        results.append(result)
        algorithms[signature.key] = algorithm
    for key, (name, arguments) in recording.kernels.items():
        launch_settings, result = _tune_kernel(key, name, arguments, stream)
        results.append(result)
        if launch_settings is not None:
            kernels[key] = launch_settings
    choices = TunedChoices(
        ops.choices.gpu, ops.gemm.version(), algorithms, kernels, source='timed now'
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
def _recorded(ops: FusedOps) -> Iterator[Recording]:
    """Note the operands of every call while it runs as usual."""
    recording = Recording({}, {})
    linear = ops.linear

    def record_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gelu: bool = False,
    ) -> None:
        signature = signature_of(x, weight, out, bias, residual, gelu)
        call = LinearCall(x, weight, out, bias, residual, gelu)
        recording.linears.setdefault(signature, []).append(call)
        linear(x, weight, out, bias=bias, residual=residual, gelu=gelu)

    def recorder(name: str) -> Callable[..., None]:
        original = getattr(ops, name)

        def record(first: torch.Tensor, *arguments: Any) -> None:
            key = f'{name}-{first.shape[0]}'
            recording.kernels.setdefault(key, (name, (first, *arguments)))
            original(first, *arguments)

        return record

    replaced = {name: recorder(name) for name in ops.tuned_kernels}
    vars(ops).update(replaced, linear=record_linear)
    try:
        yield recording
    finally:
        for name in replaced:
            del vars(ops)[name]
        ops.linear = linear


def _tune_linear(
    ops: FusedOps,
    signature: LinearSignature,
    relatives: Sequence[LinearSignature],
    calls: Sequence[LinearCall],
    stream: torch.cuda.Stream,
) -> tuple[str, TunedKernel]:
    """Return the algorithm to store; that may be the first guess, which others take as well."""
    scratch = torch.empty_like(calls[0].out)
    calls = calls[:_QUICK_CALLS]

    def run_with(algorithm: str) -> Callable[[], None]:
        def run() -> None:
            ops.gemm.use(signature, algorithm)
            for call in calls:
                ops.gemm.linear(
                    call.x,
                    call.weight,
                    scratch,
                    bias=call.bias,
                    residual=call.residual,
                    gelu=call.gelu,
                )

        return run

    candidates = ops.gemm.candidates(signature, relatives)
    times = _race([run_with(candidate) for candidate in candidates], len(calls), stream)
    best = _winner(times)
    ops.gemm.use(signature, candidates[best])
    result = TunedKernel(signature.key, times[0], times[best], len(candidates))
    return candidates[best], result


def _tune_kernel(
    key: str, name: str, arguments: tuple[Any, ...], stream: torch.cuda.Stream
) -> tuple[dict[str, int] | None, TunedKernel]:
    module, others = _KERNELS[name]
    kernel, launches = getattr(module, name), 10
    candidates = [module.default_launch(arguments[0].device), *others]

    def run_with(settings: dict[str, int]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(launches):
                kernel(*arguments, launch=settings)

        return run

    times = _race([run_with(candidate) for candidate in candidates], launches, stream)
    best = _winner(times)
    result = TunedKernel(key, times[0], times[best], len(candidates))
    return (candidates[best] if best else None), result


def _winner(times: dict[int, float]) -> int:
    """Return the fastest, or 0, the default, where nothing is clearly faster."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < times[0] * (1 - _MIN_GAIN) else 0


def _race(
    runs: Sequence[Callable[[], None]], launches: int, stream: torch.cuda.Stream
) -> dict[int, float]:
    """Time all quickly, then the fastest and the default, index 0, with more replays."""
    quick = [graph_time_us(run, launches, stream, 4) for run in runs]
    finalists = {0, *sorted(range(len(runs)), key=quick.__getitem__)[:_FINALISTS]}
    return {
        index: min(graph_time_us(runs[index], launches, stream, 15) for _ in range(2))
        for index in sorted(finalists)
    }

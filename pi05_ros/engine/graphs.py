"""CUDA graphs of the stages, and the events that time them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from triton.errors import TritonError

from .pipeline import BackendError


def make_current(stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
    """Return a context in which the stream is the current one; enter it often, but not nested.

    That is the stream itself where PyTorch has it so, in C++; the context in Python asks for the
    device, makes an object for the stream before, and compares devices, on every entry.
    """
    return stream if hasattr(stream, '__enter__') else torch.cuda.stream(stream)


class StageGraph:
    """One captured sequence of kernels; replaying it allocates and synchronises nothing.

    Args:
        name: for errors.
        launch: enqueues the kernels on the current stream; reads and writes static buffers only.
        stream: the stream on which it is captured and replayed.
        pool: memory that captures share, from :func:`torch.cuda.graph_pool_handle`.
    Raises:
        BackendError: a kernel does not compile or fit here, or the driver cannot capture.
    """

    def __init__(
        self, name: str, launch: Callable[[], None], stream: torch.cuda.Stream, pool: Any
    ) -> None:
        try:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                launch()  # compiles kernels and creates handles, which a capture may not
                stream.synchronize()
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                launch()
        except (RuntimeError, TritonError) as error:
            raise BackendError(f'{name}: the CUDA graph cannot be captured: {error}') from error

    def replay(self) -> None:
        """Enqueue the graph on the current stream."""
        self.graph.replay()


class StageClock:
    """CUDA events between the stages of a call.

    Where a mark is captured, every replay of the graph records the event anew, and the host makes
    no call for it between two graphs.

    Raises:
        BackendError: this PyTorch records no events in graphs.
    """

    def __init__(self, marks: int) -> None:
        try:
            events = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(marks)]
        except TypeError:  # `external` came with 2.8
            raise BackendError(
                f'PyTorch {torch.__version__} records no events in graphs; install 2.8 or newer'
            ) from None
        self.events = events

    def mark(self, index: int, stream: torch.cuda.Stream) -> None:
        """Record event ``index`` on the stream."""
        self.events[index].record(stream)

    def intervals_ms(self, first: int, last: int) -> list[float]:
        """Wait on the host for event ``last``; return the milliseconds from ``first`` on.

        Each interval between two events is read when the latter has passed, while the device goes
        on with the next.
        """
        intervals = []
        for begin, end in pairwise(self.events[first : last + 1]):
            end.synchronize()
            intervals.append(begin.elapsed_time(end))
        return intervals

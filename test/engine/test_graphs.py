"""A stage that cannot be captured is an error when the pipeline is built."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from triton.runtime.errors import OutOfResources

from pi05_ros.engine.graphs import StageGraph
from pi05_ros.engine.pipeline import BackendError


class FakeStream:
    """Stands in for a CUDA stream, which a test on the CPU does not have."""

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize(
    'failure',
    [
        RuntimeError('operation not permitted when stream is capturing'),
        OutOfResources(300_000, 232_448, 'shared memory'),
    ],
    ids=['driver', 'shared-memory'],
)
def test_a_stage_that_cannot_be_captured_is_named(monkeypatch, failure):
    def launch() -> None:
        raise failure

    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: None)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    with pytest.raises(BackendError, match='prefill of 712 rows: the CUDA graph cannot be'):
        StageGraph('prefill of 712 rows', launch, FakeStream(), None)

"""A stage that cannot be captured is an error when the pipeline is built; stages are timed."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime.errors import OutOfResources

from pi05_ros.engine.cuda_pipeline import CudaPipeline
from pi05_ros.engine.graphs import StageClock, StageGraph
from pi05_ros.engine.pipeline import BackendError, PipelineShape
from pi05_ros.model.config import Pi05Config


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


def test_an_interval_is_read_before_the_next_event_is_waited_for(monkeypatch):
    calls: list[str] = []

    class Event:
        def __init__(self, **options: object) -> None:
            self.time_ms = 0.0

        def record(self, stream: float) -> None:
            self.time_ms = stream

        def synchronize(self) -> None:
            calls.append(f'wait {self.time_ms}')

        def elapsed_time(self, end: Event) -> float:
            calls.append(f'read to {end.time_ms}')
            return end.time_ms - self.time_ms

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    clock = StageClock(4)
    for index, time_ms in enumerate((1.0, 3.0, 7.0, 15.0)):
        clock.mark(index, time_ms)
    assert clock.intervals_ms(0, 2) == [2.0, 4.0]
    assert calls == ['wait 3.0', 'read to 3.0', 'wait 7.0', 'read to 7.0']
    assert clock.intervals_ms(2, 3) == [8.0]


def test_a_refused_call_waits_for_the_images_that_were_sent():
    pipeline, waits = object.__new__(CudaPipeline), []
    pipeline.shape, pipeline.config = PipelineShape(((4, 6),), 8, 5), Pi05Config.tiny()
    pipeline._stream = SimpleNamespace(synchronize=lambda: waits.append('stream'))
    noise = np.zeros((5, pipeline.config.action_dim), np.float32)
    for tokens, match in (
        (np.zeros(9, int), '1 to 8 prompt tokens'),
        (np.array([-1]), 'token -1'),
    ):
        with pytest.raises(BackendError, match=match):
            pipeline._send_rest(tokens, noise, None)
    assert waits == ['stream'] * 2


def test_an_old_pytorch_is_an_error_that_says_which_is_needed(monkeypatch):
    def event(enable_timing: bool = False) -> object:
        return object()

    monkeypatch.setattr(torch.cuda, 'Event', event)
    with pytest.raises(BackendError, match='install 2.8 or newer'):
        StageClock(2)

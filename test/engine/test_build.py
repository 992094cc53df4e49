from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pi05_ros.engine.build import build_pipeline
from pi05_ros.engine.eager import EagerPipeline
from pi05_ros.engine.pipeline import BackendError, PipelineShape
from pi05_ros.model.checkpoint import Checkpoint, open_checkpoint

SHAPE = PipelineShape(((224, 224),), max_prompt_tokens=10, horizon=10)


@pytest.fixture(scope='module')
def checkpoint() -> Checkpoint:
    return open_checkpoint(Path(__file__).parents[1] / 'data' / 'golden' / 'pi05_tiny')


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)


@pytest.mark.usefixtures('no_gpu')
@pytest.mark.parametrize('backend', ['auto', 'eager'])
def test_without_a_gpu_eager_runs_on_the_cpu_and_the_log_says_so(
    checkpoint: Checkpoint, backend: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        pipeline = build_pipeline(checkpoint, SHAPE, backend=backend, precision='float32')
    assert isinstance(pipeline, EagerPipeline)
    assert (pipeline.device, pipeline.precision) == ('cpu', 'float32')
    assert f'backend {backend} asked for, eager runs on cpu in float32' in caplog.text


@pytest.mark.usefixtures('no_gpu')
@pytest.mark.parametrize(
    'options,message',
    [
        ({'backend': 'fast'}, "unknown backend 'fast'; known: auto, eager, cuda, tensorrt"),
        ({'precision': 'float16'}, "unknown precision 'float16'; known: float32, bfloat16"),
        ({'backend': 'cuda'}, "backend 'cuda' needs an NVIDIA GPU, and PyTorch .* finds none"),
        ({'backend': 'cuda', 'device': 'cpu'}, "backend 'cuda' needs an NVIDIA GPU, device is"),
        ({'backend': 'tensorrt', 'device': 'cpu'}, "'tensorrt' is not available in this version"),
        ({'device': 'cuda'}, "device 'cuda' asked for, but PyTorch .* finds no NVIDIA GPU"),
        ({'device': 'cuda:0'}, "device 'cuda:0' asked for, but PyTorch"),
        ({'device': 'mps'}, "unknown device 'mps'; known: 'auto', 'cpu', 'cuda', 'cuda:N'"),
        ({'device': 'gpu 1'}, "unknown device 'gpu 1'"),
    ],
)
def test_what_cannot_run_here_is_refused(
    checkpoint: Checkpoint, options: dict[str, str], message: str
):
    with pytest.raises(BackendError, match=message):
        build_pipeline(checkpoint, SHAPE, **options)


@pytest.mark.parametrize(
    'shape,message',
    [
        (PipelineShape(((0, 224),), 10, 10), 'camera sizes must be at least 1, got 0'),
        (PipelineShape(((224, 224),), 0, 10), 'max_prompt_tokens must be at least 1, got 0'),
        (PipelineShape(((224, 224),), 10, 0), 'horizon must be at least 1, got 0'),
        (PipelineShape(((224, 224),), 10, 10, num_steps=0), 'num_steps must be at least 1, got 0'),
        (PipelineShape(((224, 224),), 10, 10, num_steps=11), 'num_steps 11 exceeds max_steps 10'),
    ],
)
def test_a_shape_that_no_call_could_fit_is_refused(
    checkpoint: Checkpoint, shape: PipelineShape, message: str
):
    with pytest.raises(BackendError, match=message):
        build_pipeline(checkpoint, shape, device='cpu')


def test_a_device_without_memory_is_an_error_that_names_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError('tried to allocate 2 GiB')

    monkeypatch.setattr('pi05_ros.engine.build.load_model', full)
    with pytest.raises(BackendError, match='cpu has too little free memory .* 2 GiB'):
        build_pipeline(checkpoint, SHAPE, backend='eager', device='cpu')


def test_engine_and_model_need_no_ros():
    program = (
        'import sys, pi05_ros.engine.build, pi05_ros.model.checkpoint; '
        "assert 'rclpy' not in sys.modules"
    )
    subprocess.run([sys.executable, '-c', program], check=True)

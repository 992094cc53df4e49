from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pi05_ros.engine.build import build_pipeline, choose_backend
from pi05_ros.engine.eager import EagerPipeline
from pi05_ros.engine.pipeline import BackendError, PipelineShape
from pi05_ros.model.checkpoint import Checkpoint, load_model, open_checkpoint

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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend to a GPU; tests set what it can do."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Test GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    return monkeypatch


def test_auto_takes_the_gpu_backend_where_there_is_a_gpu(gpu: pytest.MonkeyPatch):
    assert choose_backend('auto', 'auto') == ('cuda', torch.device('cuda', 0))


def test_auto_falls_back_on_an_old_gpu_and_the_log_says_why(
    checkpoint: Checkpoint, gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    gpu.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    gpu.setattr(
        'pi05_ros.engine.build.load_model', lambda path, device, precision: load_model(path)
    )
    with caplog.at_level(logging.WARNING):
        pipeline = build_pipeline(checkpoint, SHAPE)
    assert isinstance(pipeline, EagerPipeline)
    assert 'auto asked for, eager runs on cuda:0' in caplog.text
    assert 'compute capability 7.5' in caplog.text


def test_cuda_asked_for_on_an_old_gpu_is_refused_before_loading(
    checkpoint: Checkpoint, gpu: pytest.MonkeyPatch
):
    gpu.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    gpu.setattr('pi05_ros.engine.cuda_pipeline.load_state', None)
    with pytest.raises(BackendError, match=r'Test GPU has compute capability 7\.5'):
        build_pipeline(checkpoint, SHAPE, backend='cuda')


def test_without_triton_cuda_is_refused_and_auto_says_so(gpu: pytest.MonkeyPatch):
    gpu.setattr('pi05_ros.engine.build.find_spec', lambda name: None)
    with pytest.raises(BackendError, match='needs Triton, which is not installed'):
        choose_backend('cuda', 'auto')
    assert choose_backend('auto', 'auto')[0] == 'eager'


def test_engine_and_model_need_no_ros():
    program = (
        'import sys, pi05_ros.engine.build, pi05_ros.model.checkpoint; '
        "assert 'rclpy' not in sys.modules"
    )
    subprocess.run([sys.executable, '-c', program], check=True)

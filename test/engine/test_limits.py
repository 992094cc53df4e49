"""What the CUDA backend refuses, and what the refusal says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pi05_ros.engine import limits
from pi05_ros.engine.pipeline import BackendError, PipelineShape
from pi05_ros.model.config import Pi05Config

FULL = Pi05Config.full()
SHAPE = PipelineShape(((480, 640),) * 2, 200, 50)
GPU = torch.device('cuda', 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to a GPU; tests set what it answers."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Old GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 0)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 0)
    return monkeypatch


def test_a_cpu_is_refused():
    with pytest.raises(BackendError, match="needs an NVIDIA GPU, got device 'cpu'"):
        limits.check_device(torch.device('cpu'))


def test_an_old_gpu_is_refused_with_its_capability(gpu):
    gpu.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    with pytest.raises(BackendError, match=r'Old GPU has compute capability 7\.5; .* 8\.0'):
        limits.check_device(GPU)


def test_too_little_memory_is_refused_with_what_is_needed(gpu):
    gpu.setattr(torch.cuda, 'mem_get_info', lambda device: (int(4e9), int(8e9)))
    with pytest.raises(BackendError, match=r'has 4\.0 GB of 8\.0 GB free, .* about 9\.\d GB'):
        limits.check_memory(FULL, SHAPE, 'bfloat16', GPU)


def test_enough_memory_is_accepted(gpu):
    gpu.setattr(torch.cuda, 'mem_get_info', lambda device: (int(12e9), int(16e9)))
    limits.check_memory(FULL, SHAPE, 'bfloat16', GPU)


def test_the_released_and_the_tiny_model_fit():
    limits.check_limits(FULL, SHAPE)
    limits.check_limits(Pi05Config.tiny(), SHAPE)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        (replace(SHAPE, view_sizes_px=((480, 640),) * 4), '4 views .* takes 1 to 3'),
        (replace(SHAPE, view_sizes_px=()), '0 views .* takes 1 to 3'),
        (replace(SHAPE, max_prompt_tokens=201), 'max_prompt_tokens 201 is outside 1 to 200'),
        (replace(SHAPE, horizon=4096), 'horizon 4096 is outside 1 to 512'),
        (replace(SHAPE, num_steps=11), 'num_steps 11 is outside 1 to 10'),
    ],
    ids=['views', 'no-view', 'prompt', 'horizon', 'steps'],
)
def test_a_shape_beyond_the_model_is_refused(shape, message):
    with pytest.raises(BackendError, match=message):
        limits.check_limits(FULL, shape)


@pytest.mark.parametrize(
    ('part', 'change', 'message'),
    [
        ('vlm', {'head_dim': 96}, 'head_dim 96 is no power of two from 16 to 256'),
        ('vlm', {'num_kv_heads': 2}, 'shares one K/V head, the model has 2'),
        ('vlm', {'mlp_dim': 1001}, 'vlm mlp_dim 1001 is no multiple of 8'),
        ('vision', {'patch_px': 4}, 'vision has 3136 tokens of head_dim 72'),
    ],
    ids=['head-dim', 'kv-heads', 'width', 'tokens'],
)
def test_dimensions_that_the_kernels_cannot_take_are_refused(part, change, message):
    config = replace(FULL)
    object.__setattr__(config, part, replace(getattr(FULL, part), **change))
    with pytest.raises(BackendError, match=message):
        limits.check_limits(config, SHAPE)

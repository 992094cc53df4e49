"""Which language models and GPUs get the prefill's kernels for Hopper."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pi05_ros.engine import hopper_ops
from pi05_ros.engine.hopper_ops import HopperOps, choose_ops, hopper_ops_obstacle
from pi05_ros.engine.kernels import nvrtc
from pi05_ros.engine.kernels.hopper_vision_product import order_features
from pi05_ros.engine.ops import FusedOps
from pi05_ros.engine.tuning import TunedChoices
from pi05_ros.model.config import Pi05Config

_FULL = Pi05Config.full()
_VLM = _FULL.vlm


@pytest.mark.parametrize(
    ('capability', 'vlm', 'reason'),
    [
        ((9, 0), _VLM, None),
        ((8, 9), _VLM, 'cuda is no Hopper GPU'),
        ((10, 0), _VLM, 'cuda is no Hopper GPU'),
        ((9, 0), replace(_VLM, head_dim=128), 'heads of 256 columns, not 128'),
        ((9, 0), replace(_VLM, mlp_dim=1000), 'the MLP width 1000 of 128'),
        ((9, 0), replace(_VLM, width=1920), 'the width 1920 of 256'),
    ],
    ids=['released', 'ada', 'blackwell', 'head-size', 'mlp-width', 'width'],
)
def test_the_released_model_on_a_hopper_gpu_fits(monkeypatch, capability, vlm, reason):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    obstacle = hopper_ops_obstacle(vlm, torch.device('cuda'))
    assert obstacle is None if reason is None else reason in obstacle


@pytest.fixture
def named(monkeypatch):
    """Let the choice be made on a Hopper GPU, by name."""
    device = torch.device('cuda')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: properties)
    monkeypatch.setattr(hopper_ops, 'HopperOps', lambda *arguments: 'HopperOps')
    monkeypatch.setattr(hopper_ops, 'FusedOps', lambda device, choices: 'FusedOps')

    def choose(vlm):
        expert = replace(_FULL.expert, head_dim=vlm.head_dim)
        return choose_ops(replace(_FULL, vlm=vlm, expert=expert), 512, 'bfloat16', device)

    return choose


def test_a_hopper_gpu_runs_its_own_kernels(monkeypatch, named):
    monkeypatch.setattr(hopper_ops, 'has_bindings', lambda: True)
    assert named(_VLM) == 'HopperOps'
    assert named(replace(_VLM, head_dim=128)) == 'FusedOps'


def test_a_missing_package_is_said_with_what_to_do(monkeypatch, named, caplog):
    monkeypatch.setattr(hopper_ops, 'has_bindings', lambda: False)
    with caplog.at_level(logging.WARNING):
        assert named(_VLM) == 'FusedOps'
    assert 'cuda-bindings is missing; pip install' in caplog.text


class _Recorder:
    """Stands in for what needs a GPU, and notes what it is called with."""

    def __init__(self, *arguments) -> None:
        self.calls = []

    def __call__(self, *arguments, **settings) -> None:
        self.calls.append(arguments)


def test_a_kernel_is_made_once_per_shape_and_compiled_once_per_macros(monkeypatch):
    compiled, made = [], []

    def compile_module(source, macros, device):
        compiled.append(macros)
        return macros

    monkeypatch.setattr(nvrtc, 'compile_module', cache(compile_module))
    monkeypatch.setattr(nvrtc, 'CudaKernel', lambda *a: made.append(a) or object())
    kernel = nvrtc.ShapedKernel(Path('one.cu'), 'one', torch.device('cuda'))
    first = kernel.made_for({'N': 8}, 132, 384, 1024)
    assert kernel.made_for({'N': 8}, 132, 384, 1024, 1) is first
    assert kernel.made_for({'N': 8}, 66, 384, 1024) is not first
    assert kernel.made_for({'N': 16}, 132, 384, 1024, 2) is not first
    assert compiled == [(('N', 8),), (('N', 16),)]
    assert made[0] == ((('N', 8),), 'one', 132, 384, 1024, 1)
    assert len(made) == 3


@pytest.fixture
def recorded(monkeypatch):
    """Let HopperOps be made without a GPU; its kernels note what they are called with."""
    for name in (
        'HopperGateUp', 'HopperPrefillQkv', 'HopperPrefillAttention', 'HopperPrefillDown',
        'HopperVisionProduct', 'HopperVisionAttention',
    ):  # fmt: skip
        monkeypatch.setattr(hopper_ops, name, _Recorder)
    monkeypatch.setattr(FusedOps, '__init__', lambda self, device, choices: None)

    def make(vision=_FULL.vision, image_rows=512) -> HopperOps:
        choices = TunedChoices('NVIDIA H200')
        return HopperOps(torch.device('cuda'), choices, vision, image_rows)

    return make


@pytest.mark.parametrize(('image_rows', 'own'), [(256, False), (512, True), (768, True)])
def test_the_down_projection_of_a_long_prefix_has_its_own_kernel(recorded, image_rows, own):
    ops, by_library = recorded(image_rows=image_rows), _Recorder()
    ops.linear = by_library
    x, weight, out = torch.zeros(8, 64), torch.arange(32.0 * 64).view(32, 64), torch.zeros(8, 32)
    ordered = ops.order_down(weight)
    assert torch.equal(ordered, weight) != own
    assert torch.equal(ordered, order_features(weight)) == own
    ops.down(x, ordered, out)
    (call,) = ops._down.calls if own else by_library.calls
    expected = (x, ordered, out, out) if own else (x, ordered, out)
    assert all(argument is given for argument, given in zip(call, expected, strict=True))
    assert len(by_library.calls) == (not own)


@pytest.mark.parametrize(
    ('vision', 'fits'),
    [(_FULL.vision, True), (replace(_FULL.vision, num_heads=18), False)],
    ids=['released', 'head-size'],
)
def test_a_vision_of_other_heads_runs_the_attention_for_any_gpu(
    monkeypatch, recorded, caplog, vision, fits
):
    any_gpu = []
    monkeypatch.setattr(FusedOps, 'vision_attention', lambda self, *a: any_gpu.append(a))
    with caplog.at_level(logging.INFO):
        ops = recorded(vision)
    qkv, out = torch.zeros(256, 3456), torch.zeros(256, 1152)
    ops.vision_attention(qkv, vision.num_heads, vision.tokens_per_view, out)
    assert len(any_gpu) == (0 if fits else 1)
    assert ops.tuned_kernels == (() if fits else ('vision_attention',))
    assert ('heads of 72 columns' in caplog.text) != fits

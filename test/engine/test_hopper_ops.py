"""Which language models and GPUs get the prefill's kernels for Hopper."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pi05_ros.engine import hopper_ops
from pi05_ros.engine.hopper_ops import HopperOps, choose_ops, hopper_ops_obstacle
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
    ],
    ids=['released', 'ada', 'blackwell', 'head-size', 'mlp-width'],
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
    monkeypatch.setattr(hopper_ops, 'HopperOps', lambda device, choices, vision: 'HopperOps')
    monkeypatch.setattr(hopper_ops, 'FusedOps', lambda device, choices: 'FusedOps')

    def choose(vlm):
        expert = replace(_FULL.expert, head_dim=vlm.head_dim)
        return choose_ops(replace(_FULL, vlm=vlm, expert=expert), 'bfloat16', device)

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


@pytest.mark.parametrize(
    ('vision', 'fits'),
    [(_FULL.vision, True), (replace(_FULL.vision, num_heads=18), False)],
    ids=['released', 'head-size'],
)
def test_a_vision_of_other_heads_runs_the_attention_for_any_gpu(monkeypatch, caplog, vision, fits):
    for name in (
        'HopperGateUp', 'HopperPrefillQkv', 'HopperPrefillAttention', 'HopperVisionProduct',
        'HopperVisionAttention',
    ):  # fmt: skip
        monkeypatch.setattr(hopper_ops, name, _Recorder)
    any_gpu = []
    monkeypatch.setattr(FusedOps, '__init__', lambda self, device, choices: None)
    monkeypatch.setattr(FusedOps, 'vision_attention', lambda self, *a: any_gpu.append(a))
    with caplog.at_level(logging.INFO):
        ops = HopperOps(torch.device('cuda'), TunedChoices('NVIDIA H200'), vision)
    qkv, out = torch.zeros(256, 3456), torch.zeros(256, 1152)
    ops.vision_attention(qkv, vision.num_heads, vision.tokens_per_view, out)
    assert len(any_gpu) == (0 if fits else 1)
    assert ops.tuned_kernels == (() if fits else ('vision_attention',))
    assert ('heads of 72 columns' in caplog.text) != fits

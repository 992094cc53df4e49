"""Which language models and GPUs get the prefill's kernels for Hopper."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pi05_ros.engine import hopper_ops
from pi05_ros.engine.hopper_ops import choose_ops, hopper_ops_obstacle
from pi05_ros.model.config import Pi05Config

_VLM = Pi05Config.full().vlm


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
    for name in ('HopperOps', 'FusedOps'):
        monkeypatch.setattr(hopper_ops, name, lambda device, choices, name=name: name)
    return lambda vlm: choose_ops(vlm, 'bfloat16', device)


def test_a_hopper_gpu_runs_its_own_kernels(monkeypatch, named):
    monkeypatch.setattr(hopper_ops, 'has_bindings', lambda: True)
    assert named(_VLM) == 'HopperOps'
    assert named(replace(_VLM, head_dim=128)) == 'FusedOps'


def test_a_missing_package_is_said_with_what_to_do(monkeypatch, named, caplog):
    monkeypatch.setattr(hopper_ops, 'has_bindings', lambda: False)
    with caplog.at_level(logging.WARNING):
        assert named(_VLM) == 'FusedOps'
    assert 'cuda-bindings is missing; pip install' in caplog.text

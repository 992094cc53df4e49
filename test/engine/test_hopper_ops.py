"""Which language models and GPUs get the prefill's kernels for Hopper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pi05_ros.engine.hopper_ops import hopper_ops_obstacle
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

"""Which denoise kernels run where, and what the Hopper kernels keep of the weights."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pi05_ros.engine import denoise
from pi05_ros.engine.denoise import DenoiseStage
from pi05_ros.engine.expert_weights import ExpertWeights
from pi05_ros.engine.hopper_chain import hopper_obstacle
from pi05_ros.engine.kernels import hopper_layout
from pi05_ros.model.config import Pi05Config

_FULL = Pi05Config.full()
_SMALL = replace(
    _FULL,
    expert=replace(_FULL.expert, width=256, depth=2, mlp_dim=512, num_heads=4),
    vlm=replace(_FULL.vlm, depth=2, num_heads=4),
)
_DEEP = replace(_FULL, expert=replace(_FULL.expert, mlp_dim=10240))


def _buffers(horizon: int = 50, prefix: int = 768, dtype: torch.dtype = torch.bfloat16):
    return SimpleNamespace(
        x=SimpleNamespace(device=SimpleNamespace(type='cuda'), dtype=dtype, shape=(horizon, 1024)),
        keys=SimpleNamespace(shape=(18, prefix, 256)),
    )


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: properties)


@pytest.mark.parametrize('horizon', [1, 10, 16, 50, 64])
@pytest.mark.parametrize('prefix', [320, 768, 1024])
def test_the_released_expert_fits_a_hopper_gpu(hopper, horizon, prefix):
    assert hopper_obstacle(_FULL, _buffers(horizon, prefix)) is None
    plan = hopper_layout.hopper_plan(_FULL.expert, horizon, prefix, 132)
    assert plan.ranges * plan.keys >= prefix + horizon
    assert plan.attend_blocks(_FULL.expert, horizon) <= 15 * 8  # so many run at once


@pytest.mark.parametrize(
    ('config', 'buffers', 'reason'),
    [
        (_FULL, _buffers(dtype=torch.float32), 'they compute in bfloat16, not in torch.float32'),
        (_FULL, _buffers(horizon=65), 'a horizon up to 64, not 65'),
        (_FULL, _buffers(prefix=4096), r'a block needs \d+ bytes of shared memory'),
        (_SMALL, _buffers(), 'made for the released expert'),
        (_DEEP, _buffers(), 'made for the released expert'),
    ],
)
def test_what_does_not_fit_is_said(hopper, config, buffers, reason):
    assert re.search(reason, hopper_obstacle(config, buffers))


@pytest.mark.parametrize('horizon', [10, 50])
@pytest.mark.parametrize('prefix', [640, 768, 1024])
def test_the_attention_starts_beside_the_product_before_it(horizon, prefix):
    plan = hopper_layout.hopper_plan(_FULL.expert, horizon, prefix, 132)
    blocks = plan.attend_bytes(256) + plan.qkv.shared_bytes(horizon)
    assert blocks <= 224 * 1024


@pytest.mark.parametrize('horizon', [10, 50])
def test_the_weights_of_the_mlp_fit_beside_the_products_before_them(horizon):
    plan = hopper_layout.hopper_plan(_FULL.expert, horizon, 768, 132)
    for pair in ((plan.attention_out, plan.gate_up), (plan.gate_up, plan.down)):
        assert sum(slab.shared_bytes(horizon) for slab in pair) <= 224 * 1024


def test_another_gpu_runs_the_triton_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (12, 0))
    assert 'no Hopper GPU' in hopper_obstacle(_FULL, _buffers())


def test_a_missing_package_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(denoise, 'hopper_obstacle', lambda config, buffers: None)
    monkeypatch.setattr(denoise, 'has_bindings', lambda: False)
    monkeypatch.setattr(denoise, 'load_denoise_tuning', lambda *arguments: None)
    stage = SimpleNamespace(
        config=_FULL, buffers=None, device=None, horizon=50,
        _triton_chain=lambda weights, tuning: 'triton',
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert DenoiseStage._choose_chain(stage, None) == 'triton'
    assert 'cuda-bindings is missing; pip install' in caplog.text


def test_packed_weights_are_the_same_weights():
    expert = _SMALL.expert
    heads, width, hidden = 1024, expert.width, expert.mlp_dim
    weights = ExpertWeights(
        qkv=torch.randn(2, heads + 512, width),
        attention_out=torch.randn(2, width, heads),
        gate_up=torch.randn(2, 2 * hidden, width),
        down=torch.randn(2, width, hidden),
        **dict.fromkeys(
            ('action_in', 'action_in_bias', 'action_out', 'action_out_bias', 'modulations'),
            torch.zeros(1),
        ),
    )
    plan = hopper_layout.HopperPlan(
        *(hopper_layout.Slab(64, 256) for _ in hopper_layout.PRODUCTS),
        queries=16,
        ranges=1,
        keys=16,
    )
    packed = hopper_layout.pack_weights(weights, plan, expert)
    again = hopper_layout.unpack_weights(packed, plan, expert)
    for name in hopper_layout.PRODUCTS:
        assert not torch.equal(getattr(packed, name), getattr(weights, name))
        assert torch.equal(getattr(again, name), getattr(weights, name))

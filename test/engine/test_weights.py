"""Packing of checkpoint tensors: what is folded, and that nothing is kept twice."""

from __future__ import annotations

import pytest
import torch

from pi05_ros.engine.kernels.folded_norm import order_features_plain
from pi05_ros.engine.ops import PlainOps
from pi05_ros.engine.weights import pack_folded_vision, pack_prefill, pack_vision
from pi05_ros.model.checkpoint import load_state, open_checkpoint

CPU = torch.device('cpu')
LANGUAGE = 'paligemma_with_expert.paligemma.model.language_model.layers.0.'


@pytest.fixture
def config(golden_dir):
    return open_checkpoint(golden_dir).config


@pytest.fixture
def state(golden_dir):
    return load_state(open_checkpoint(golden_dir))


@pytest.mark.parametrize('folded', [False, True])
def test_packing_takes_the_tensors_out_of_the_state(state, config, folded):
    if folded:
        pack_folded_vision(state, config, torch.float32, CPU, order_features_plain)
    else:
        pack_vision(state, config, torch.float32, CPU)
    pack_prefill(state, config, torch.float32, CPU, PlainOps())
    left = {name.split('.')[1] if 'expert' in name else name for name in state}
    assert not any('paligemma.' in name for name in state), left


def test_norm_weights_near_minus_one_survive_bfloat16(state, config):
    """(1 + w) of a bfloat16 w near -1 has few bits left; it must be formed in float32."""
    name = LANGUAGE + 'input_layernorm.weight'
    state[name] = torch.full_like(state[name], -0.998321)
    q = state[LANGUAGE + 'self_attn.q_proj.weight'].clone()
    weights = pack_prefill(state, config, torch.bfloat16, CPU, PlainOps())
    packed = weights.layers[0].qkv[: q.shape[0]].float()
    expected = q * (1.0 - 0.998321)
    assert (packed - expected).abs().max() <= expected.abs().max() * 2**-8


def test_the_patch_weight_is_closer_to_float32_than_one_bfloat16(state, config):
    name = 'paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.'
    exact = state[name + 'patch_embedding.weight'].reshape(config.vision.width, -1) / 127.5
    weights = pack_vision(state, config, torch.bfloat16, CPU)
    features = exact.shape[1]
    assert weights.patch_copies == 2 and weights.patch.shape[1] % 8 == 0
    high, low = weights.patch.float()[:, : 2 * features].split(features, dim=1)
    assert (high + low - exact).norm() < 1e-4 * exact.norm()
    assert (high - exact).norm() > 1e-3 * exact.norm()


def test_a_folded_norm_is_rounded_once_and_its_sums_are_of_what_is_stored(state, config):
    prefix = 'paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0.'
    norm, fc1 = prefix + 'layer_norm2.', prefix + 'mlp.fc1.'
    for name in (norm + 'weight', norm + 'bias'):  # those of the golden file are 1 and 0
        state[name] = torch.linspace(-0.7, 1.3, config.vision.width)
    weight, bias = state[fc1 + 'weight'].clone(), state[fc1 + 'bias'].clone()
    gamma, beta = state[norm + 'weight'].clone(), state[norm + 'bias'].clone()
    layer = (
        pack_folded_vision(state, config, torch.bfloat16, CPU, order_features_plain).layers[0].fc1
    )
    assert torch.equal(layer.weight, (weight * gamma).bfloat16())
    assert torch.allclose(layer.sums, layer.weight.float().sum(dim=1), atol=1e-5)
    assert torch.allclose(layer.bias, bias + weight @ beta, atol=1e-5)
    assert not torch.equal(layer.sums, (weight * gamma).sum(dim=1))


def test_the_last_layer_keeps_only_what_fills_the_cache(state, config):
    packed = pack_prefill(state, config, torch.float32, CPU, PlainOps())
    assert len(packed.layers) == config.vlm.depth - 1
    assert packed.last_kv.shape == (2 * config.vlm.head_dim, config.vlm.width)

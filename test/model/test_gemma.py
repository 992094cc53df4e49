from __future__ import annotations

import math

import pytest
import torch
from model_files import small_config

from pi05_ros.model.config import GemmaConfig
from pi05_ros.model.expert import AdaptiveRmsNorm, embed_time
from pi05_ros.model.gemma import (
    GemmaAttention,
    PrefixCache,
    RmsNorm,
    prefix_positions,
    rope_tables,
    rotate,
)

CONFIG = small_config().vlm


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one query head, written out; (N, D), (M, D), (M, D) -> (N, D)."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v


def test_consecutive_query_heads_share_one_kv_head():
    torch.manual_seed(0)
    attention = GemmaAttention(CONFIG)
    query, keys, values = randn(5, 4, 8), randn(7, 16, seed=1), randn(7, 16, seed=2)
    heads = [
        one_head(query[:, h], keys[:, (h // 2) * 8 :][:, :8], values[:, (h // 2) * 8 :][:, :8])
        for h in range(4)
    ]
    expected = attention.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention.attend(query, keys, values, None), expected)


def test_logits_depend_on_the_distance_of_positions_only():
    q, k = randn(1, 1, 8), randn(1, 1, 8, seed=1)

    def logit(q_position: int, k_position: int) -> torch.Tensor:
        tables = [
            rope_tables(torch.tensor([p]), CONFIG, torch.float32) for p in (q_position, k_position)
        ]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(logit(17, 5), logit(112, 100), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(logit(17, 5), logit(17, 6))


def test_position_zero_is_not_rotated():
    x = randn(1, 2, 8)
    tables = rope_tables(torch.tensor([0]), CONFIG, torch.float32)
    torch.testing.assert_close(rotate(x, tables), x, rtol=0, atol=0)


def test_bfloat16_rounds_the_frequencies_and_the_tables():
    """Pins a property of openpi's model that the golden K of long prefixes show."""
    config = GemmaConfig(8, 1, 8, num_heads=1, num_kv_heads=1, head_dim=256)
    cos, _ = rope_tables(torch.tensor([967]), config, torch.bfloat16)
    frequencies = 10_000.0 ** -(torch.arange(0, 256, 2) / 256)
    rounded = (967 * frequencies.bfloat16().float()).cos().bfloat16()
    exact = (967 * frequencies).cos().bfloat16()
    assert cos.dtype == torch.bfloat16
    torch.testing.assert_close(cos[0, :128], rounded, rtol=0, atol=0.01)
    assert (cos[0, :128] - exact).abs().max() > 0.5


def test_masked_tokens_do_not_advance_positions():
    valid = torch.tensor([True, False, False, True, True])
    assert prefix_positions(5, valid, valid.device)[valid].tolist() == [0, 1, 2]
    assert (
        PrefixCache(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2), valid).first_suffix_position == 3
    )


def test_stored_norm_weight_is_an_offset_from_one():
    norm = RmsNorm(CONFIG)
    x = 3 * randn(4, CONFIG.width)
    plain = norm(x)
    torch.testing.assert_close(plain.square().mean(-1), torch.ones(4), rtol=1e-4, atol=1e-4)
    norm.weight.data.fill_(0.5)
    torch.testing.assert_close(norm(x), 1.5 * plain)


def test_adaptive_norm_takes_scale_shift_and_gate_in_this_order():
    config = small_config().expert
    norm = AdaptiveRmsNorm(config)
    norm.dense.weight.data.zero_()
    norm.dense.bias.data = torch.cat([torch.full((16,), value) for value in (1.0, 2.0, 3.0)])
    x = randn(5, 16)
    normed, gate = norm(x, torch.zeros(16))
    root = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(normed, 2.0 * x / root + 2.0, rtol=1e-4, atol=1e-4)
    assert gate.tolist() == [3.0] * 16


def test_adaptive_norm_keeps_its_condition_in_float32():
    norm = AdaptiveRmsNorm(small_config().expert)
    normed, gate = norm(randn(5, 16).bfloat16(), randn(16))
    assert normed.dtype == gate.dtype == torch.bfloat16


@pytest.mark.parametrize('t', [0.1, 0.73, 1.0])
def test_time_embedding_is_sines_then_cosines_of_falling_frequency(t: float):
    embedded = embed_time(t, 6, torch.device('cpu'))
    periods = [4e-3, math.sqrt(4e-3 * 4.0), 4.0]
    angles = [2 * math.pi * t / period for period in periods]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(embedded, torch.tensor(expected))

"""Prefix attention kernel against its plain twin and against PyTorch's attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pi05_ros.engine.kernels.prefill_attention import prefill_attention, prefill_attention_plain


def draw_case(draw, device, rows, heads, dim, count):
    q = draw(rows, heads * dim)
    keys, values = draw(128, dim), draw(128, dim)
    return q, keys, values, torch.tensor([count], dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    ('heads', 'dim', 'rows', 'count', 'block'),
    [(8, 32, 40, 40, 32), (8, 32, 70, 45, 32), (3, 16, 33, 1, 32), (8, 256, 100, 90, 64)],
    ids=['full-bucket', 'padded-bucket', 'one-key', 'full'],
)
def test_attention_matches_its_twin(draw, assert_matches, device, heads, dim, rows, count, block):
    q, keys, values, valid = draw_case(draw, device, rows, heads, dim, count)
    out, twin = torch.zeros_like(q), torch.empty_like(q)
    launch = {'block_m': block, 'block_n': block, 'warps': 4, 'stages': 1}
    prefill_attention(q, keys, values, valid, dim**-0.5, out, launch)
    prefill_attention_plain(q, keys, values, valid, dim**-0.5, twin)
    assert_matches(out[:count], twin[:count])


def test_keys_beyond_the_count_have_no_influence(draw, device):
    q, keys, values, valid = draw_case(draw, device, 20, 8, 32, 20)
    out, other = torch.zeros_like(q), torch.zeros_like(q)
    launch = {'block_m': 32, 'block_n': 32, 'warps': 4, 'stages': 1}
    prefill_attention(q, keys, values, valid, 0.2, out, launch)
    keys[20:], values[20:] = 1e4, -1e4
    prefill_attention(q, keys, values, valid, 0.2, other, launch)
    assert torch.equal(out, other)


def test_the_twin_is_attention_with_shared_keys():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(6, 4 * 16, generator=generator)
    keys, values = torch.randn(2, 8, 16, generator=generator)
    out = torch.empty_like(q)
    prefill_attention_plain(q, keys, values, torch.tensor([5]), 0.25, out)
    expected = functional.scaled_dot_product_attention(
        q.view(6, 4, 16).transpose(0, 1), keys[:5].expand(4, 5, 16), values[:5].expand(4, 5, 16)
    )
    assert torch.allclose(out, expected.transpose(0, 1).reshape(6, 64), atol=1e-5)

"""RoPE and K/V write kernel against its plain twin, and the twin against the formula."""

from __future__ import annotations

import pytest
import torch

from pi05_ros.engine.kernels.cublaslt import linear_plain
from pi05_ros.engine.kernels.rope import half_tables, rope_kv, rope_kv_plain
from pi05_ros.engine.ops import FusedOps, PlainOps
from pi05_ros.model.config import GemmaConfig


def gemma(head_dim: int) -> GemmaConfig:
    return GemmaConfig(128, 3, 256, num_heads=8, num_kv_heads=1, head_dim=head_dim)


@pytest.mark.parametrize(
    ('heads', 'dim', 'width'),
    [(8, 32, 128), (3, 16, 100), (8, 256, 2048)],
    ids=['tiny', 'ragged', 'full'],
)
def test_rope_matches_its_twin(draw, assert_matches, dtype, device, heads, dim, width):
    rows = 7
    qkv, x = draw(rows, (heads + 2) * dim), draw(rows, width, scale=3.0)
    cos, sin = half_tables(gemma(dim), rows + 2, dtype, device)
    results = []
    for run in (rope_kv, rope_kv_plain):
        q = torch.full((rows, heads * dim), float('nan'), dtype=dtype, device=device)
        keys, values = torch.zeros(2, rows + 2, dim, dtype=dtype, device=device)
        run(qkv, x, cos, sin, 1e-6, q, keys, values)
        results.append((q, keys, values))
    for kernel, twin in zip(*results, strict=True):
        assert_matches(kernel, twin)
    assert not results[0][1][rows:].any(), 'rows beyond the prefix were written'


def test_a_cache_only_layer_has_no_queries(draw, assert_matches, dtype, device):
    qkv, x = draw(4, 2 * 32), draw(4, 128)
    cos, sin = half_tables(gemma(32), 4, dtype, device)
    results = []
    for run in (rope_kv, rope_kv_plain):
        keys, values = torch.full((2, 4, 32), float('nan'), dtype=dtype, device=device)
        run(qkv, x, cos, sin, 1e-6, None, keys, values)
        results.append((keys, values))
    for kernel, twin in zip(*results, strict=True):
        assert_matches(kernel, twin)


@pytest.mark.parametrize('heads', [8, 0])
def test_the_fused_operation_projects_and_rotates(
    monkeypatch, draw, assert_matches, dtype, device, heads
):
    monkeypatch.setattr(FusedOps, '__init__', lambda self: None)
    fused = FusedOps()
    fused.linear = linear_plain
    x, weight = draw(5, 128, scale=3.0), draw((heads + 2) * 32, 128)
    cos, sin = half_tables(gemma(32), 5, dtype, device)
    results = []
    for ops in (fused, PlainOps()):
        q = torch.zeros(5, heads * 32, dtype=dtype, device=device)
        keys, values = torch.full((2, 5, 32), float('nan'), dtype=dtype, device=device)
        scale = torch.empty(5, device=device)
        operands = (x, ops.order_qkv(weight), cos, sin, 1e-6, scale)
        ops.qkv_rope(*operands, q if heads else None, keys, values)
        results.append((q, keys, values) if heads else (keys, values))
    for kernel, twin in zip(*results, strict=True):
        assert_matches(kernel, twin)


def test_row_i_is_position_i():
    cos, sin = half_tables(gemma(8), 3, torch.float32, torch.device('cpu'))
    assert torch.equal(cos[0], torch.ones(4))
    assert torch.equal(sin[0], torch.zeros(4))
    frequencies = 10_000.0 ** -torch.tensor([0, 0.25, 0.5, 0.75])
    assert torch.allclose(sin[2], torch.sin(2.0 * frequencies))

"""GEGLU kernel against its plain twin, and the norm that it absorbs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pi05_ros.engine.kernels.geglu import geglu, geglu_plain


@pytest.mark.parametrize(
    ('rows', 'width', 'hidden', 'block'),
    [(3, 128, 256, 256), (2, 100, 300, 128), (2, 2048, 16384, 4096)],
    ids=['tiny', 'ragged', 'full'],
)
def test_geglu_matches_its_twin(draw, assert_matches, rows, width, hidden, block):
    gate_up, x = draw(rows, 2 * hidden), draw(rows, width, scale=4.0)
    out = torch.full((rows, hidden), float('nan'), dtype=x.dtype, device=x.device)
    twin = torch.empty_like(out)
    geglu(gate_up, x, 1e-6, out, {'block': block, 'warps': 4})
    geglu_plain(gate_up, x, 1e-6, twin)
    assert_matches(out, twin)


def test_scaling_after_the_projection_is_the_norm_before_it():
    """RMSNorm commutes with a linear layer, and (1 + w) folds into its columns."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 64, generator=generator, dtype=torch.float64) * 5
    norm = torch.randn(64, generator=generator, dtype=torch.float64)
    gate, up = torch.randn(2, 96, 64, generator=generator, dtype=torch.float64) / 8
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + norm)
    expected = functional.gelu(normed @ gate.T, approximate='tanh') * (normed @ up.T)
    merged = torch.cat((gate, up)) * (1 + norm)
    out = torch.empty(4, 96, dtype=torch.float64)
    geglu_plain((x @ merged.T), x, 1e-6, out)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)

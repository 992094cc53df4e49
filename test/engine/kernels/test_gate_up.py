"""Fused gate/up GEMM against its plain twin, and the norm that it absorbs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pi05_ros.engine.kernels.gate_up import gate_up, gate_up_plain, interleave

SMALL = {'block_m': 32, 'block_n': 64, 'block_k': 32, 'warps': 4, 'stages': 2, 'programs': 3}


@pytest.mark.parametrize(
    ('rows', 'width', 'hidden'),
    [(64, 128, 256), (37, 104, 200), (130, 256, 64)],
    ids=['tiny', 'ragged', 'many-row-tiles'],
)
def test_gate_up_matches_its_twin(draw, assert_matches, rows, width, hidden):
    x, weight = draw(rows, width, scale=4.0), draw(2 * hidden, width, scale=width**-0.5)
    results = []
    for run, options in ((gate_up, {'launch': SMALL}), (gate_up_plain, {})):
        out = torch.full((rows, hidden), float('nan'), dtype=x.dtype, device=x.device)
        scale = torch.full((rows,), float('nan'), device=x.device)
        run(x, weight, 1e-6, scale, out, **options)
        results.append((out, scale))
    for kernel, twin in zip(*results, strict=True):
        assert_matches(kernel, twin)


def test_scaling_after_the_projection_is_the_norm_before_it():
    """RMSNorm commutes with a linear layer, and (1 + w) folds into its columns."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 64, generator=generator, dtype=torch.float64) * 5
    norm = torch.randn(64, generator=generator, dtype=torch.float64)
    gate, up = torch.randn(2, 96, 64, generator=generator, dtype=torch.float64) / 8
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + norm)
    expected = functional.gelu(normed @ gate.T, approximate='tanh') * (normed @ up.T)
    out, scale = torch.empty(4, 96, dtype=torch.float64), torch.empty(4)
    gate_up_plain(x, interleave(gate, up) * (1 + norm), 1e-6, scale, out)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)

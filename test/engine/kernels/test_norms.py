"""LayerNorm kernel against its plain twin."""

from __future__ import annotations

import pytest
import torch

from pi05_ros.engine.kernels.norms import layer_norm, layer_norm_plain


@pytest.mark.parametrize('width', [96, 1152], ids=['tiny', 'full'])
def test_layer_norm_matches_its_twin(draw, assert_matches, width):
    x, weight, bias = draw(5, width, scale=30.0), draw(width), draw(width)
    out, twin = torch.full_like(x, float('nan')), torch.empty_like(x)
    layer_norm(x, weight, bias, 1e-6, out)
    layer_norm_plain(x, weight, bias, 1e-6, twin)
    assert_matches(out, twin)


def test_the_rounded_copy_is_the_input_in_the_stage_dtype(draw, assert_matches, dtype):
    x = draw(3, 96).float() * 1.001
    weight, bias = draw(96), draw(96)
    out, twin, rounded, kept = (torch.full_like(x, float('nan'), dtype=dtype) for _ in range(4))
    layer_norm(x, weight, bias, 1e-6, out, rounded)
    layer_norm_plain(x, weight, bias, 1e-6, twin, kept)
    assert torch.equal(rounded, x.to(dtype))
    assert_matches(out, twin)


def test_the_epsilon_counts_where_the_variance_is_small(draw, assert_matches):
    """Two public engines used 1e-5 where the model has 1e-6."""
    x, weight, bias = draw(4, 96, scale=1e-3), draw(96), draw(96)
    out, other = torch.empty_like(x), torch.empty_like(x)
    layer_norm(x, weight, bias, 1e-6, out)
    layer_norm_plain(x, weight, bias, 1e-5, other)
    assert not torch.allclose(out, other, rtol=0.1)

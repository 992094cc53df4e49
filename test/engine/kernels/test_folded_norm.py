"""Moments of rows: the kernel against its twin, and the norm that is made of them."""

from __future__ import annotations

import pytest
import torch

from pi05_ros.engine.kernels.folded_norm import (
    RowMoments,
    fold_norm,
    normed_linear_plain,
    round_rows,
    round_rows_plain,
)


@pytest.mark.parametrize(
    ('width', 'part_columns'),
    [(96, 96), (200, 64), (1152, 96), (1152, 144)],
    ids=['one', 'ragged', 'full', 'wide'],
)
def test_rounded_rows_and_moments_match_the_twin(draw, assert_matches, dtype, width, part_columns):
    x = draw(5, width).float() * 1.001 + 20.0
    out, twin = (torch.full_like(x, float('nan'), dtype=dtype) for _ in range(2))
    found, expected = (RowMoments.zeros(5, width, part_columns, x.device) for _ in range(2))
    found.values.fill_(float('nan'))
    round_rows(x, out, found)
    round_rows_plain(x, twin, expected)
    assert torch.equal(out, x.to(dtype)) and torch.equal(out, twin)
    assert_matches(found.values, expected.values)


@pytest.mark.parametrize('part_columns', [64, 96, 128])
def test_a_folded_norm_keeps_its_digits_far_from_zero(part_columns):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 200, generator=generator) + 50.0
    weight = torch.randn(24, 200, generator=generator) * 0.1
    norm_weight, norm_bias, bias = (torch.randn(n, generator=generator) for n in (200, 200, 24))
    layer = fold_norm(norm_weight, norm_bias, weight, bias, torch.float32)
    moments, out = RowMoments.zeros(8, 200, part_columns, x.device), torch.empty(8, 24)
    round_rows_plain(x, torch.empty_like(x), moments)
    normed_linear_plain(x, moments, layer, 1e-6, out)
    normed = torch.nn.functional.layer_norm(
        x.double(), (200,), norm_weight.double(), norm_bias.double(), 1e-6
    )
    exact = torch.nn.functional.linear(normed, weight.double(), bias.double())
    assert (out - exact).norm() / exact.norm() < 1e-5

"""Vision attention kernel against its plain twin."""

from __future__ import annotations

import pytest
import torch

from pi05_ros.engine.kernels.vision_attention import vision_attention, vision_attention_plain


@pytest.mark.parametrize(
    ('heads', 'dim', 'tokens', 'rows'),
    [(4, 24, 32, 16), (2, 72, 64, 16), (2, 32, 49, 16), (2, 72, 256, 64)],
    ids=['dim-24', 'dim-72', 'ragged-tokens', 'full'],
)
def test_attention_matches_its_twin(draw, assert_matches, heads, dim, tokens, rows):
    if torch.cuda.is_available() and draw(1).dtype == torch.float32 and tokens == 256:
        pytest.skip('float32 K and V of a whole view exceed shared memory; it runs the twin')
    qkv = draw(2 * tokens, 3 * heads * dim)
    out = torch.full((2 * tokens, heads * dim), float('nan'), dtype=qkv.dtype, device=qkv.device)
    twin = torch.empty_like(out)
    vision_attention(qkv, heads, tokens, out, {'block_m': rows, 'warps': 4})
    vision_attention_plain(qkv, heads, tokens, twin)
    assert_matches(out, twin)


def test_views_do_not_see_each_other(draw):
    qkv = draw(2 * 32, 3 * 4 * 24)
    out, other = qkv.new_zeros(2 * 32, 96), qkv.new_zeros(2 * 32, 96)
    vision_attention(qkv, 4, 32, out, {'block_m': 16, 'warps': 4})
    qkv[32:] = 5.0
    vision_attention(qkv, 4, 32, other, {'block_m': 16, 'warps': 4})
    assert torch.equal(out[:32], other[:32])
    assert not torch.equal(out[32:], other[32:])

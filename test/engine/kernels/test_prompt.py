"""Prompt embedding kernel against its plain twin."""

from __future__ import annotations

import torch

from pi05_ros.engine.kernels.prompt import embed_prompt, embed_prompt_plain


def test_rows_beyond_the_prompt_become_zero(draw, assert_matches, device):
    table = draw(50, 96)
    tokens = torch.tensor([3, 49, 0, 7, 12], dtype=torch.int32, device=device)
    count = torch.tensor([3], dtype=torch.int32, device=device)
    out, twin = (torch.full((5, 96), float('nan'), device=device).to(table) for _ in range(2))
    embed_prompt(tokens, count, table, 96**0.5, out)
    embed_prompt_plain(tokens, count, table, 96**0.5, twin)
    assert_matches(out, twin)
    assert not out[3:].any()

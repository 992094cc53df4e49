"""Token embedding into the prefix, behind the views; rows beyond the prompt become zero."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _embed_kernel(
    p_tokens,  # (max tokens,) int32
    p_count,  # (1,) int32: tokens of this call
    p_table,  # (vocabulary, width)
    p_out,  # (rows, width)
    width,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < width
    read_width = tl.where(row < tl.load(p_count), width, 0)
    token = tl.load(p_tokens + row).to(tl.int64)
    b_row = tl.load(p_table + token * width + o_column, mask=o_column < read_width, other=0.0)
    b_row = (b_row.to(tl.float32) * scale).to(p_out.dtype.element_ty)
    tl.store(p_out + row * width + o_column, b_row, mask=m_column)


def embed_prompt(
    tokens: torch.Tensor, count: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """Write ``table[tokens] * scale`` to the first ``count`` rows of ``out``, zero to the rest.

    Zero rows stay finite through every layer, so that a padded row, which nobody attends to,
    never turns a masked product into NaN.

    Args:
        tokens: (>= M,) int32. count: (1,) int32, on the device. table: (vocabulary, W).
        out: (M, W).
    """
    rows, width = out.shape
    _embed_kernel[(rows,)](
        tokens, count, table, out, width, scale, BLOCK=triton.next_power_of_2(width), num_warps=4
    )


def embed_prompt_plain(
    tokens: torch.Tensor, count: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """Do what :func:`embed_prompt` does, in plain PyTorch."""
    rows = out.shape[0]
    valid = torch.arange(rows, device=out.device) < count
    embedded = table[torch.where(valid, tokens[:rows], 0)].float() * scale
    out.copy_(torch.where(valid[:, None], embedded, 0.0))

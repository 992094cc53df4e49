"""LayerNorm over rows, optionally rounding its input to the stage's dtype on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _layer_norm_kernel(
    p_x,  # (rows, width)
    p_weight,  # (width,)
    p_bias,  # (width,)
    p_out,  # (rows, width)
    p_rounded,  # (rows, width): x in out's dtype; only written with ROUND
    width,
    eps,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < width
    b_x = tl.load(p_x + row * width + o_column, mask=m_column, other=0.0)
    if ROUND:
        b_x = b_x.to(p_out.dtype.element_ty)
        tl.store(p_rounded + row * width + o_column, b_x, mask=m_column)
    b_x = b_x.to(tl.float32)
    mean = tl.sum(b_x, axis=0) / width
    b_centred = tl.where(m_column, b_x - mean, 0.0)
    variance = tl.sum(b_centred * b_centred, axis=0) / width
    b_weight = tl.load(p_weight + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_out = b_centred * tl.rsqrt(variance + eps) * b_weight + b_bias
    tl.store(p_out + row * width + o_column, b_out.to(p_out.dtype.element_ty), mask=m_column)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    rounded: torch.Tensor | None = None,
) -> None:
    """Write ``LayerNorm(x)`` to ``out``, with the sums in fp32.

    Args:
        x: (M, W). weight, bias: (W,). out: (M, W) in the stage's dtype.
        rounded: (M, W) in out's dtype, receives x; then the norm is of the rounded x, as where
            the reference leaves fp32 (openpi modeling_siglip.py).
    """
    rows, width = x.shape
    _layer_norm_kernel[(rows,)](
        x,
        weight,
        bias,
        out,
        out if rounded is None else rounded,
        width,
        eps,
        BLOCK=triton.next_power_of_2(width),
        ROUND=rounded is not None,
        num_warps=4,
    )


def layer_norm_plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    rounded: torch.Tensor | None = None,
) -> None:
    """Do what :func:`layer_norm` does, in plain PyTorch."""
    if rounded is not None:
        rounded.copy_(x)
        x = rounded
    width = x.shape[-1]
    out.copy_(
        torch.nn.functional.layer_norm(x.float(), (width,), weight.float(), bias.float(), eps)
    )

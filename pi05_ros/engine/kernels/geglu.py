"""RMSNorm scale and GEGLU in one pass over the merged gate and up projection.

RMSNorm divides each row by a scalar, and a linear layer commutes with that: the projection runs
on the raw residual, with (1 + w) in its weight, and the row's scale is applied here. That saves
the separate norm kernel and one rounding (performance.md, RMSNorm as an epilogue).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _row_scale(p_x, row, width, eps, BLOCK: tl.constexpr):
    """Return 1 / rms of one row of the residual, in fp32."""
    o_column = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + row * width + o_column, mask=o_column < width, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(b_x * b_x, axis=0) / width + eps)


@triton.jit
def _geglu_kernel(
    p_gate_up,  # (rows, 2 * hidden): gate | up, of the raw residual
    p_x,  # (rows, width): the residual
    p_out,  # (rows, hidden)
    width,
    hidden,
    eps,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < hidden
    p_row = p_gate_up + row * 2 * hidden + o_column
    b_gate = tl.load(p_row, mask=m_column, other=0.0).to(tl.float32)
    b_up = tl.load(p_row + hidden, mask=m_column, other=0.0).to(tl.float32)
    scale = _row_scale(p_x, row, width, eps, WIDTH_BLOCK)
    b_gate *= scale
    # gelu_tanh(g) = g * sigmoid(2u), u = sqrt(2/pi) * (g + 0.044715 g^3): the same function.
    b_inner = 1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
    b_out = b_gate * tl.sigmoid(b_inner) * b_up * scale
    tl.store(p_out + row * hidden + o_column, b_out.to(p_out.dtype.element_ty), mask=m_column)


DEFAULT_LAUNCH = {'block': 2048, 'warps': 4}


def geglu(
    gate_up: torch.Tensor,
    x: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    launch: dict[str, int] | None = None,
) -> None:
    """Write ``gelu_tanh(s * gate) * (s * up)`` with s = 1 / rms(x) per row.

    Args:
        gate_up: (M, 2F), the projection of the *unnormalised* residual.
        x: (M, W) residual. out: (M, F).
        launch: ``block`` columns per program (a power of two) and ``warps``.
    """
    rows, hidden = out.shape
    launch = launch or DEFAULT_LAUNCH
    block = min(launch['block'], triton.next_power_of_2(hidden))
    _geglu_kernel[(rows, triton.cdiv(hidden, block))](
        gate_up,
        x,
        out,
        x.shape[1],
        hidden,
        eps,
        WIDTH_BLOCK=triton.next_power_of_2(x.shape[1]),
        BLOCK=block,
        num_warps=launch['warps'],
    )


def row_scale_plain(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / rms of each row, (M, 1) fp32 (pi05_spec 1.7)."""
    return torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)


def geglu_plain(gate_up: torch.Tensor, x: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Do what :func:`geglu` does, in plain PyTorch."""
    gate, up = (gate_up.float() * row_scale_plain(x, eps)).chunk(2, dim=-1)
    out.copy_(torch.nn.functional.gelu(gate, approximate='tanh') * up)

"""Adaptive RMSNorm: the norm inside the kernels, its twin, and the table of its modulations.

    y = x / sqrt(mean(x^2) + eps) * (1 + scale) + shift      gate for the residual that follows

(scale, shift, gate) come from a dense layer over the time condition, so they are functions of the
Euler step alone: :func:`modulation_table` computes every norm of every step once, in float32.
Sources: openpi modeling_gemma.py (adaptive norm), pi0_pytorch.py (time embedding, time loop).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.model.sampler import step_times

SCALE, SHIFT, GATE = 0, 1, 2  # rows of one (3, W) modulation


@triton.jit
def inverse_rms(
    ssq_ptr,  # (M, PARTS) f32: sums of squares of column ranges of x
    rows,
    row_mask,
    PARTS: tl.constexpr,
    PARTS_POW2: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
):
    """Return 1 / rms of the rows, from the partial sums that the producer of x left."""
    part = tl.arange(0, PARTS_POW2)
    mask = row_mask[:, None] & (part < PARTS)[None, :]
    ssq = tl.load(ssq_ptr + rows[:, None] * PARTS + part[None, :], mask=mask, other=0.0)
    return tl.rsqrt(tl.sum(ssq, axis=1) / WIDTH + EPS)


@triton.jit
def modulated(
    x,  # (BM, BK) values of x at (rows, cols)
    rstd,  # (BM,) f32
    mod_ptr,  # (3, WIDTH) f32: scale, shift, gate
    cols,
    WIDTH: tl.constexpr,
):
    """Return the normed block in x's dtype, computed in float32."""
    scale = tl.load(mod_ptr + cols) + 1.0
    shift = tl.load(mod_ptr + WIDTH + cols)
    y = x.to(tl.float32) * rstd[:, None] * scale[None, :] + shift[None, :]
    return y.to(x.dtype)


def adarms_reference(x: Tensor, modulation: Tensor, eps: float) -> Tensor:
    """Norm ``x`` (M, W) with ``modulation`` (3, W) float32; returns x's dtype."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1 + modulation[SCALE]) + modulation[SHIFT]).to(x.dtype)


def time_embedding(times: Tensor, width: int) -> Tensor:
    """Return (n, width) float32 sine-cosine features of ``times`` (n,), periods 4e-3 to 4."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=times.device)
    period = 4e-3 * (4.0 / 4e-3) ** fraction
    angle = (2 * torch.pi / period)[None, :] * times.double()[:, None]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def modulation_table(
    dense: list[tuple[Tensor, Tensor]],
    time_mlp: list[tuple[Tensor, Tensor]],
    max_steps: int,
) -> Tensor:
    """Return the modulations of every norm at every step, for every step count.

    Args:
        dense: (weight (3W, W), bias (3W,)) of each norm, in order of use.
        time_mlp: (weight (W, W), bias (W,)) of its two layers.
        max_steps: largest step count N.
    Returns:
        (max_steps * (max_steps + 1) / 2, norms, 3, W) float32; :func:`table_row` finds a step.
    """
    times = [t for n in range(1, max_steps + 1) for t in step_times(n)]
    device = dense[0][0].device
    width = dense[0][0].shape[1]
    condition = time_embedding(torch.tensor(times, dtype=torch.float32, device=device), width)
    for weight, bias in time_mlp:
        condition = F.silu(F.linear(condition, weight.float(), bias.float()))
    rows = [F.linear(condition, weight.float(), bias.float()) for weight, bias in dense]
    return torch.stack(rows, dim=1).unflatten(-1, (3, width)).contiguous()


def table_row(num_steps: int, step: int) -> int:
    """Return the row of :func:`modulation_table` for one step of a run of ``num_steps``."""
    return num_steps * (num_steps - 1) // 2 + step

"""The border between two Euler steps in one kernel, all in float32 around x_t.

    v = W_out adarms(x) + b_out      x_t <- x_t + dt v      x = W_in x_t + b_in

The first step only enters (``x = W_in noise + b_in``), the last only leaves.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.engine.kernels.adarms import adarms_reference, modulated
from pi05_ros.engine.kernels.launch import let_next_start, prefetch_range, wait_for_previous


@triton.jit
def euler_kernel(
    x_ptr,  # (M, W) residual stream; read if LEAVE, written if ENTER
    scaled_ptr,  # (M, W) x * (1 + scale), written if ENTER
    scale_ptr,  # (W,) f32 of the next step's first norm
    mod_ptr,  # (3, W) f32, final norm
    w_out_ptr, b_out_ptr,  # (A, W), (A,) f32
    w_in_ptr, b_in_ptr,  # (W, A), (W,) f32
    from_ptr,  # (M, A) f32: x_t before the step
    to_ptr,  # (M, A) f32: x_t after it, written if LEAVE
    ssq_ptr,  # (M, PARTS) f32, written if ENTER
    dt, A,
    W: tl.constexpr, PARTS: tl.constexpr, PARTS_POW2: tl.constexpr, EPS: tl.constexpr,
    A_POW2: tl.constexpr, BK: tl.constexpr,
    LEAVE: tl.constexpr, ENTER: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    let_next_start(PDL)
    row = tl.program_id(0)
    if row < A:
        prefetch_range(w_out_ptr + row * W, W, WARPS, PREFETCH)
        prefetch_range(w_in_ptr + row * W, W, WARPS, PREFETCH)
    wait_for_previous(PDL)
    actions = tl.arange(0, A_POW2)
    action_mask = actions < A
    x_t = tl.load(from_ptr + row * A + actions, mask=action_mask, other=0.0)
    if LEAVE:
        square = tl.zeros((BK,), tl.float32)
        for k in range(0, W, BK):
            x = tl.load(x_ptr + row * W + k + tl.arange(0, BK)).to(tl.float32)
            square += x * x
        rstd = tl.rsqrt(tl.sum(square, axis=0) / W + EPS) + tl.zeros((1,), tl.float32)
        velocity = tl.zeros((A_POW2, BK), tl.float32)
        for k in range(0, W, BK):
            cols = k + tl.arange(0, BK)
            y = modulated(tl.load(x_ptr + row * W + cols)[None, :], rstd, mod_ptr, cols, W)
            w_ptrs = w_out_ptr + actions[:, None] * W + cols[None, :]
            w = tl.load(w_ptrs, mask=action_mask[:, None], other=0.0)
            velocity += w * y.to(tl.float32)
        bias = tl.load(b_out_ptr + actions, mask=action_mask, other=0.0)
        x_t += dt * (tl.sum(velocity, axis=1) + bias)
        tl.store(to_ptr + row * A + actions, x_t, mask=action_mask)
    if ENTER:
        square = tl.zeros((BK,), tl.float32)
        for k in range(0, W, BK):
            cols = k + tl.arange(0, BK)
            w_ptrs = w_in_ptr + cols[:, None] * A + actions[None, :]
            w = tl.load(w_ptrs, mask=action_mask[None, :], other=0.0)
            h = tl.sum(w * x_t[None, :], axis=1) + tl.load(b_in_ptr + cols)
            h = h.to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + row * W + cols, h)
            wide = h.to(tl.float32)
            square += wide * wide
            scaled = wide * (1.0 + tl.load(scale_ptr + cols))
            tl.store(scaled_ptr + row * W + cols, scaled.to(x_ptr.dtype.element_ty))
        # The next norm adds PARTS partial sums: the whole sum is the first, the rest are zero.
        part = tl.arange(0, PARTS_POW2)
        ssq = tl.where(part == 0, tl.sum(square, axis=0), 0.0)
        tl.store(ssq_ptr + row * PARTS + part, ssq, mask=part < PARTS)


def enter_reference(x_t: Tensor, weight: Tensor, bias: Tensor, dtype) -> Tensor:
    """Return the residual stream (M, W) in ``dtype`` for ``x_t`` (M, A) float32."""
    return F.linear(x_t, weight, bias).to(dtype)


def leave_reference(
    x: Tensor, x_t: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor, dt: float, eps: float
) -> Tensor:
    """Return x_t (M, A) float32 after one Euler step, from the last layer's ``x`` (M, W)."""
    velocity = F.linear(adarms_reference(x, modulation, eps).float(), weight, bias)
    return x_t + dt * velocity

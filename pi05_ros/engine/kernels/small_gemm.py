"""The four matrix products of an expert layer, for a few dozen rows: memory-bound GEMMs.

Rows are action tokens (M = horizon), so a product streams its whole weight matrix and does little
else. The norm before and everything after a product are fused into it:

    qkv_rope       q, k, v = rope(adarms(x) @ W_qkv^T)
    gate_up        a = gelu_tanh(adarms(x) @ W_gate^T) * (adarms(x) @ W_up^T)
    gated_residual x = x + gate * (a @ W^T), and what the next norm needs of x

The adaptive norm costs no pass and nothing inside the loop over K. It multiplies rows by 1 / rms,
which commutes with the product, and adds a shift, whose product with W is a constant of the step:

    adarms(x) @ W^T = 1 / rms(x) * (x * (1 + scale)) @ W^T + shift @ W^T

So whoever writes x also writes ``scaled`` = x * (1 + scale) and the sums of squares of its
columns, and the epilogue multiplies and adds. Norms inside the loop took 1.8 us per turn on an
H200, three times the product itself.

Weights are (N, K) as in the checkpoint: K contiguous. Values round to the storage dtype where the
eager model rounds, except that ``scaled`` is rounded in place of the norm's result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.engine.kernels.adarms import GATE, adarms_reference, inverse_rms
from pi05_ros.engine.kernels.launch import let_next_start, prefetch_rows, wait_for_previous


@triton.jit
def _product(
    a_ptr, w_ptrs, rows, row_mask, k0,
    STRIDE: tl.constexpr, DEPTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return a[rows, k0 : k0 + DEPTH] @ w^T, (BM, BN) float32; ``w_ptrs`` are rows of w."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, DEPTH, BK):
        ks = k0 + k + tl.arange(0, BK)
        a_ptrs = a_ptr + rows[:, None] * STRIDE + ks[None, :]
        a = tl.load(a_ptrs, mask=row_mask[:, None], other=0.0)
        w = tl.load(w_ptrs[None, :] + ks[:, None])
        acc = tl.dot(a, w, acc, input_precision='ieee')
    return acc


@triton.jit
def qkv_rope_kernel(
    scaled_ptr,  # (M, K) x * (1 + scale)
    ssq_ptr,  # (M, PARTS) f32
    shift_ptr,  # ((heads + 2) * D,) f32: shift @ w^T
    w_ptr,  # ((heads + 2) * D, K): q heads, k, v
    cos_ptr, sin_ptr,  # (positions, D / 2), in the dtype of x
    start_ptr,  # (1,) int32: position of the first row
    out_ptr,  # (heads + 2, M, D): q heads, k, v
    M, heads,
    K: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PARTS_POW2: tl.constexpr,
    EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of BN / 2 rotation pairs (j, j + D/2) of one head, side by side."""
    HALF: tl.constexpr = BN // 2
    tiles: tl.constexpr = D // BN
    head = tl.program_id(0) // tiles
    col0 = (tl.program_id(0) % tiles) * HALF
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    row_mask = rows < M
    column = tl.arange(0, BN)
    w_rows = head * D + col0 + column // 2 + (column % 2) * (D // 2)
    first_ptr = w_ptr + (head * D + col0) * K
    let_next_start(PDL)
    prefetch_rows(first_ptr, 1, HALF * K, 0, WARPS, PREFETCH)
    prefetch_rows(first_ptr + (D // 2) * K, 1, HALF * K, 0, WARPS, PREFETCH)
    shift = tl.load(shift_ptr + w_rows)
    cols = col0 + tl.arange(0, HALF)
    table = (tl.load(start_ptr) + rows)[:, None] * (D // 2) + cols[None, :]
    cos = tl.load(cos_ptr + table, mask=row_mask[:, None], other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=row_mask[:, None], other=0.0).to(tl.float32)
    wait_for_previous(PDL)

    rstd = inverse_rms(ssq_ptr, rows, row_mask, PARTS, PARTS_POW2, K, EPS)
    acc = _product(scaled_ptr, w_ptr + w_rows * K, rows, row_mask, 0, K, K, BM, BN, BK)
    dtype = out_ptr.dtype.element_ty
    y = (acc * rstd[:, None] + shift[None, :]).to(dtype).to(tl.float32)
    first, second = tl.split(tl.reshape(y, (BM, HALF, 2)))
    is_value = head == heads + 1
    cos = tl.where(is_value, 1.0, cos)
    sin = tl.where(is_value, 0.0, sin)
    low = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    high = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    out = out_ptr + (head * M + rows)[:, None] * D + cols[None, :]
    tl.store(out, low.to(dtype), mask=row_mask[:, None])
    tl.store(out + D // 2, high.to(dtype), mask=row_mask[:, None])


@triton.jit
def gate_up_kernel(
    scaled_ptr,  # (M, K) x * (1 + scale)
    ssq_ptr,  # (M, PARTS) f32
    shift_ptr,  # (2 * N,) f32: shift @ w^T
    w_ptr,  # (2 * N, K): gate rows, up rows
    out_ptr,  # (M, N)
    M,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, PARTS_POW2: tl.constexpr,
    EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One program: BM rows, BN / 2 columns of the product gelu_tanh(gate) * up."""
    HALF: tl.constexpr = BN // 2
    col0 = tl.program_id(0) * HALF
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    row_mask = rows < M
    column = tl.arange(0, BN)
    w_rows = col0 + column // 2 + (column % 2) * N
    let_next_start(PDL)
    prefetch_rows(w_ptr + col0 * K, 1, HALF * K, 0, WARPS, PREFETCH)
    prefetch_rows(w_ptr + (N + col0) * K, 1, HALF * K, 0, WARPS, PREFETCH)
    shift = tl.load(shift_ptr + w_rows)
    wait_for_previous(PDL)

    rstd = inverse_rms(ssq_ptr, rows, row_mask, PARTS, PARTS_POW2, K, EPS)
    acc = _product(scaled_ptr, w_ptr + w_rows * K, rows, row_mask, 0, K, K, BM, BN, BK)
    dtype = out_ptr.dtype.element_ty
    y = (acc * rstd[:, None] + shift[None, :]).to(dtype).to(tl.float32)
    gate, up = tl.split(tl.reshape(y, (BM, HALF, 2)))
    # gelu_tanh(g) = g * sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3).
    twice_z = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    gate = (gate * tl.sigmoid(twice_z)).to(dtype).to(tl.float32)
    cols = col0 + tl.arange(0, HALF)
    out = out_ptr + rows[:, None] * N + cols[None, :]
    tl.store(out, (gate * up).to(dtype), mask=row_mask[:, None])


@triton.jit
def _add_gated(
    product, x, gate, scale,
    x_ptr, scaled_ptr, ssq_ptr, rows, row_mask, cols, part,
    N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write x + gate * product, and what the next norm needs: scaled rows, sums of squares."""
    dtype = x_ptr.dtype.element_ty
    at = rows[:, None] * N + cols[None, :]
    gated = (product.to(dtype).to(tl.float32) * gate[None, :]).to(dtype).to(tl.float32)
    x_new = (x.to(tl.float32) + gated).to(dtype)
    wide = x_new.to(tl.float32)
    tl.store(x_ptr + at, x_new, mask=row_mask[:, None])
    tl.store(scaled_ptr + at, (wide * scale[None, :]).to(dtype), mask=row_mask[:, None])
    tl.store(ssq_ptr + rows * PARTS + part, tl.sum(wide * wide, axis=1), mask=row_mask)


@triton.jit
def gated_residual_kernel(
    a_ptr,  # (M, K)
    w_ptr,  # (N, K)
    gate_ptr,  # (N,) f32
    scale_ptr,  # (N,) f32 of the next norm
    x_ptr,  # (M, N) residual stream, updated in place
    scaled_ptr,  # (M, N) x * (1 + scale), written
    ssq_ptr,  # (M, N / BN) f32, written
    partial_ptr,  # (tiles, SPLITS, BM, BN) f32 workspace
    counter_ptr,  # (tiles,) int32, zero before and after
    M,
    N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One program: one K range of a (BM, BN) tile; the last to finish sums the ranges in order.

    The sum runs over the stored ranges in index order whichever program comes last, so the
    result is the same bits on every run.
    """
    depth: tl.constexpr = K // SPLITS
    PARTS: tl.constexpr = N // BN
    split = tl.program_id(0)
    tile_n = tl.program_id(1)
    cols = tile_n * BN + tl.arange(0, BN)
    rows = tl.program_id(2) * BM + tl.arange(0, BM)
    row_mask = rows < M
    let_next_start(PDL)
    k0 = split * depth
    prefetch_rows(w_ptr + tile_n * BN * K + k0, BN, depth, K, WARPS, PREFETCH)
    gate = tl.load(gate_ptr + cols).to(x_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.load(scale_ptr + cols) + 1.0
    wait_for_previous(PDL)

    x_ptrs = x_ptr + rows[:, None] * N + cols[None, :]
    x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
    acc = _product(a_ptr, w_ptr + cols * K, rows, row_mask, k0, K, depth, BM, BN, BK)
    if SPLITS == 1:
        _add_gated(
            acc, x, gate, scale, x_ptr, scaled_ptr, ssq_ptr, rows, row_mask, cols, tile_n, N, PARTS
        )
    else:
        tile = tl.program_id(2) * PARTS + tile_n
        inside = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        partial_ptrs = partial_ptr + tile * SPLITS * BM * BN + inside
        tl.store(partial_ptrs + split * BM * BN, acc)
        tl.debug_barrier()  # every thread's part is stored before the tile is counted
        if tl.atomic_add(counter_ptr + tile, 1, sem='acq_rel', scope='gpu') == SPLITS - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for s in tl.static_range(SPLITS):
                total += tl.load(partial_ptrs + s * BM * BN, cache_modifier='.cg')
            _add_gated(
                total, x, gate, scale,
                x_ptr, scaled_ptr, ssq_ptr, rows, row_mask, cols, tile_n, N, PARTS,
            )  # fmt: skip
            tl.store(counter_ptr + tile, 0)


def qkv_rope_reference(
    x: Tensor, modulation: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """Return (heads + 2, M, D): rotated q heads, rotated k, v.

    Args:
        x: (M, W). modulation: (3, W) float32. weight: ((heads + 2) * D, W).
        cos, sin: (M, D / 2) at the rows' positions, in x's dtype.
    """
    head_dim = 2 * cos.shape[-1]
    heads = F.linear(adarms_reference(x, modulation, eps), weight)
    heads = heads.unflatten(-1, (-1, head_dim)).transpose(0, 1)  # (heads + 2, M, D)
    first, second = heads[:-1].chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated, heads[-1:]])


def gate_up_reference(x: Tensor, modulation: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return (M, F) = gelu_tanh(gate) * up; ``weight`` (2F, W) holds gate rows, then up rows."""
    gate, up = F.linear(adarms_reference(x, modulation, eps), weight).chunk(2, dim=-1)
    return F.gelu(gate, approximate='tanh') * up


def gated_residual_reference(x: Tensor, a: Tensor, weight: Tensor, modulation: Tensor) -> Tensor:
    """Return x + gate * (a @ weight^T); ``modulation`` is the norm's before the product."""
    return x + F.linear(a, weight) * modulation[GATE].to(x.dtype)

"""The four matrix products of an expert layer, for a few dozen rows: memory-bound GEMMs.

Rows are action tokens (M = horizon), so a product streams its whole weight matrix and does little
else. The norm before and everything after a product are fused into it:

    qkv_rope       q, k, v = rope(adarms(x) @ W_qkv^T)
    gate_up        a = gelu_tanh(adarms(x) @ W_gate^T) * (adarms(x) @ W_up^T)
    gated_residual x = x + gate * (a @ W^T), and the sums of squares that the next norm needs

Weights are (N, K) as in the checkpoint: K contiguous. Values round to the storage dtype where the
eager model rounds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.engine.kernels.adarms import GATE, adarms_reference, inverse_rms, modulated
from pi05_ros.engine.kernels.launch import let_next_start, prefetch_rows, wait_for_previous


@triton.jit
def _normed_products(
    x_ptr, ssq_ptr, mod_ptr,
    first_ptr, second_ptr,  # first row of two blocks of HALF weight rows
    rows, M,
    K: tl.constexpr, PARTS: tl.constexpr, PARTS_POW2: tl.constexpr, EPS: tl.constexpr,
    BM: tl.constexpr, HALF: tl.constexpr, BK: tl.constexpr, WARPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Return adarms(x) @ first^T and adarms(x) @ second^T, both (BM, HALF) float32."""
    let_next_start(PDL)
    prefetch_rows(first_ptr, 1, HALF * K, 0, WARPS, PDL)
    prefetch_rows(second_ptr, 1, HALF * K, 0, WARPS, PDL)
    wait_for_previous(PDL)

    row_mask = rows < M
    rstd = inverse_rms(ssq_ptr, rows, row_mask, PARTS, PARTS_POW2, K, EPS)
    half = tl.arange(0, HALF)
    first = tl.zeros((BM, HALF), tl.float32)
    second = tl.zeros((BM, HALF), tl.float32)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        w_offsets = half[None, :] * K + cols[:, None]
        w_first = tl.load(first_ptr + w_offsets)
        w_second = tl.load(second_ptr + w_offsets)
        x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], mask=row_mask[:, None], other=0.0)
        y = modulated(x, rstd, mod_ptr, cols, K)
        first = tl.dot(y, w_first, first, input_precision='ieee')
        second = tl.dot(y, w_second, second, input_precision='ieee')
    return first, second


@triton.jit
def qkv_rope_kernel(
    x_ptr,  # (M, K) residual stream
    ssq_ptr,  # (M, PARTS) f32
    mod_ptr,  # (3, K) f32
    w_ptr,  # ((heads + 2) * D, K): q heads, k, v
    cos_ptr, sin_ptr,  # (positions, D / 2), in the dtype of x
    start_ptr,  # (1,) int32: position of the first row
    out_ptr,  # (heads + 2, M, D): q heads, k, v
    M, heads,
    K: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PARTS_POW2: tl.constexpr,
    EPS: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr, BK: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of HALF rotation pairs (j, j + D/2) of one head."""
    tiles: tl.constexpr = D // 2 // HALF
    head = tl.program_id(0) // tiles
    col0 = (tl.program_id(0) % tiles) * HALF
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    first_ptr = w_ptr + (head * D + col0) * K
    first, second = _normed_products(
        x_ptr, ssq_ptr, mod_ptr, first_ptr, first_ptr + (D // 2) * K, rows, M,
        K, PARTS, PARTS_POW2, EPS, BM, HALF, BK, WARPS, PDL,
    )  # fmt: skip

    dtype = x_ptr.dtype.element_ty
    cols = col0 + tl.arange(0, HALF)
    row_mask = (rows < M)[:, None]
    table = (tl.load(start_ptr) + rows)[:, None] * (D // 2) + cols[None, :]
    cos = tl.load(cos_ptr + table, mask=row_mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=row_mask, other=0.0).to(tl.float32)
    is_value = head == heads + 1
    cos = tl.where(is_value, 1.0, cos)
    sin = tl.where(is_value, 0.0, sin)
    first = first.to(dtype).to(tl.float32)
    second = second.to(dtype).to(tl.float32)
    low = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    high = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    out = out_ptr + (head * M + rows)[:, None] * D + cols[None, :]
    tl.store(out, low.to(dtype), mask=row_mask)
    tl.store(out + D // 2, high.to(dtype), mask=row_mask)


@triton.jit
def gate_up_kernel(
    x_ptr,  # (M, K) residual stream
    ssq_ptr,  # (M, PARTS) f32
    mod_ptr,  # (3, K) f32
    w_ptr,  # (2 * N, K): gate rows, up rows
    out_ptr,  # (M, N)
    M,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, PARTS_POW2: tl.constexpr,
    EPS: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr, BK: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BM rows, HALF columns of the product gelu_tanh(gate) * up."""
    col0 = tl.program_id(0) * HALF
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    gate, up = _normed_products(
        x_ptr, ssq_ptr, mod_ptr, w_ptr + col0 * K, w_ptr + (N + col0) * K, rows, M,
        K, PARTS, PARTS_POW2, EPS, BM, HALF, BK, WARPS, PDL,
    )  # fmt: skip

    dtype = x_ptr.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)
    # gelu_tanh(g) = g * sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3).
    twice_z = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    gate = (gate * tl.sigmoid(twice_z)).to(dtype).to(tl.float32)
    out = gate * up.to(dtype).to(tl.float32)
    cols = col0 + tl.arange(0, HALF)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], out.to(dtype), mask=(rows < M)[:, None])


@triton.jit
def _add_gated(
    product, x_ptr, gate_ptr, ssq_ptr, rows, cols, part, M, N: tl.constexpr, PARTS: tl.constexpr
):
    """Add ``gate * product`` to x in place and leave the new rows' sums of squares."""
    dtype = x_ptr.dtype.element_ty
    row_mask = rows < M
    x_ptrs = x_ptr + rows[:, None] * N + cols[None, :]
    x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + cols).to(dtype).to(tl.float32)
    gated = (product.to(dtype).to(tl.float32) * gate[None, :]).to(dtype).to(tl.float32)
    x_new = (x + gated).to(dtype)
    tl.store(x_ptrs, x_new, mask=row_mask[:, None])
    x_new = x_new.to(tl.float32)
    tl.store(ssq_ptr + rows * PARTS + part, tl.sum(x_new * x_new, axis=1), mask=row_mask)


@triton.jit
def gated_residual_kernel(
    a_ptr,  # (M, K)
    w_ptr,  # (N, K)
    gate_ptr,  # (N,) f32
    x_ptr,  # (M, N) residual stream, updated in place
    ssq_ptr,  # (M, N / BN) f32, written
    partial_ptr,  # (tiles, SPLITS, BM, BN) f32 workspace
    counter_ptr,  # (tiles,) int32, zero before and after
    M,
    N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one K range of a (BM, BN) tile; the last to finish sums the ranges in order.

    The sum runs over the stored ranges in index order whichever program comes last, so the
    result is the same bits on every run.
    """
    depth: tl.constexpr = K // SPLITS
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    cols = tile_n * BN + tl.arange(0, BN)
    rows = tl.program_id(2) * BM + tl.arange(0, BM)
    row_mask = rows < M
    let_next_start(PDL)

    if depth == BK:
        # One block deep: the weights can be in registers before the activations exist.
        ks = split * depth + tl.arange(0, BK)
        w = tl.load(w_ptr + cols[None, :] * K + ks[:, None])
        wait_for_previous(PDL)
        a = tl.load(a_ptr + rows[:, None] * K + ks[None, :], mask=row_mask[:, None], other=0.0)
        acc = tl.dot(a, w, input_precision='ieee')
    else:
        prefetch_rows(w_ptr + tile_n * BN * K + split * depth, BN, depth, K, WARPS, PDL)
        wait_for_previous(PDL)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, depth, BK):
            ks = split * depth + k + tl.arange(0, BK)
            w = tl.load(w_ptr + cols[None, :] * K + ks[:, None])
            a = tl.load(a_ptr + rows[:, None] * K + ks[None, :], mask=row_mask[:, None], other=0.0)
            acc = tl.dot(a, w, acc, input_precision='ieee')

    PARTS: tl.constexpr = N // BN
    if SPLITS == 1:
        _add_gated(acc, x_ptr, gate_ptr, ssq_ptr, rows, cols, tile_n, M, N, PARTS)
    else:
        tile = tl.program_id(2) * PARTS + tile_n
        inside = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        partial_ptrs = partial_ptr + tile * SPLITS * BM * BN + inside
        tl.store(partial_ptrs + split * BM * BN, acc, mask=row_mask[:, None])
        tl.debug_barrier()  # every thread's part is stored before the tile is counted
        if tl.atomic_add(counter_ptr + tile, 1, sem='acq_rel', scope='gpu') == SPLITS - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for s in tl.static_range(SPLITS):
                total += tl.load(
                    partial_ptrs + s * BM * BN,
                    mask=row_mask[:, None], other=0.0, cache_modifier='.cg',
                )  # fmt: skip
            _add_gated(total, x_ptr, gate_ptr, ssq_ptr, rows, cols, tile_n, M, N, PARTS)
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

"""Attention of the action tokens over prefix and suffix, split over the keys.

All query heads share one K/V head, so they are packed as rows: (heads * M, D) queries against
n_prefix + M keys. One program takes a block of rows and a range of key blocks and leaves an
unnormalised sum with its running maximum; a second kernel merges the ranges:

    m_s = max_j l_j    z_s = sum_j exp(l_j - m_s)    o_s = sum_j exp(l_j - m_s) v_j
    o = sum_s exp(m_s - m) o_s / sum_s exp(m_s - m) z_s        l_j = q . k_j / sqrt(D)

The number of prefix keys is read from device memory: a shorter prompt makes fewer key blocks,
spread evenly over the same grid. Logits stay float32 (the eager model rounds them to bf16).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.engine.kernels.launch import let_next_start, prefetch_rows, wait_for_previous


@triton.jit
def _blocks_per_split(n_prefix, M, SPLITS: tl.constexpr, BN: tl.constexpr):
    """Return prefix blocks, all blocks, and blocks per split."""
    prefix_blocks = tl.cdiv(n_prefix, BN)
    blocks = prefix_blocks + tl.cdiv(M, BN)
    return prefix_blocks, blocks, tl.cdiv(blocks, SPLITS)


@triton.jit
def attend_kernel(
    qkv_ptr,  # (heads + 2, M, D): q heads, suffix k, suffix v
    k_ptr, v_ptr,  # (P_max, D) prefix of this layer
    n_prefix_ptr,  # (1,) int32
    sum_ptr,  # (SPLITS, heads * M, D) f32, written
    max_ptr, norm_ptr,  # (SPLITS, heads * M) f32, written; max is in units of log2
    M, heads, log2_scale,
    D: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BM packed query rows, one range of key blocks."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    num_rows = heads * M
    row_mask = rows < num_rows
    dims = tl.arange(0, D)
    n_prefix = tl.load(n_prefix_ptr)
    prefix_blocks, blocks, per_split = _blocks_per_split(n_prefix, M, SPLITS, BN)
    begin = split * per_split
    end = tl.minimum(begin + per_split, blocks)
    let_next_start(PDL)
    if (begin + 1) * BN <= n_prefix:
        prefetch_rows(k_ptr + begin * BN * D, 1, BN * D, 0, WARPS, PDL)
        prefetch_rows(v_ptr + begin * BN * D, 1, BN * D, 0, WARPS, PDL)
    wait_for_previous(PDL)

    if begin < blocks:
        q = tl.load(
            qkv_ptr + rows[:, None] * D + dims[None, :], mask=row_mask[:, None], other=0.0
        )
        top = tl.full((BM,), float('-inf'), tl.float32)
        norm = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, D), tl.float32)
        for block in range(begin, end):
            if block < prefix_blocks:
                first, limit, k_base, v_base = block * BN, n_prefix, k_ptr, v_ptr
            else:
                first, limit = (block - prefix_blocks) * BN, M
                k_base, v_base = qkv_ptr + num_rows * D, qkv_ptr + (num_rows + M) * D
            keys = first + tl.arange(0, BN)
            key_mask = keys < limit
            offsets = keys[:, None] * D + dims[None, :]
            k = tl.load(k_base + offsets, mask=key_mask[:, None], other=0.0)
            v = tl.load(v_base + offsets, mask=key_mask[:, None], other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision='ieee') * log2_scale
            logits = tl.where(key_mask[None, :], logits, float('-inf'))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            rescale = tl.exp2(top - new_top)
            p = tl.exp2(logits - new_top[:, None])
            norm = norm * rescale + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision='ieee')
            top = new_top
        at = split * num_rows + rows
        tl.store(max_ptr + at, top, mask=row_mask)
        tl.store(norm_ptr + at, norm, mask=row_mask)
        tl.store(sum_ptr + at[:, None] * D + dims[None, :], acc, mask=row_mask[:, None])


@triton.jit
def merge_kernel(
    sum_ptr,  # (SPLITS, heads * M, D) f32
    max_ptr, norm_ptr,  # (SPLITS, heads * M) f32
    n_prefix_ptr,  # (1,) int32
    out_ptr,  # (M, heads * D), written
    M, heads,
    D: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: one packed query row, all key ranges in index order."""
    let_next_start(PDL)
    row = tl.program_id(0)
    num_rows = heads * M
    _, blocks, per_split = _blocks_per_split(tl.load(n_prefix_ptr), M, SPLITS, BN)
    splits = tl.arange(0, SPLITS_POW2)
    used = splits < tl.cdiv(blocks, per_split)
    dims = tl.arange(0, D)
    wait_for_previous(PDL)

    at = splits * num_rows + row
    top = tl.load(max_ptr + at, mask=used, other=float('-inf'))
    norm = tl.load(norm_ptr + at, mask=used, other=0.0)
    sums = tl.load(sum_ptr + at[:, None] * D + dims[None, :], mask=used[:, None], other=0.0)
    weight = tl.exp2(top - tl.max(top, axis=0))
    out = tl.sum(sums * weight[:, None], axis=0) / tl.sum(norm * weight, axis=0)
    head = row // M
    out_ptrs = out_ptr + (row - head * M) * (heads * D) + head * D + dims
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty))


def attention_reference(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return (M, heads * D) for ``qkv`` (heads + 2, M, D) over prefix ``keys``/``values`` (P, D).

    Rounds where the eager model does: logits to the dtype, softmax in float32, weights to it.
    """
    query = qkv[:-2]
    head_dim = query.shape[-1]
    keys, values = torch.cat([keys, qkv[-2]]), torch.cat([values, qkv[-1]])
    logits = torch.matmul(query, keys.T) * head_dim**-0.5
    weights = torch.softmax(logits.float(), dim=-1).to(values.dtype)
    return torch.matmul(weights, values).transpose(0, 1).flatten(1)

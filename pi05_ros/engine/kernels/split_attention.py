"""Attention of the action tokens over prefix and suffix, split over the keys.

All query heads share one K/V head, so they are packed as rows: (heads * M, D) queries against
n_prefix + M keys. One program takes a block of rows and a range of key blocks and leaves that
range's result, in the storage dtype, with its log-sum; a second kernel merges the ranges:

    z_s = log sum_j exp(l_j)      o_s = sum_j exp(l_j - z_s) v_j        l_j = q . k_j / sqrt(D)
    o = sum_s exp(z_s) o_s / sum_s exp(z_s)

The number of prefix keys is read from device memory: a shorter prompt makes fewer key blocks,
spread evenly over the same grid. Logits stay float32 (the eager model rounds them to bf16).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.engine.kernels.launch import let_next_start, prefetch_range, wait_for_previous


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
    part_ptr,  # (SPLITS, heads * M, D), written
    log_sum_ptr,  # (SPLITS, heads * M) f32, written, in units of log2
    M, heads, log2_scale,
    D: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
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
    # The weights of a step displace the prefix from L2, and no kernel of the step writes it.
    prefix_keys = (tl.minimum(end * BN, n_prefix) - begin * BN) * D
    prefetch_range(k_ptr + begin * BN * D, prefix_keys, WARPS, PREFETCH)
    prefetch_range(v_ptr + begin * BN * D, prefix_keys, WARPS, PREFETCH)
    wait_for_previous(PDL)

    if begin < blocks:
        q = tl.load(qkv_ptr + rows[:, None] * D + dims[None, :], mask=row_mask[:, None], other=0.0)
        top = tl.full((BM,), float('-inf'), tl.float32)
        norm = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, D), tl.float32)
        for block in range(begin, end):
            # Selections, not branches: a branch would keep the loads from being pipelined.
            is_prefix = block < prefix_blocks
            first = tl.where(is_prefix, block, block - prefix_blocks) * BN
            limit = tl.where(is_prefix, n_prefix, M)
            k_base = k_ptr if is_prefix else qkv_ptr + num_rows * D
            v_base = v_ptr if is_prefix else qkv_ptr + (num_rows + M) * D
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
        tl.store(log_sum_ptr + at, top + tl.log2(norm), mask=row_mask)
        part = (acc * (1.0 / norm)[:, None]).to(part_ptr.dtype.element_ty)
        tl.store(part_ptr + at[:, None] * D + dims[None, :], part, mask=row_mask[:, None])


@triton.jit
def merge_kernel(
    part_ptr,  # (SPLITS, heads * M, D)
    log_sum_ptr,  # (SPLITS, heads * M) f32
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
    n_prefix = tl.load(n_prefix_ptr)
    splits = tl.arange(0, SPLITS_POW2)
    _, blocks, per_split = _blocks_per_split(n_prefix, M, SPLITS, BN)
    used = splits < tl.cdiv(blocks, per_split)
    dims = tl.arange(0, D)
    wait_for_previous(PDL)

    at = splits * num_rows + row
    log_sum = tl.load(log_sum_ptr + at, mask=used, other=float('-inf'))
    parts = tl.load(part_ptr + at[:, None] * D + dims[None, :], mask=used[:, None], other=0.0)
    weight = tl.exp2(log_sum - tl.max(log_sum, axis=0))
    out = tl.sum(parts.to(tl.float32) * weight[:, None], axis=0) / tl.sum(weight, axis=0)
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

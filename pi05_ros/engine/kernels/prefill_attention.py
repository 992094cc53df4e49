"""Attention of the prefix: all heads share one K/V head, the number of keys is on the device.

Queries are packed as rows (position, head), so that one tile works on several heads against the
same keys; keys beyond the valid prefix are masked, and tiles of padded queries do nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import shared_memory_bytes


@triton.jit
def _prefill_attention_kernel(
    p_q,  # (positions * HEADS, DIM)
    keys_desc,  # (>= keys rounded up to BLOCK_N, DIM)
    values_desc,
    p_count,  # (1,) int32: valid keys
    p_out,  # (positions * HEADS, DIM)
    num_rows,
    scale_log2,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    count = tl.load(p_count)
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= count * HEADS:
        return
    o_row = first_row + tl.arange(0, BLOCK_M)
    o_dim = tl.arange(0, DIM)
    m_row = (o_row < num_rows)[:, None]
    o_tile = o_row[:, None] * DIM + o_dim[None, :]
    b_q = tl.load(p_q + o_tile, mask=m_row, other=0.0)
    b_acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    b_max = tl.full((BLOCK_M,), -float('inf'), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    o_key = tl.arange(0, BLOCK_N)
    for start in range(0, count, BLOCK_N):
        b_k = keys_desc.load([start, 0])
        b_scores = tl.dot(b_q, b_k.T, input_precision='ieee') * scale_log2
        b_scores = tl.where((start + o_key < count)[None, :], b_scores, -float('inf'))
        b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_weights = tl.exp2(b_scores - b_new_max[:, None])
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=1)
        b_v = values_desc.load([start, 0])
        b_acc = b_acc * b_decay[:, None]
        b_acc = tl.dot(b_weights.to(b_v.dtype), b_v, b_acc, input_precision='ieee')
        b_max = b_new_max
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_tile, b_out, mask=m_row)


# Keys and values are read in whole blocks: their buffers hold a multiple of this many rows.
KEY_ROWS_MULTIPLE = 128
# What fits the shared memory of a Hopper multiprocessor, and of any GPU with bfloat16, at the
# largest head dimension.
_LARGE_LAUNCH = {'block_m': 64, 'block_n': 64, 'warps': 4, 'stages': 3}
_SMALL_LAUNCH = {'block_m': 64, 'block_n': 32, 'warps': 4, 'stages': 1}
_LARGE_SHARED_BYTES = 220 * 1024


def default_launch(device: torch.device) -> dict[str, int]:
    """Return block sizes that fit a device."""
    large = shared_memory_bytes(device) >= _LARGE_SHARED_BYTES
    return dict(_LARGE_LAUNCH if large else _SMALL_LAUNCH)


def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    count: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    launch: dict[str, int] | None = None,
) -> None:
    """Write softmax(q K^T * scale) V over the first ``count`` keys.

    Args:
        q, out: (M, heads * D). Rows of ``out`` from ``count`` on are left as they are.
        keys, values: (R, D) with R >= M and a multiple of :data:`KEY_ROWS_MULTIPLE`; rows beyond
            ``count`` must be finite.
        count: (1,) int32, on the device.
        launch: ``block_m``, ``block_n`` (powers of two up to KEY_ROWS_MULTIPLE), ``warps``,
            ``stages``.
    """
    launch = launch or default_launch(q.device)
    dim = keys.shape[1]
    heads = q.shape[1] // dim
    rows = q.shape[0] * heads
    _prefill_attention_kernel[(triton.cdiv(rows, launch['block_m']),)](
        q,
        TensorDescriptor.from_tensor(keys, [launch['block_n'], dim]),
        TensorDescriptor.from_tensor(values, [launch['block_n'], dim]),
        count,
        out,
        rows,
        scale * 1.4426950408889634,  # log2(e): exp2 is one instruction
        HEADS=heads,
        DIM=dim,
        BLOCK_M=launch['block_m'],
        BLOCK_N=launch['block_n'],
        num_warps=launch['warps'],
        num_stages=launch['stages'],
    )


def prefill_attention_plain(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    count: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Do what :func:`prefill_attention` does, in plain PyTorch (softmax in fp32)."""
    rows, dim = q.shape[0], keys.shape[1]
    queries = q.view(rows, -1, dim).transpose(0, 1).float()
    scores = queries @ keys[:rows].float().T * scale
    masked = torch.arange(rows, device=q.device) >= count
    weights = scores.masked_fill(masked, float('-inf')).softmax(dim=-1).to(q.dtype)
    out.copy_((weights.float() @ values[:rows].float()).transpose(0, 1).reshape(rows, -1))

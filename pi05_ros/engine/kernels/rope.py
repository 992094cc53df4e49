"""RMSNorm scale, rotary embedding and K/V write in one kernel, one row of the prefix each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pi05_ros.model.config import GemmaConfig
from pi05_ros.model.gemma import rope_tables

from .gate_up import row_scale, row_scale_plain
from .launch import let_next_start


@triton.jit
def _rope_kernel(
    p_qkv,  # (rows, (QUERY_HEADS + 2) * DIM): q | k | v, of the raw residual
    p_x,  # (rows, width): the residual
    p_cos,  # (rows, DIM / 2)
    p_sin,
    p_q,  # (rows, QUERY_HEADS * DIM)
    p_keys,  # (rows, DIM)
    p_values,  # (rows, DIM)
    width,
    eps,
    QUERY_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    EARLY_NEXT: tl.constexpr,
):
    let_next_start(EARLY_NEXT)
    row = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = DIM // 2
    o_half = tl.arange(0, HALF)
    scale = row_scale(p_x, row, width, eps, WIDTH_BLOCK)
    b_cos = tl.load(p_cos + row * HALF + o_half).to(tl.float32) * scale
    b_sin = tl.load(p_sin + row * HALF + o_half).to(tl.float32) * scale
    p_row = p_qkv + row * (QUERY_HEADS + 2) * DIM

    p_key = p_row + QUERY_HEADS * DIM + o_half
    b_low = tl.load(p_key).to(tl.float32)
    b_high = tl.load(p_key + HALF).to(tl.float32)
    dtype = p_keys.dtype.element_ty
    p_out = p_keys + row * DIM + o_half
    tl.store(p_out, (b_low * b_cos - b_high * b_sin).to(dtype))
    tl.store(p_out + HALF, (b_high * b_cos + b_low * b_sin).to(dtype))

    o_dim = tl.arange(0, DIM)
    b_value = tl.load(p_row + (QUERY_HEADS + 1) * DIM + o_dim).to(tl.float32) * scale
    tl.store(p_values + row * DIM + o_dim, b_value.to(dtype))

    if QUERY_HEADS > 0:
        o_head = tl.arange(0, HEADS_BLOCK)[:, None]
        o_query = o_head * DIM + o_half[None, :]
        m_query = o_head < QUERY_HEADS
        b_low = tl.load(p_row + o_query, mask=m_query, other=0.0).to(tl.float32)
        b_high = tl.load(p_row + o_query + HALF, mask=m_query, other=0.0).to(tl.float32)
        b_cos = b_cos[None, :]
        b_sin = b_sin[None, :]
        p_out = p_q + row * QUERY_HEADS * DIM + o_query
        tl.store(p_out, (b_low * b_cos - b_high * b_sin).to(dtype), mask=m_query)
        tl.store(p_out + HALF, (b_high * b_cos + b_low * b_sin).to(dtype), mask=m_query)


def rope_kv(
    qkv: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    q: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    early_next: bool = False,
) -> None:
    """Scale by 1 / rms(x), rotate q and k (half-split), write q, K and V.

    Args:
        qkv: (M, (heads + 2) * D), projected from the *unnormalised* residual; (M, 2 * D) holds
            only k and v.
        x: (M, W) residual. cos, sin: (>= M, D / 2); row i is position i.
        q: (M, heads * D), or None when qkv holds no queries.
        keys, values: (>= M, D).
        early_next: the kernel behind may start at once; it waits for this one itself.
    """
    rows, dim = qkv.shape[0], keys.shape[-1]
    heads = qkv.shape[1] // dim - 2
    _rope_kernel[(rows,)](
        qkv,
        x,
        cos,
        sin,
        keys if q is None else q,
        keys,
        values,
        x.shape[1],
        eps,
        QUERY_HEADS=heads,
        HEADS_BLOCK=triton.next_power_of_2(max(heads, 1)),
        DIM=dim,
        WIDTH_BLOCK=triton.next_power_of_2(x.shape[1]),
        EARLY_NEXT=early_next,
        num_warps=4,
    )


def rope_kv_plain(
    qkv: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    q: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Do what :func:`rope_kv` does, in plain PyTorch."""
    rows, dim = qkv.shape[0], keys.shape[-1]
    scaled = (qkv.float() * row_scale_plain(x, eps)).view(rows, -1, dim)
    values[:rows].copy_(scaled[:, -1])
    rotated = rotate(scaled[:, :-1], cos[:rows, None].float(), sin[:rows, None].float())
    keys[:rows].copy_(rotated[:, -1])
    if q is not None:
        q.copy_(rotated[:, :-1].reshape(rows, -1))


def qkv_rope_plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    scale: torch.Tensor,
    q: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Project the residual to q, k and v and do what :func:`rope_kv` does.

    Args:
        x: (M, W), the *unnormalised* residual. weight: ((heads + 2) * D, W), in the order of
            ``Ops.order_qkv``; (2 * D, W) has only k and v.
        scale: (>= M,) fp32, scratch of kernels that need it.
        cos, sin, q, keys, values: as for :func:`rope_kv`.
    """
    rope_kv_plain(torch.nn.functional.linear(x, weight), x, cos, sin, eps, q, keys, values)


def order_qkv_plain(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight as it is: :func:`qkv_rope_plain` reads head after head."""
    return weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last dimension."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def half_tables(
    config: GemmaConfig, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, (positions, D / 2), rounded exactly as the oracle rounds them."""
    cos, sin = rope_tables(torch.arange(positions, device=device), config, dtype)
    half = config.head_dim // 2
    return cos[:, :half].contiguous(), sin[:, :half].contiguous()

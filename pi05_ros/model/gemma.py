"""Gemma: the parts that both stacks share, and the prefix stack (openpi modeling_gemma.py).

There is no batch axis: N queries, M keys, D head dimension. The rounding points are those of
openpi's eager PyTorch model: every operation below rounds to the dtype of its inputs unless it
says float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import GemmaConfig

# Added to the logit of a key that must not be seen (openpi pi0_pytorch.py).
MASKED_LOGIT = -2.3819763e38


@dataclass(frozen=True)
class PrefixCache:
    """What the action expert sees of images and prompt; K is stored after RoPE.

    Args:
        keys: (L, P, num_kv_heads * D), heads side by side.
        values: the same shape.
        valid: (P,) bool, False where a masked view or padding was kept; None: all are valid.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None

    @property
    def first_suffix_position(self) -> Tensor | int:
        """Number of valid prefix tokens: the position of the first action token."""
        return self.keys.shape[1] if self.valid is None else self.valid.sum()


class PrefixStack(nn.Module):
    """The language model, used for nothing but the K and V of each of its layers."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(PrefixLayer(config) for _ in range(config.depth))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> PrefixCache:
        """Run a prefix (P, width), in which every token sees every valid token."""
        rope = rope_tables(prefix_positions(x.shape[0], valid, x.device), self.config, x.dtype)
        bias = mask_bias(valid)
        keys, values = [], []
        for layer in cast('Iterable[PrefixLayer]', self.layers):
            query, key, value = layer.project(x, rope)
            keys.append(key)
            values.append(value)
            # Nobody reads what the last layer would do with its own K and V.
            if len(keys) < self.config.depth:
                x = layer.finish(x, query, key, value, bias)
        return PrefixCache(torch.stack(keys), torch.stack(values), valid)


class PrefixLayer(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config)
        self.self_attn = GemmaAttention(config)
        self.post_attention_layernorm = RmsNorm(config)
        self.mlp = GemmaMlp(config)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (N, heads, D), and k and v (N, num_kv_heads * D) of this layer's input."""
        return self.self_attn.project(self.input_layernorm(x), rope)

    def finish(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return this layer's output, given its input and what :meth:`project` made of it."""
        x = x + self.self_attn.attend(query, key, value, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class RmsNorm(nn.Module):
    """Root mean square norm whose stored weight is an offset from one."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.zeros(config.width))

    def forward(self, x: Tensor) -> Tensor:
        """Norm (..., width) in float32; the result has the dtype of ``x``."""
        return (rms_normalise(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype)


class GemmaAttention(nn.Module):
    """Attention in which groups of query heads share one K/V head; no biases."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        query_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, query_dim, bias=False)
        self.k_proj = nn.Linear(config.width, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.width, kv_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.width, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (N, heads, D) and k (N, num_kv_heads * D), both rotated, and v like k."""
        head_dim = self.config.head_dim
        query = rotate(self.q_proj(x).unflatten(-1, (-1, head_dim)), rope)
        key = rotate(self.k_proj(x).unflatten(-1, (-1, head_dim)), rope)
        return query, key.flatten(1), self.v_proj(x)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Mix ``values`` by softmax(q k / sqrt(D)), then project back to the width.

        Args:
            query: (N, heads, D).
            keys, values: (M, num_kv_heads * D).
            bias: (M,) float32 added to every query's logits, or None.
        """
        num_kv, head_dim = self.config.num_kv_heads, self.config.head_dim
        num_queries = query.shape[0]
        # (N, heads, D) -> (kv heads, queries of that kv head, D): consecutive heads share one.
        query = query.transpose(0, 1).reshape(num_kv, -1, head_dim)
        keys = keys.unflatten(-1, (num_kv, head_dim)).transpose(0, 1)
        values = values.unflatten(-1, (num_kv, head_dim)).transpose(0, 1)
        logits = query @ keys.transpose(1, 2)
        logits *= head_dim**-0.5
        if bias is not None:
            logits = logits + bias
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed = (weights @ values).reshape(-1, num_queries, head_dim)  # (heads, N, D)
        return self.o_proj(mixed.transpose(0, 1).flatten(1))


class GemmaMlp(nn.Module):
    """``down(gelu_tanh(gate(x)) * up(x))``, no biases."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width) to (N, width)."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate='tanh') * self.up_proj(x))


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """Divide ``x`` (..., width) by its root mean square; computed and returned in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def prefix_positions(count: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Return (P,) positions; a token that is not valid does not advance them."""
    if valid is None:
        return torch.arange(count, device=device)
    return valid.long().cumsum(0) - 1


def mask_bias(valid: Tensor | None) -> Tensor | None:
    """Return (M,) float32 to add to logits: 0 for a valid key, hugely negative otherwise."""
    if valid is None:
        return None
    return torch.zeros(valid.shape, device=valid.device).masked_fill(~valid, MASKED_LOGIT)


def rope_tables(
    positions: Tensor, config: GemmaConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (N, D): angles in float32, the tables rounded to ``dtype``.

    Source: rotary embedding with the two halves of a head as real and imaginary part
    (transformers' Gemma, as openpi uses it).
    """
    # openpi casts its whole Gemma modules, the table of frequencies with them: in bfloat16 the
    # frequencies themselves are rounded. Exact ones move K by 0.5 at position 967 (golden data).
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    frequencies = (1.0 / config.rope_theta**exponents).to(dtype).float()
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads (N, heads, D) by the tables of :func:`rope_tables`."""
    cos, sin = (table[:, None] for table in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin

"""The action expert: a second Gemma stack that sees the prefix and is steered by the flow time.

Its norms are adaptive (openpi modeling_gemma.py): scale, shift and gate of every norm come from
one vector, the embedded flow time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import GemmaConfig
from .gemma import (
    GemmaAttention,
    GemmaMlp,
    PrefixCache,
    mask_bias,
    rms_normalise,
    rope_tables,
)

# Shortest and longest period of the flow-time embedding (openpi pi0_pytorch.py).
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0


class ActionExpert(nn.Module):
    """The stack that turns H embedded noisy actions into H features of their velocity."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(ExpertLayer(config) for _ in range(config.depth))
        self.norm = AdaptiveRmsNorm(config)

    def forward(self, x: Tensor, cond: Tensor, cache: PrefixCache) -> Tensor:
        """Run the suffix (H, width), in which every token sees the valid prefix and the suffix.

        Args:
            x: (H, width) embedded actions.
            cond: (width,) float32 embedded flow time.
            cache: K and V of the prefix, one entry per layer.
        """
        horizon = x.shape[0]
        positions = cache.first_suffix_position + torch.arange(horizon, device=x.device)
        rope = rope_tables(positions, self.config, x.dtype)
        bias = mask_bias(cache.valid)
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(horizon)])
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer(x, cond, rope, keys, values, bias)
        x, _ = self.norm(x, cond)  # the last norm's gate has nothing to gate
        return x


class ExpertLayer(nn.Module):
    """``x += gate1 * attention(norm1(x))``, then ``x += gate2 * mlp(norm2(x))``."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = AdaptiveRmsNorm(config)
        self.self_attn = GemmaAttention(config)
        self.post_attention_layernorm = AdaptiveRmsNorm(config)
        self.mlp = GemmaMlp(config)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        rope: tuple[Tensor, Tensor],
        prefix_keys: Tensor,
        prefix_values: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Run the layer on (H, width), with this layer's K and V (P, ...) of the prefix."""
        normed, gate = self.input_layernorm(x, cond)
        query, key, value = self.self_attn.project(normed, rope)
        keys = torch.cat([prefix_keys, key])
        values = torch.cat([prefix_values, value])
        x = x + gate * self.self_attn.attend(query, keys, values, bias)
        normed, gate = self.post_attention_layernorm(x, cond)
        return x + gate * self.mlp(normed)


class AdaptiveRmsNorm(nn.Module):
    """RMS norm whose scale, shift and gate are a linear function of the condition."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.dense = nn.Linear(config.width, 3 * config.width)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed x (H, width) and the gate (width,), both in the dtype of ``x``."""
        scale, shift, gate = self.dense(cond).chunk(3)
        normed = rms_normalise(x, self.eps) * (1.0 + scale) + shift
        return normed.to(x.dtype), gate.to(x.dtype)


def embed_time(t: float, width: int, device: torch.device) -> Tensor:
    """Return the sines and cosines (width,) float32 of the flow time ``t`` in [0, 1]."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angles = (1.0 / period * 2.0 * math.pi) * t
    return torch.cat([angles.sin(), angles.cos()]).float()

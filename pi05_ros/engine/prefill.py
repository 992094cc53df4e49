"""Prefill: the prefix through the language model, leaving K and V of every layer.

The number of valid prefix rows lives on the device. The host only picks how many rows the GEMMs
run over (a bucket at or above it). Rows between the two enter as zero, and the attention leaves
there what calls before wrote: neither their keys nor anything else of them may reach a valid row.
"""

from __future__ import annotations

import torch

from pi05_ros.model.config import Pi05Config

from .kernels.prefill_attention import KEY_ROWS_MULTIPLE
from .kernels.rope import half_tables
from .ops import Ops
from .tuning import tuned_rows
from .weights import PrefillLayer, PrefillWeights

# Tiles of the products have a multiple of 8 tokens on Hopper GPUs: finer buckets gain nothing.
BUCKET_TOKENS = 8


def bucket_rows(num_image_rows: int, max_prompt_tokens: int) -> tuple[int, ...]:
    """Return the row counts for which a prefill is captured, ascending; the last is the longest.

    Counts lie at multiples of :data:`BUCKET_TOKENS`, where tiles end, not at multiples of the
    prompt length.
    """
    longest = num_image_rows + max_prompt_tokens
    first = -(-(num_image_rows + 1) // BUCKET_TOKENS) * BUCKET_TOKENS
    return (*range(first, longest, BUCKET_TOKENS), longest)


class PrefillStage:
    """The language model over static buffers.

    Args:
        weights: packed weights; their dtype is the stage's.
        num_image_rows: rows of the prefix that Vision fills.
        max_prompt_tokens: most prompt tokens of a call.

    Attributes:
        prefix: (R, W) image tokens, then prompt; R is padded to whole key blocks.
        keys, values: (L, R, D) K after RoPE and V.
        tokens: (max_prompt_tokens,) int32; num_tokens, num_prefix: (1,) int32: the call's lengths.
    """

    def __init__(
        self,
        weights: PrefillWeights,
        config: Pi05Config,
        ops: Ops,
        num_image_rows: int,
        max_prompt_tokens: int,
        lengths: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        self.weights = weights
        self.config = config.vlm
        self.ops = ops
        self.num_image_rows = num_image_rows
        self.buckets = bucket_rows(num_image_rows, max_prompt_tokens)
        vlm, like = config.vlm, weights.embedding
        rows = -(-self.buckets[-1] // KEY_ROWS_MULTIPLE) * KEY_ROWS_MULTIPLE
        self.prefix = like.new_zeros(rows, vlm.width)
        self.x = like.new_zeros(rows, vlm.width)
        self.q = like.new_zeros(rows, vlm.num_heads * vlm.head_dim)
        self.attended = torch.zeros_like(self.q)
        self.scale = torch.zeros(rows, device=like.device)
        self.hidden = like.new_zeros(rows, vlm.mlp_dim)
        self.keys = like.new_zeros(vlm.depth, rows, vlm.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.tokens = tokens
        self.num_tokens, self.num_prefix = lengths[:1], lengths[1:2]
        self.cos, self.sin = half_tables(vlm, rows, like.dtype, like.device)

    @property
    def tuned_buckets(self) -> tuple[int, ...]:
        """Return the row counts whose operations are timed; the others take the next one's."""
        longest = self.buckets[-1]
        return tuple(rows for rows in self.buckets if rows in (tuned_rows(rows), longest))

    def bucket(self, num_tokens: int) -> int:
        """Return the rows of the smallest captured prefill that holds a prompt."""
        needed = self.num_image_rows + num_tokens
        return next(rows for rows in self.buckets if rows >= needed)

    def launch(self, rows: int) -> None:
        """Enqueue the stage on the current stream, over ``rows`` rows of the prefix."""
        ops, vlm = self.ops, self.config
        prompt = self.prefix[self.num_image_rows : rows]
        ops.embed_prompt(
            self.tokens, self.num_tokens, self.weights.embedding, vlm.width**0.5, prompt
        )
        x = self.prefix[:rows]
        for index, layer in enumerate(self.weights.layers):
            q = self.q[:rows]
            self._fill_cache(index, x, layer.qkv, q)
            x = self._finish_layer(index, layer, x, q)
        self._fill_cache(vlm.depth - 1, x, self.weights.last_kv, None)

    def _fill_cache(
        self, index: int, x: torch.Tensor, weight: torch.Tensor, q: torch.Tensor | None
    ) -> None:
        """Enqueue the projection, rotation and K/V write of one layer."""
        self.ops.qkv_rope(
            x,
            weight,
            self.cos,
            self.sin,
            self.config.rms_norm_eps,
            self.scale,
            q,
            self.keys[index],
            self.values[index],
        )

    def _finish_layer(
        self, index: int, layer: PrefillLayer, x: torch.Tensor, q: torch.Tensor
    ) -> torch.Tensor:
        """Enqueue the rest of a layer; the prefix stays as it is, the residual is ``self.x``."""
        ops, rows, eps = self.ops, x.shape[0], self.config.rms_norm_eps
        attended, residual = self.attended[:rows], self.x[:rows]
        ops.prefill_attention(
            q,
            self.keys[index],
            self.values[index],
            self.num_prefix,
            self.config.head_dim**-0.5,
            attended,
        )
        ops.linear(attended, layer.out, residual, residual=x)
        ops.gate_up(residual, layer.gate_up, eps, self.scale, self.hidden[:rows])
        ops.down(self.hidden[:rows], layer.down, residual)
        return residual

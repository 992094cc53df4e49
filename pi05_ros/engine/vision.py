"""Vision: raw images to the first rows of the prefix.

The pixels arrive as patches (:mod:`pi05_ros.engine.kernels.resize`); SigLIP and the projector
follow, all views in one batch of rows.
"""

from __future__ import annotations

import torch

from pi05_ros.model.config import Pi05Config

from .ops import Ops
from .weights import VisionWeights


class VisionStage:
    """SigLIP and the projector over static buffers.

    Args:
        weights: packed weights; their dtype is the stage's.
        ops: what it runs on.
        num_views: V, fixed.
        prefix: (>= V * tokens, W) receives the image tokens in its first rows.

    Attributes:
        patches: (V * tokens, K) the stage's input, pixel values 0..255.
    """

    def __init__(
        self,
        weights: VisionWeights,
        config: Pi05Config,
        ops: Ops,
        num_views: int,
        prefix: torch.Tensor,
    ) -> None:
        self.weights = weights
        self.config = config.vision
        self.ops = ops
        rows, width = num_views * config.vision.tokens_per_view, config.vision.width
        like = weights.patch
        self.patches = like.new_zeros(rows, like.shape[1])
        self.offset = weights.patch_offset.repeat(num_views, 1)
        self.embedded = torch.zeros_like(self.offset)
        self.x = like.new_zeros(rows, width)
        self.normed = like.new_zeros(rows, width)
        self.qkv = like.new_zeros(rows, 3 * width)
        self.attended = like.new_zeros(rows, width)
        self.hidden = like.new_zeros(rows, config.vision.mlp_dim)
        self.out = prefix[:rows]

    def launch(self) -> None:
        """Enqueue the stage on the current stream."""
        ops, weights, eps = self.ops, self.weights, self.config.layer_norm_eps
        x, normed = self.x, self.normed
        ops.linear(self.patches, weights.patch, self.embedded, residual=self.offset)
        # The embedding leaves fp32 at the first norm.
        source: torch.Tensor = self.embedded
        rounded: torch.Tensor | None = x
        for layer in weights.layers:
            norm1, norm2 = layer.norm1, layer.norm2
            ops.layer_norm(source, norm1.weight, norm1.bias, eps, normed, rounded)
            source, rounded = x, None
            ops.linear(normed, layer.qkv.weight, self.qkv, bias=layer.qkv.bias)
            ops.vision_attention(
                self.qkv, self.config.num_heads, self.config.tokens_per_view, self.attended
            )
            ops.linear(self.attended, layer.out.weight, x, bias=layer.out.bias, residual=x)
            ops.layer_norm(x, norm2.weight, norm2.bias, eps, normed)
            ops.linear(normed, layer.fc1.weight, self.hidden, bias=layer.fc1.bias, gelu=True)
            ops.linear(self.hidden, layer.fc2.weight, x, bias=layer.fc2.bias, residual=x)
        ops.layer_norm(x, weights.post_norm.weight, weights.post_norm.bias, eps, normed)
        ops.linear(normed, weights.projector.weight, self.out, bias=weights.projector.bias)

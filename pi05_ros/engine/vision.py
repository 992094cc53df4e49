"""Vision: raw images to the first rows of the prefix.

The pixels arrive as patches (:mod:`pi05_ros.engine.kernels.resize`); SigLIP and the projector
follow, all views in one batch of rows.
"""

from __future__ import annotations

import torch

from pi05_ros.model.config import Pi05Config

from .ops import FoldedOps, Ops
from .weights import FoldedVisionWeights, PatchWeights, VisionWeights


class VisionBuffers:
    """What both forms of the stage read and write.

    Attributes:
        patches: (V * tokens, K) the stage's input, pixel values 0..255.
        patch_copies: how often a patch's pixels stand side by side in one row.
    """

    def __init__(
        self, weights: PatchWeights, config: Pi05Config, num_views: int, prefix: torch.Tensor
    ) -> None:
        self.config = config.vision
        self.patch_copies = weights.patch_copies
        rows, width = num_views * config.vision.tokens_per_view, config.vision.width
        like = weights.patch
        self.patches = like.new_zeros(rows, like.shape[1])
        self.offset = weights.patch_offset.repeat(num_views, 1)
        self.embedded = torch.zeros_like(self.offset)
        self.x = like.new_zeros(rows, width)
        self.qkv = like.new_zeros(rows, 3 * width)
        self.attended = like.new_zeros(rows, width)
        self.hidden = like.new_zeros(rows, config.vision.mlp_dim)
        self.out = prefix[:rows]


class VisionStage(VisionBuffers):
    """SigLIP and the projector over static buffers.

    Args:
        weights: packed weights; their dtype is the stage's.
        ops: what it runs on.
        num_views: V, fixed.
        prefix: (>= V * tokens, W) receives the image tokens in its first rows.
    """

    def __init__(
        self,
        weights: VisionWeights,
        config: Pi05Config,
        ops: Ops,
        num_views: int,
        prefix: torch.Tensor,
    ) -> None:
        super().__init__(weights, config, num_views, prefix)
        self.weights = weights
        self.ops = ops
        self.normed = torch.zeros_like(self.x)

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


class FoldedVisionStage(VisionBuffers):
    """The same with every LayerNorm inside the product behind it (:mod:`.kernels.folded_norm`).

    Args: as for :class:`VisionStage`.
    """

    def __init__(
        self,
        weights: FoldedVisionWeights,
        config: Pi05Config,
        ops: FoldedOps,
        num_views: int,
        prefix: torch.Tensor,
    ) -> None:
        super().__init__(weights, config, num_views, prefix)
        self.weights = weights
        self.ops = ops
        # Of x in front of the attention and of the MLP: who writes them differs.
        self.moments1 = ops.row_moments(self.x, config.vision.mlp_dim)
        self.moments2 = ops.row_moments(self.x, config.vision.width)

    def launch(self) -> None:
        """Enqueue the stage on the current stream."""
        ops, weights, eps = self.ops, self.weights, self.config.layer_norm_eps
        x, moments1, moments2 = self.x, self.moments1, self.moments2
        ops.linear(self.patches, weights.patch, self.embedded, residual=self.offset)
        # The embedding leaves fp32 at the first norm.
        ops.round_rows(self.embedded, x, moments1)
        for layer in weights.layers:
            ops.normed_linear(x, moments1, layer.qkv, eps, self.qkv)
            ops.vision_attention(
                self.qkv, self.config.num_heads, self.config.tokens_per_view, self.attended
            )
            ops.add_linear(self.attended, layer.out.weight, layer.out.bias, x, moments2)
            ops.normed_linear(x, moments2, layer.fc1, eps, self.hidden, gelu=True)
            ops.add_linear(self.hidden, layer.fc2.weight, layer.fc2.bias, x, moments1)
        ops.normed_linear(x, moments1, weights.projector, eps, self.out)

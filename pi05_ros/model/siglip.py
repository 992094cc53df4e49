"""SigLIP: one image to one feature vector per patch (openpi siglip.py).

All views go through together on the first axis; attention stays within one view.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .config import VisionConfig


class VisionTower(nn.Module):
    """Patches, position table, pre-norm transformer layers and a last LayerNorm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            3, config.width, kernel_size=config.patch_px, stride=config.patch_px
        )
        self.position_embedding = nn.Embedding(config.tokens_per_view, config.width)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.depth))
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (V, 3, px, px) float32 in [-1, 1] to features (V, tokens_per_view, width)."""
        # The patches and their positions are added in the dtype of these two tables (float32 at
        # either precision); the transformer runs in the dtype of its own weights.
        x = self._embed_patches(pixels) + self.position_embedding.weight
        x = x.to(self.post_layernorm.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)

    def _embed_patches(self, pixels: Tensor) -> Tensor:
        """Apply the patch convolution: (V, 3, px, px) to (V, tokens_per_view, width)."""
        # Patches do not overlap, so the convolution is one matrix product. Written so, it follows
        # the matmul precision; cuDNN would take TF32 for a float32 convolution by default.
        views, channels, height, width = pixels.shape
        px = self.config.patch_px
        rows, cols = height // px, width // px
        patches = pixels.reshape(views, channels, rows, px, cols, px)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)


class VisionLayer(nn.Module):
    """``x += attention(norm1(x))``, then ``x += mlp(norm2(x))``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = VisionMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on (V, tokens, width)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionAttention(nn.Module):
    """Full attention among the patches of one view; every projection has a bias."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of each view: (V, tokens, width) to the same shape."""

        def heads(projected: Tensor) -> Tensor:  # (V, tokens, width) -> (V, heads, tokens, D)
            return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (V, tokens, width) to the same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))

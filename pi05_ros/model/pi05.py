"""π0.5 in plain PyTorch: the oracle that every fast backend is measured against.

The way of the data, without a batch axis::

    pixels (V, 3, px, px) --vision, projector--> image tokens (V, tokens_per_view, W) --.
    tokens (T,) ------------token embedding----> prompt tokens (T, W) ------------------+
                                                                                        |
    prefix (P, W) <-- image tokens of each view, then the prompt -----------------------'
    prefix --language model--> K and V of every layer (L, P, D)
    noise (H, A) --N Euler steps of the action expert, which sees K and V--> actions (H, A)

A masked view or a padding token may be dropped, or kept and masked; both give the same actions
(openpi pi0_pytorch.py: padding does not advance positions).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Pi05Config
from .expert import ActionExpert, embed_time
from .gemma import PrefixCache, PrefixStack
from .precision import parameter_dtype
from .sampler import euler
from .siglip import VisionTower


@dataclass(frozen=True)
class Sample:
    """One inference with everything on the way; rows of masked tokens are left out.

    Args:
        prefix_embs: (P, W) what the language model read.
        keys, values: (L, P, num_kv_heads * D), K after RoPE.
        velocities: (N, H, A) float32.
        actions: (H, A) float32, normalised.
    """

    prefix_embs: Tensor
    keys: Tensor
    values: Tensor
    velocities: Tensor
    actions: Tensor


class Pi05Model(nn.Module):
    """The whole model. Weights come from a checkpoint; see :mod:`pi05_ros.model.checkpoint`."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        width = config.expert.width
        self.vision = VisionTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.vlm.width)
        self.token_embedding = nn.Embedding(config.vocab_size, config.vlm.width)
        self.language = PrefixStack(config.vlm)
        self.expert = ActionExpert(config.expert)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)

    def to_precision(self, precision: str) -> Pi05Model:
        """Cast every parameter in place to its dtype at 'float32' or 'bfloat16'; return self."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, precision))
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.action_in_proj.weight.device

    @property
    def precision(self) -> str:
        """'float32' or 'bfloat16', see :mod:`pi05_ros.model.precision`."""
        return str(self.projector.weight.dtype).removeprefix('torch.')

    # ---- prefix

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Map pixels (V, 3, px, px) float32 in [-1, 1] to image tokens (V, 256, W)."""
        return self.projector(self.vision(pixels))

    def embed_prompt(self, tokens: Tensor) -> Tensor:
        """Map prompt tokens (T,) int64 to (T, W). Unlike image tokens they are scaled."""
        return self.token_embedding(tokens) * self.config.vlm.width**0.5

    def prefill(self, prefix: Tensor, valid: Tensor | None = None) -> PrefixCache:
        """Run the language model over a prefix (P, W); ``valid`` (P,) bool masks tokens."""
        return self.language(prefix, valid)

    # ---- suffix

    def condition(self, t: float) -> Tensor:
        """Return the vector (We,) float32 that steers every adaptive norm at flow time ``t``."""
        embedded = embed_time(t, self.config.expert.width, self.device)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))

    def velocity(self, x_t: Tensor, t: float, cache: PrefixCache) -> Tensor:
        """Return the flow's velocity (H, A) float32 at ``x_t`` (H, A) float32 and time ``t``."""
        suffix = self.action_in_proj(x_t).to(cache.keys.dtype)
        features = self.expert(suffix, self.condition(t), cache)
        return self.action_out_proj(features.float())

    def denoise(self, noise: Tensor, cache: PrefixCache, num_steps: int) -> tuple[Tensor, Tensor]:
        """Return actions (H, A) and velocities (N, H, A), float32, from ``noise`` (H, A)."""
        return euler(lambda x_t, t: self.velocity(x_t, t, cache), noise, num_steps)

    # ---- all of it

    @torch.inference_mode()
    def sample_actions(
        self,
        pixels: Tensor,
        tokens: Tensor,
        noise: Tensor,
        num_steps: int,
        view_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        masking: Literal['drop', 'mask'] = 'drop',
    ) -> Sample:
        """Run one inference on one observation.

        Args:
            pixels: (V, 3, px, px) float32 in [-1, 1].
            tokens: (T,) int64.
            noise: (H, A) float32.
            num_steps: N Euler steps.
            view_mask: (V,) bool, False for a view that is absent; None: all are present.
            token_mask: (T,) bool, False for padding; None: all are real.
            masking: 'drop' removes masked tokens before they cost anything; 'mask' keeps them
                and hides them from attention, as openpi does.
        """
        if view_mask is None:
            view_mask = torch.ones(pixels.shape[0], dtype=torch.bool, device=pixels.device)
        if token_mask is None:
            token_mask = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        valid = None
        if masking == 'drop':
            pixels, tokens = pixels[view_mask], tokens[token_mask]
        else:
            per_view = self.config.vision.tokens_per_view
            valid = torch.cat([view_mask.repeat_interleave(per_view), token_mask])
        prefix = torch.cat([self.embed_images(pixels).flatten(0, 1), self.embed_prompt(tokens)])
        cache = self.prefill(prefix, valid)
        actions, velocities = self.denoise(noise, cache, num_steps)
        sample = Sample(prefix, cache.keys, cache.values, velocities, actions)
        if valid is None:
            return sample
        return replace(
            sample,
            prefix_embs=prefix[valid],
            keys=cache.keys[:, valid],
            values=cache.values[:, valid],
        )

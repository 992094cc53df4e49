"""Checkpoint tensors in the form the fast stages read: merged, folded, one dtype.

Packing takes tensors out of the state dictionary as it goes, so that a model is never twice on
the device. What is folded is folded in fp32 before the one rounding: language-model norm weights
lie near -1, where (1 + w) in bfloat16 would vanish (performance.md 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace

import torch

from pi05_ros.model.config import Pi05Config

from .kernels.folded_norm import NormedLinear, fold_norm
from .ops import Ops

State = MutableMapping[str, torch.Tensor]

_PALIGEMMA = 'paligemma_with_expert.paligemma.'
_VISION = _PALIGEMMA + 'model.vision_tower.vision_model.'
_PROJECTOR = _PALIGEMMA + 'model.multi_modal_projector.linear.'
_LANGUAGE = _PALIGEMMA + 'model.language_model.'
_EMBEDDINGS = (_LANGUAGE + 'embed_tokens.weight', _PALIGEMMA + 'lm_head.weight')


@dataclass(frozen=True)
class Linear:
    """A linear layer: weight (N, K) and bias (N,)."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class LayerNorm:
    """Weight and bias, (W,) each."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class VisionLayer:
    """One SigLIP layer; ``qkv`` is the three projections stacked, (3 W, W)."""

    norm1: LayerNorm
    qkv: Linear
    out: Linear
    norm2: LayerNorm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class PatchWeights:
    """How patches enter the tower.

    Args:
        patch: (W, copies * 3 * patch_px**2, padded to 8) weight on pixel values 0..255.
        patch_offset: (tokens, W) fp32: bias, position embedding and the pixel offset of -1.
        patch_copies: how often a patch's pixels stand side by side in one row.
    """

    patch: torch.Tensor
    patch_offset: torch.Tensor
    patch_copies: int


@dataclass(frozen=True)
class VisionWeights(PatchWeights):
    """The tower and the projector."""

    layers: tuple[VisionLayer, ...]
    post_norm: LayerNorm
    projector: Linear


@dataclass(frozen=True)
class FoldedVisionLayer:
    """One SigLIP layer with its norms folded; the biases are fp32, the weights ordered."""

    qkv: NormedLinear
    out: Linear
    fc1: NormedLinear
    fc2: Linear


@dataclass(frozen=True)
class FoldedVisionWeights(PatchWeights):
    """The tower and the projector with every norm folded into the product behind it."""

    layers: tuple[FoldedVisionLayer, ...]
    projector: NormedLinear


@dataclass(frozen=True)
class PrefillLayer:
    """One language-model layer, with the norms' (1 + w) in ``qkv`` and ``gate_up``."""

    qkv: torch.Tensor  # ((heads + 2) * D, W), rows as Ops.order_qkv puts them
    out: torch.Tensor  # (W, heads * D)
    gate_up: torch.Tensor  # (2 F, W), gate and up rows as Ops.interleave puts them
    down: torch.Tensor  # (W, F), rows as Ops.order_down puts them


@dataclass(frozen=True)
class PrefillWeights:
    """Token embedding (vocabulary, W) and the layers.

    The last layer only fills the cache: all that is left of it is k and v, (2 * D, W), in the
    same order as ``qkv``.
    """

    embedding: torch.Tensor
    layers: tuple[PrefillLayer, ...]
    last_kv: torch.Tensor


class _Taker:
    """Takes tensors out of a state by name, in one dtype and on one device."""

    def __init__(self, state: State, dtype: torch.dtype, device: torch.device) -> None:
        self.state = state
        self.dtype = dtype
        self.device = device

    def fp32(self, name: str) -> torch.Tensor:
        return self.state.pop(name).to(self.device).float()

    def tensor(self, name: str) -> torch.Tensor:
        return self.state.pop(name).to(self.device).to(self.dtype).contiguous()

    def linear(self, prefix: str) -> Linear:
        return Linear(self.tensor(prefix + 'weight'), self.tensor(prefix + 'bias'))

    def norm(self, prefix: str) -> LayerNorm:
        return LayerNorm(self.tensor(prefix + 'weight'), self.tensor(prefix + 'bias'))

    def stacked(self, prefix: str, names: tuple[str, ...], kind: str) -> torch.Tensor:
        return torch.cat([self.tensor(f'{prefix}{name}.{kind}') for name in names])

    def linear_fp32_bias(self, prefix: str) -> Linear:
        return Linear(self.tensor(prefix + 'weight'), self.fp32(prefix + 'bias'))

    def normed_linear(self, norm: str, prefix: str, names: tuple[str, ...]) -> NormedLinear:
        """Return linear layers stacked, behind a LayerNorm."""
        weight, bias = (
            torch.cat([self.fp32(f'{prefix}{name}{kind}') for name in names])
            for kind in ('weight', 'bias')
        )
        norm_weight, norm_bias = self.fp32(norm + 'weight'), self.fp32(norm + 'bias')
        return fold_norm(norm_weight, norm_bias, weight, bias, self.dtype)

    def folded(
        self, prefix: str, names: tuple[str, ...], norm: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return weights with their columns multiplied by (1 + norm), in fp32."""
        weights = [self.fp32(f'{prefix}{name}.weight') for name in names]
        return [(weight * (1.0 + norm)).to(self.dtype) for weight in weights]


def pack_vision(
    state: State, config: Pi05Config, dtype: torch.dtype, device: torch.device
) -> VisionWeights:
    """Take the vision tower and the projector out of ``state`` (openpi's names)."""
    take = _Taker(state, dtype, device)
    patch, offset, copies = _pack_patches(take, config)
    layers = []
    for index in range(config.vision.depth):
        prefix = f'{_VISION}encoder.layers.{index}.'
        attention = prefix + 'self_attn.'
        names = ('q_proj', 'k_proj', 'v_proj')
        qkv = Linear(
            take.stacked(attention, names, 'weight'), take.stacked(attention, names, 'bias')
        )
        layers.append(
            VisionLayer(
                norm1=take.norm(prefix + 'layer_norm1.'),
                qkv=qkv,
                out=take.linear(attention + 'out_proj.'),
                norm2=take.norm(prefix + 'layer_norm2.'),
                fc1=take.linear(prefix + 'mlp.fc1.'),
                fc2=take.linear(prefix + 'mlp.fc2.'),
            )
        )
    return VisionWeights(
        patch=patch,
        patch_offset=offset,
        patch_copies=copies,
        layers=tuple(layers),
        post_norm=take.norm(_VISION + 'post_layernorm.'),
        projector=take.linear(_PROJECTOR),
    )


def pack_folded_vision(
    state: State, config: Pi05Config, dtype: torch.dtype, device: torch.device,
    order_features: Callable[[torch.Tensor], torch.Tensor],
) -> FoldedVisionWeights:  # fmt: skip
    """Take the same out of ``state``, with the norms folded into the products behind them.

    Args:
        order_features: puts the rows of a layer's weight as the kernels read them.
    """
    take = _Taker(state, dtype, device)
    patch, offset, copies = _pack_patches(take, config)
    layers = []
    for index in range(config.vision.depth):
        prefix = f'{_VISION}encoder.layers.{index}.'
        attention, norm1, norm2 = (
            prefix + name for name in ('self_attn.', 'layer_norm1.', 'layer_norm2.')
        )
        qkv = take.normed_linear(norm1, attention, ('q_proj.', 'k_proj.', 'v_proj.'))
        out = take.linear_fp32_bias(attention + 'out_proj.')
        fc1 = take.normed_linear(norm2, prefix + 'mlp.', ('fc1.',))
        fc2 = take.linear_fp32_bias(prefix + 'mlp.fc2.')
        layers.append(
            FoldedVisionLayer(
                qkv=replace(qkv, weight=order_features(qkv.weight)),
                out=replace(out, weight=order_features(out.weight)),
                fc1=replace(fc1, weight=order_features(fc1.weight)),
                fc2=replace(fc2, weight=order_features(fc2.weight)),
            )
        )
    projector = take.normed_linear(_VISION + 'post_layernorm.', _PROJECTOR, ('',))
    projector = replace(projector, weight=order_features(projector.weight))
    return FoldedVisionWeights(patch, offset, copies, tuple(layers), projector)


def _pack_patches(take: _Taker, config: Pi05Config) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Turn the fp32 patch convolution into a GEMM on raw pixel values.

    A pixel enters as x / 127.5 - 1; the division goes into the weight and the -1 into the bias.
    Pixel values are exact in bfloat16. The weight is not, so it enters as the sum of two bfloat16
    numbers, high and low part, against the same pixels twice: closer to fp32 than the TF32 of the
    reference (performance.md, idea G).
    """
    width = config.vision.width
    weight = take.fp32(_VISION + 'embeddings.patch_embedding.weight').reshape(width, -1)
    bias = take.fp32(_VISION + 'embeddings.patch_embedding.bias')
    positions = take.fp32(_VISION + 'embeddings.position_embedding.weight')
    offset = positions + (bias - weight.double().sum(dim=1).float())
    scaled = weight / 127.5
    high = scaled.to(take.dtype)
    parts = [high]
    if take.dtype != torch.float32:
        parts.append((scaled - high.float()).to(take.dtype))
    columns = scaled.shape[1] * len(parts)
    patch = torch.zeros(width, -(-columns // 8) * 8, dtype=take.dtype, device=take.device)
    patch[:, :columns] = torch.cat(parts, dim=1)
    return patch, offset.contiguous(), len(parts)


def pack_prefill(
    state: State, config: Pi05Config, dtype: torch.dtype, device: torch.device,
    ops: Ops,
) -> PrefillWeights:  # fmt: skip
    """Take the language model out of ``state``; what inference never reads is dropped.

    Args:
        ops: what the weights are for; each has its own order of their rows.
    """
    take = _Taker(state, dtype, device)
    layers = []
    for index in range(config.vlm.depth - 1):
        prefix = f'{_LANGUAGE}layers.{index}.'
        norm1 = take.fp32(prefix + 'input_layernorm.weight')
        norm2 = take.fp32(prefix + 'post_attention_layernorm.weight')
        attention, mlp = prefix + 'self_attn.', prefix + 'mlp.'
        qkv = torch.cat(take.folded(attention, ('q_proj', 'k_proj', 'v_proj'), norm1))
        layers.append(
            PrefillLayer(
                qkv=ops.order_qkv(qkv),
                out=take.tensor(attention + 'o_proj.weight'),
                gate_up=ops.interleave(*take.folded(mlp, ('gate_proj', 'up_proj'), norm2)),
                down=ops.order_down(take.tensor(mlp + 'down_proj.weight')),
            )
        )
    last = f'{_LANGUAGE}layers.{config.vlm.depth - 1}.'
    norm1 = take.fp32(last + 'input_layernorm.weight')
    last_kv = torch.cat(take.folded(last + 'self_attn.', ('k_proj', 'v_proj'), norm1))
    embedding = take.tensor(next(name for name in _EMBEDDINGS if name in state))
    for left in [name for name in state if name.startswith((_LANGUAGE, *_EMBEDDINGS))]:
        del state[left]
    return PrefillWeights(embedding, tuple(layers), ops.order_qkv(last_kv))

"""The action expert's weights in the form that the denoise kernels read.

Made once from a checkpoint's tensors (openpi key names): q, k, v stacked, gate and up stacked,
every adaptive norm replaced by its table of modulations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_ros.engine.kernels.adarms import modulation_table
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.config import Pi05Config

_EXPERT = 'paligemma_with_expert.gemma_expert.model.'


@dataclass(frozen=True)
class ExpertWeights:
    """Device tensors of the expert; ``dtype`` is the storage dtype, the rest is float32.

    Norms are numbered in order of use: 2 l before the attention of layer l, 2 l + 1 before its
    MLP, 2 L at the end.
    """

    qkv: Tensor  # (L, (heads + 2) * D, W) dtype
    attention_out: Tensor  # (L, W, heads * D) dtype
    gate_up: Tensor  # (L, 2 F, W) dtype: gate rows, then up rows
    down: Tensor  # (L, W, F) dtype
    action_in: Tensor  # (W, A)
    action_in_bias: Tensor  # (W,)
    action_out: Tensor  # (A, W)
    action_out_bias: Tensor  # (A,)
    modulations: Tensor  # (rows of all step counts, 2 L + 1, 3, W)

    def device_bytes(self) -> int:
        """Return the bytes that these tensors occupy."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


def expert_weights(
    state: Mapping[str, Tensor],
    config: Pi05Config,
    max_steps: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ExpertWeights:
    """Collect and merge the expert's tensors.

    Args:
        state: a checkpoint's tensors by openpi key name, on any device, in any float dtype.
        max_steps: largest Euler step count that the modulations are made for.
    Raises:
        BackendError: a tensor is missing or has another shape than ``config`` says.
    """
    take = _Reader(state, config, device)
    layers = [f'{_EXPERT}layers.{i}.' for i in range(config.expert.depth)]

    def stacked(*names: str) -> Tensor:
        return torch.stack([torch.cat([take(at + n, dtype) for n in names]) for at in layers])

    norms = [
        f'{at}{norm}.dense' for at in layers for norm in
        ('input_layernorm', 'post_attention_layernorm')
    ] + [f'{_EXPERT}norm.dense']  # fmt: skip
    return ExpertWeights(
        qkv=stacked(*(f'self_attn.{p}_proj.weight' for p in 'qkv')),
        attention_out=stacked('self_attn.o_proj.weight'),
        gate_up=stacked('mlp.gate_proj.weight', 'mlp.up_proj.weight'),
        down=stacked('mlp.down_proj.weight'),
        action_in=take('action_in_proj.weight'),
        action_in_bias=take('action_in_proj.bias'),
        action_out=take('action_out_proj.weight'),
        action_out_bias=take('action_out_proj.bias'),
        modulations=modulation_table(
            [take.linear(name) for name in norms],
            [take.linear(name) for name in ('time_mlp_in', 'time_mlp_out')],
            max_steps,
        ),
    )


class _Reader:
    """Takes named tensors out of a state, checking their shapes."""

    def __init__(
        self, state: Mapping[str, Tensor], config: Pi05Config, device: torch.device
    ) -> None:
        self._state = state
        self._device = device
        expert, actions = config.expert, config.action_dim
        width, heads = expert.width, expert.num_heads * expert.head_dim
        kv = expert.num_kv_heads * expert.head_dim
        self._shapes = {
            'q_proj.weight': (heads, width),
            'k_proj.weight': (kv, width),
            'v_proj.weight': (kv, width),
            'o_proj.weight': (width, heads),
            'gate_proj.weight': (expert.mlp_dim, width),
            'up_proj.weight': (expert.mlp_dim, width),
            'down_proj.weight': (width, expert.mlp_dim),
            'dense.weight': (3 * width, width),
            'dense.bias': (3 * width,),
            'time_mlp_in.weight': (width, width),
            'time_mlp_in.bias': (width,),
            'time_mlp_out.weight': (width, width),
            'time_mlp_out.bias': (width,),
            'action_in_proj.weight': (width, actions),
            'action_in_proj.bias': (width,),
            'action_out_proj.weight': (actions, width),
            'action_out_proj.bias': (actions,),
        }

    def __call__(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        expected = self._shapes['.'.join(name.split('.')[-2:])]
        if name not in self._state:
            raise BackendError(f'the weights have no tensor {name}, expected {expected}')
        tensor = self._state[name]
        if tuple(tensor.shape) != expected:
            raise BackendError(f'{name} is {tuple(tensor.shape)}, expected {expected}')
        return tensor.to(self._device, dtype).contiguous()

    def linear(self, name: str) -> tuple[Tensor, Tensor]:
        return self(f'{name}.weight'), self(f'{name}.bias')

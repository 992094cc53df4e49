"""The denoise stage: Euler steps of the action expert over a prefix K/V, as one chain of kernels.

Two chains compute the same: Triton kernels for any GPU (``triton_chain.py``) and CUDA C++ kernels
for the released expert on a Hopper GPU (``hopper_chain.py``). Nothing in them depends on the host:
the prefix length is read on the device and the modulations of every step lie in a table, so a
graph captured once per step count serves every prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from pi05_ros.engine.denoise_layers import LayerBuffers, row_block
from pi05_ros.engine.denoise_tuning import DenoiseTuning, load_denoise_tuning
from pi05_ros.engine.expert_weights import ExpertWeights, expert_weights
from pi05_ros.engine.hopper_chain import HopperChain, hopper_obstacle
from pi05_ros.engine.kernels import euler, small_gemm, split_attention
from pi05_ros.engine.kernels.adarms import table_row
from pi05_ros.engine.kernels.launch import is_interpreted
from pi05_ros.engine.kernels.nvrtc import has_bindings
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.engine.triton_chain import TritonChain
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.gemma import rope_tables as oracle_rope_tables
from pi05_ros.model.sampler import step_size

_log = logging.getLogger(__name__)


class DenoiseStage:
    """A static buffer ``actions`` (H, A) float32, and what lies between the noise and it.

    Args:
        state: checkpoint tensors by openpi key name; copied, not kept.
        config: model dimensions.
        keys, values: (L, P_max, D) prefix K/V on the device, filled before each launch.
        n_prefix: (1,) int32 on the device: valid prefix tokens, at most P_max.
        noise: (H, A) float32 on the device, where the flow begins, written before each launch.
        max_steps: largest step count of a launch.
        dtype: storage dtype of weights and activations.
    Raises:
        BackendError: the model's shape does not fit the kernels, or tensors do not fit together.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        config: Pi05Config,
        *,
        keys: Tensor,
        values: Tensor,
        n_prefix: Tensor,
        noise: Tensor,
        max_steps: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        check_inputs(config, keys, values, n_prefix, noise, max_steps, dtype)
        horizon = noise.shape[0]
        self.config, self.horizon, self.max_steps, self.dtype = config, horizon, max_steps, dtype
        self.keys, self.values, self.n_prefix = keys, values, n_prefix
        self.device = keys.device
        self.noise, self.actions = noise, torch.zeros_like(noise)
        self.cos, self.sin = rope_table(config, keys.shape[1] + horizon, dtype, self.device)
        self.buffers = self._layer_buffers()
        weights = expert_weights(state, config, max_steps, dtype, self.device)
        self.chain: TritonChain | HopperChain = self._choose_chain(weights)

    @property
    def weights(self) -> ExpertWeights:
        """The weights as the checkpoint has them; a copy if the kernels read them otherwise."""
        return self.chain.weights()

    @property
    def tuning(self) -> DenoiseTuning | None:
        """The block sizes of the Triton kernels; None for the Hopper kernels, which have none."""
        return self.chain.layer.tuning if isinstance(self.chain, TritonChain) else None

    def use_tuning(self, tuning: DenoiseTuning) -> None:
        """Run the Triton kernels with these block sizes; a graph captured before is stale."""
        self.chain = self._triton_chain(self.weights, tuning)

    def _choose_chain(self, weights: ExpertWeights) -> TritonChain | HopperChain:
        """Decide which kernels run here, and say why."""
        obstacle = hopper_obstacle(self.config, self.buffers)
        if obstacle is None and has_bindings():
            return HopperChain(self.config, weights, self.buffers, self.noise, self.actions)
        if obstacle is None:
            _log.warning(
                'the denoise runs the slower Triton kernels: cuda-bindings is missing; '
                'pip install cuda-bindings'
            )
        else:
            _log.info('the denoise runs the Triton kernels: %s', obstacle)
        tuning = load_denoise_tuning(self.device, self.config.expert, row_block(self.horizon))
        return self._triton_chain(weights, tuning)

    def _triton_chain(self, weights: ExpertWeights, tuning: DenoiseTuning) -> TritonChain:
        return TritonChain(self.config, weights, self.buffers, self.noise, self.actions, tuning)

    def launch(self, num_steps: int) -> None:
        """Enqueue a whole run from ``noise`` to ``actions`` on the current stream.

        Allocates nothing and waits for nothing, so it can be captured into a CUDA graph.
        Step-dependent values (modulation rows, dt) are arguments of the kernels, so a graph
        belongs to one step count; the prefix length does not enter it.
        """
        self._check_steps(num_steps)
        self.launch_begin(num_steps)
        for step in range(num_steps):
            for layer in range(self.config.expert.depth):
                self.launch_layer(num_steps, step, layer)
            self.launch_step_end(num_steps, step)

    def launch_begin(self, num_steps: int) -> None:
        """Enqueue the projection of ``noise`` into the residual stream; needs no prefix."""
        self.chain.launch_begin(num_steps)

    def launch_layer(self, num_steps: int, step: int, layer: int) -> None:
        """Enqueue one expert layer of one step; needs the prefix K/V of this layer alone."""
        self.chain.launch_layer(num_steps, step, layer)

    def launch_step_end(self, num_steps: int, step: int) -> None:
        """Enqueue the Euler update and, unless it was the last step, the next step's input."""
        self.chain.launch_step_end(num_steps, step)

    def eager(self, num_steps: int) -> Tensor:
        """Return what :meth:`launch` computes, (H, A) float32, in plain PyTorch.

        Reads ``noise`` and the prefix, writes no buffer, synchronises with the device.
        """
        self._check_steps(num_steps)
        weights, eps = self.weights, self.config.expert.rms_norm_eps
        prefix = int(self.n_prefix)
        cos, sin = (t[prefix : prefix + self.horizon] for t in (self.cos, self.sin))
        x_t = self.noise.clone()
        for step in range(num_steps):
            mods = weights.modulations[table_row(num_steps, step)]
            x = euler.enter_reference(x_t, weights.action_in, weights.action_in_bias, self.dtype)
            for layer in range(self.config.expert.depth):
                first, second = mods[2 * layer], mods[2 * layer + 1]
                qkv = small_gemm.qkv_rope_reference(x, first, weights.qkv[layer], cos, sin, eps)
                attended = split_attention.attention_reference(
                    qkv, self.keys[layer, :prefix], self.values[layer, :prefix]
                )
                x = small_gemm.gated_residual_reference(
                    x, attended, weights.attention_out[layer], first
                )
                activated = small_gemm.gate_up_reference(x, second, weights.gate_up[layer], eps)
                x = small_gemm.gated_residual_reference(x, activated, weights.down[layer], second)
            x_t = euler.leave_reference(
                x, x_t, mods[-1], weights.action_out, weights.action_out_bias,
                float(step_size(num_steps)), eps,
            )  # fmt: skip
        return x_t

    def _check_steps(self, num_steps: int) -> None:
        if not 1 <= num_steps <= self.max_steps:
            raise BackendError(f'num_steps {num_steps} is outside 1 to {self.max_steps}')

    def _layer_buffers(self) -> LayerBuffers:
        expert, rows = self.config.expert, self.horizon

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return LayerBuffers(
            x=buffer(rows, expert.width),
            scaled=buffer(rows, expert.width),
            qkv=buffer(expert.num_heads + 2, rows, expert.head_dim),
            attended=buffer(rows, expert.num_heads * expert.head_dim),
            activated=buffer(rows, expert.mlp_dim),
            keys=self.keys,
            values=self.values,
            n_prefix=self.n_prefix,
            cos=self.cos,
            sin=self.sin,
        )


def rope_table(
    config: Pi05Config, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (positions, D / 2) in ``dtype``, rounded exactly as the oracle does."""
    cos, sin = oracle_rope_tables(torch.arange(positions, device=device), config.expert, dtype)
    half = config.expert.head_dim // 2
    return cos[:, :half].contiguous(), sin[:, :half].contiguous()


def check_inputs(
    config: Pi05Config, keys: Tensor, values: Tensor, n_prefix: Tensor,
    noise: Tensor, max_steps: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Refuse a model or buffers that the kernels cannot take, saying which and why."""
    expert = config.expert
    if expert.num_kv_heads != 1:
        raise BackendError(
            f'the fused denoise needs 1 key/value head, the model has {expert.num_kv_heads}; '
            'choose the eager backend'
        )
    if expert.head_dim & (expert.head_dim - 1) or expert.head_dim < 32:
        raise BackendError(
            f'the fused denoise needs a head_dim that is a power of two from 32, '
            f'got {expert.head_dim}; choose the eager backend'
        )
    expected = (expert.depth, keys.shape[1] if keys.ndim == 3 else -1, expert.head_dim)
    for name, tensor in (('keys', keys), ('values', values)):
        if tuple(tensor.shape) != expected or tensor.dtype != dtype or not tensor.is_contiguous():
            raise BackendError(
                f'{name} must be contiguous (layers, prefix tokens, head_dim) = {expected} '
                f'{dtype}, got {tuple(tensor.shape)} {tensor.dtype}'
            )
    if n_prefix.shape != (1,) or n_prefix.dtype != torch.int32 or n_prefix.device != keys.device:
        raise BackendError(
            f'n_prefix must be one int32 on {keys.device}, '
            f'got {tuple(n_prefix.shape)} {n_prefix.dtype} on {n_prefix.device}'
        )
    if noise.ndim != 2 or noise.shape[1] != config.action_dim or not noise.is_contiguous():
        raise BackendError(
            f'noise must be contiguous (horizon, {config.action_dim}), got {tuple(noise.shape)}'
        )
    if noise.dtype != torch.float32 or noise.device != keys.device:
        raise BackendError(
            f'noise must be float32 on {keys.device}, got {noise.dtype} on {noise.device}'
        )
    if len(noise) < 1 or max_steps < 1:
        raise BackendError(f'horizon {len(noise)} and max_steps {max_steps} must be at least 1')
    if keys.device.type != 'cuda' and not is_interpreted():
        raise BackendError(f'the fused denoise needs a CUDA device, got {keys.device}')

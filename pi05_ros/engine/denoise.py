"""The denoise stage: Euler steps of the action expert over a prefix K/V, as one chain of kernels.

Per layer: norm + QKV + RoPE, attention split over the keys, output projection + gated residual,
norm + gate/up + GEGLU, down + gated residual (``denoise_layers.py``). Between steps one kernel
does the final norm, the action projection, the Euler update and the next step's input projection.
Nothing in the chain depends on the host: the prefix length is read on the device and the
modulations of every step lie in a table, so a graph captured once per step count serves every
prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from pi05_ros.engine.denoise_layers import ExpertLayer, LayerBuffers, row_block
from pi05_ros.engine.denoise_tuning import DenoiseTuning, load_denoise_tuning
from pi05_ros.engine.expert_weights import ExpertWeights, expert_weights
from pi05_ros.engine.kernels import euler, small_gemm, split_attention
from pi05_ros.engine.kernels.adarms import SCALE, table_row
from pi05_ros.engine.kernels.launch import block_size, is_interpreted
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.gemma import rope_tables as oracle_rope_tables
from pi05_ros.model.sampler import step_size

_EULER_WARPS = 16


class DenoiseStage:
    """Static buffers ``noise`` in and ``actions`` out, both (H, A) float32, and what lies between.

    Args:
        state: checkpoint tensors by openpi key name; copied, not kept.
        config: model dimensions.
        keys, values: (L, P_max, D) prefix K/V on the device, filled before each launch.
        n_prefix: (1,) int32 on the device: valid prefix tokens, at most P_max.
        horizon: rows H of ``noise`` and ``actions``.
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
        horizon: int,
        max_steps: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        check_inputs(config, keys, values, n_prefix, horizon, max_steps, dtype)
        self.config, self.horizon, self.max_steps, self.dtype = config, horizon, max_steps, dtype
        self.keys, self.values, self.n_prefix = keys, values, n_prefix
        self.device = keys.device
        self.weights: ExpertWeights = expert_weights(state, config, max_steps, dtype, self.device)
        self.noise = torch.zeros(horizon, config.action_dim, device=self.device)
        self.actions = torch.zeros_like(self.noise)
        self.cos, self.sin = rope_table(config, keys.shape[1] + horizon, dtype, self.device)
        self.buffers = self._layer_buffers()
        rows = row_block(horizon)
        self.use_tuning(load_denoise_tuning(self.device, config.expert, rows))

    def use_tuning(self, tuning: DenoiseTuning) -> None:
        """Run the kernels with other block sizes; a graph captured before is stale."""
        self.layer = ExpertLayer(self.buffers, self.weights, self.config.expert, tuning)

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
        # Without PDL: everything enqueued before, such as the prefill, is complete after it.
        first = table_row(num_steps, 0)
        self._launch_euler(self.noise, first, first, 0.0, leave=False, enter=True, pdl=False)

    def launch_layer(self, num_steps: int, step: int, layer: int) -> None:
        """Enqueue one expert layer of one step; needs the prefix K/V of this layer alone."""
        self.layer.launch(table_row(num_steps, step), layer)

    def launch_step_end(self, num_steps: int, step: int) -> None:
        """Enqueue the Euler update and, unless it was the last step, the next step's input."""
        source = self.noise if step == 0 else self.actions
        row, following = table_row(num_steps, step), step + 1
        enter = following < num_steps
        self._launch_euler(
            source, row, table_row(num_steps, following) if enter else row,
            float(step_size(num_steps)), leave=True, enter=enter, pdl=self.layer.pdl,
        )  # fmt: skip

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

    def _launch_euler(
        self, source: Tensor, row: int, next_row: int, dt: float,
        *, leave: bool, enter: bool, pdl: bool,
    ) -> None:  # fmt: skip
        weights, width = self.weights, self.config.expert.width
        actions = self.config.action_dim
        euler.euler_kernel[(self.horizon,)](
            self.buffers.x, self.buffers.scaled, weights.modulations[next_row, 0, SCALE],
            weights.modulations[row, -1],
            weights.action_out, weights.action_out_bias,
            weights.action_in, weights.action_in_bias, source, self.actions, self.layer.ssq,
            dt, actions, W=width, PARTS=self.layer.parts,
            PARTS_POW2=triton.next_power_of_2(self.layer.parts),
            EPS=self.config.expert.rms_norm_eps, A_POW2=triton.next_power_of_2(actions),
            BK=block_size(width, 512, 'width'), LEAVE=leave, ENTER=enter,
            WARPS=_EULER_WARPS, PDL=pdl, PREFETCH=pdl,
            launch_pdl=pdl, num_warps=_EULER_WARPS,
        )  # fmt: skip


def rope_table(
    config: Pi05Config, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (positions, D / 2) in ``dtype``, rounded exactly as the oracle does."""
    cos, sin = oracle_rope_tables(torch.arange(positions, device=device), config.expert, dtype)
    half = config.expert.head_dim // 2
    return cos[:, :half].contiguous(), sin[:, :half].contiguous()


def check_inputs(
    config: Pi05Config, keys: Tensor, values: Tensor, n_prefix: Tensor,
    horizon: int, max_steps: int, dtype: torch.dtype,
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
    if horizon < 1 or max_steps < 1:
        raise BackendError(f'horizon {horizon} and max_steps {max_steps} must be at least 1')
    if keys.device.type != 'cuda' and not is_interpreted():
        raise BackendError(f'the fused denoise needs a CUDA device, got {keys.device}')

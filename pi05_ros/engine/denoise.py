"""The denoise stage: Euler steps of the action expert over a prefix K/V, as one chain of kernels.

Per layer: norm + QKV + RoPE, attention over key ranges, their merge, output projection + gated
residual, norm + gate/up + GEGLU, down + gated residual. Between steps one kernel does the final
norm, the action projection, the Euler update and the next step's input projection. Nothing in
the chain depends on the host: the prefix length is read on the device and the modulations of
every step lie in a table, so a graph captured once per step count serves every prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from pi05_ros.engine.denoise_tuning import DenoiseTuning, GemmTiling, load_denoise_tuning
from pi05_ros.engine.expert_weights import ExpertWeights, expert_weights
from pi05_ros.engine.kernels import euler, small_gemm, split_attention
from pi05_ros.engine.kernels.adarms import GATE, table_row
from pi05_ros.engine.kernels.launch import block_size, has_pdl, is_interpreted, requests_per_row
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.gemma import rope_tables as oracle_rope_tables

_MAX_ROW_BLOCK = 64


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
        tuning: block sizes; None takes the measured ones of this GPU, or the defaults.
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
        tuning: DenoiseTuning | None = None,
    ) -> None:
        check_inputs(config, keys, values, n_prefix, horizon, max_steps, dtype)
        self.config, self.horizon, self.max_steps, self.dtype = config, horizon, max_steps, dtype
        self.keys, self.values, self.n_prefix = keys, values, n_prefix
        self.device = keys.device
        self.row_block = row_block(horizon)
        self.tuning = tuning or load_denoise_tuning(self.device, config.expert, self.row_block)
        self.weights: ExpertWeights = expert_weights(state, config, max_steps, dtype, self.device)
        self.noise = torch.zeros(horizon, config.action_dim, device=self.device)
        self.actions = torch.zeros_like(self.noise)
        self.cos, self.sin = rope_table(config, keys.shape[1] + horizon, dtype, self.device)
        self._pdl = self.tuning.pdl and has_pdl(self.device)
        self._allocate()
        self._plan()

    def launch(self, num_steps: int) -> None:
        """Enqueue a whole run from ``noise`` to ``actions`` on the current stream.

        Allocates nothing and waits for nothing, so it can be captured into a CUDA graph.
        Step-dependent values (modulation rows, dt) are arguments of the kernels, so a graph
        belongs to one step count; the prefix length does not enter it.
        """
        self.launch_begin(num_steps)
        for step in range(num_steps):
            for layer in range(self.config.expert.depth):
                self.launch_layer(num_steps, step, layer)
            self.launch_step_end(num_steps, step)

    def launch_begin(self, num_steps: int) -> None:
        """Enqueue the projection of ``noise`` into the residual stream; needs no prefix."""
        self._check_steps(num_steps)
        # Without PDL: everything enqueued before, such as the prefill, is complete after it.
        self._launch_euler(self.noise, 0, 0.0, leave=False, enter=True, pdl=False)

    def launch_layer(self, num_steps: int, step: int, layer: int) -> None:
        """Enqueue one expert layer of one step; needs the prefix K/V of this layer alone."""
        weights = self.weights
        modulations = weights.modulations[table_row(num_steps, step)]
        attention_mod, mlp_mod = modulations[2 * layer], modulations[2 * layer + 1]
        self._launch_qkv(weights.qkv[layer], attention_mod)
        self._launch_attention(self.keys[layer], self.values[layer])
        self._launch_residual(
            self._attention_out, self._attended, weights.attention_out[layer],
            attention_mod[GATE], self._ssq_attention,
        )  # fmt: skip
        self._launch_gate_up(weights.gate_up[layer], mlp_mod)
        self._launch_residual(
            self._down, self._activated, weights.down[layer], mlp_mod[GATE], self._ssq_mlp
        )

    def launch_step_end(self, num_steps: int, step: int) -> None:
        """Enqueue the Euler update and, unless it was the last step, the next step's input."""
        source = self.noise if step == 0 else self.actions
        self._launch_euler(
            source, table_row(num_steps, step), step_size(num_steps),
            leave=True, enter=step + 1 < num_steps, pdl=self._pdl,
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
            x = euler.enter_reference(
                x_t, weights.action_in, weights.action_in_bias, self.dtype
            )
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
                step_size(num_steps), eps,
            )  # fmt: skip
        return x_t

    def _check_steps(self, num_steps: int) -> None:
        if not 1 <= num_steps <= self.max_steps:
            raise BackendError(f'num_steps {num_steps} is outside 1 to {self.max_steps}')

    def _allocate(self) -> None:
        """Make the workspace; every launch reuses it, one kernel's output at a time."""
        expert, rows = self.config.expert, self.horizon
        heads, width = expert.num_heads, expert.width
        splits = self.tuning.attention.splits

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._x = buffer(rows, width, dtype=self.dtype)
        self._qkv = buffer(heads + 2, rows, expert.head_dim, dtype=self.dtype)
        self._attended = buffer(rows, heads * expert.head_dim, dtype=self.dtype)
        self._activated = buffer(rows, expert.mlp_dim, dtype=self.dtype)
        self._split_sums = buffer(splits, heads * rows, expert.head_dim)
        self._split_max = buffer(splits, heads * rows)
        self._split_norm = buffer(splits, heads * rows)

    def _plan(self) -> None:
        """Turn the tuning into launch arguments that fit this model's shape."""
        expert, tuning = self.config.expert, self.tuning
        width, head_dim = expert.width, expert.head_dim
        row_blocks = triton.cdiv(self.horizon, self.row_block)
        self._attention_out = _ResidualPlan(
            tuning.attention_out, 'heads * head_dim', expert.num_heads * head_dim,
            width, row_blocks, self.row_block, self._x,
        )  # fmt: skip
        self._down = _ResidualPlan(
            tuning.down, 'mlp_dim', expert.mlp_dim, width, row_blocks, self.row_block, self._x
        )
        self._ssq_attention = torch.zeros(
            self.horizon, self._attention_out.parts, device=self.device
        )
        self._ssq_mlp = torch.zeros(self.horizon, self._down.parts, device=self.device)
        self._qkv_args = self._normed(tuning.qkv, 'head_dim / 2', head_dim // 2, self._down.parts)
        self._gate_up_args = self._normed(
            tuning.gate_up, 'mlp_dim', expert.mlp_dim, self._attention_out.parts
        )
        self._qkv_grid = (
            (expert.num_heads + 2) * (head_dim // 2 // self._qkv_args['HALF']), row_blocks
        )  # fmt: skip
        self._gate_up_grid = (expert.mlp_dim // self._gate_up_args['HALF'], row_blocks)

    def _normed(self, tiling: GemmTiling, name: str, size: int, parts: int) -> dict[str, Any]:
        """Return the launch arguments that the two products behind a norm share."""
        expert = self.config.expert
        half = block_size(size, tiling.columns // 2, name)
        return {
            'K': expert.width,
            'PARTS': parts,
            'PARTS_POW2': triton.next_power_of_2(parts),
            'EPS': expert.rms_norm_eps,
            'BM': self.row_block,
            'HALF': half,
            'BK': block_size(expert.width, tiling.depth, 'width'),
            'PER_ROW': requests_per_row(half, expert.width, tiling.warps, self.dtype.itemsize),
            'PDL': self._pdl,
            'launch_pdl': self._pdl,
            'num_warps': tiling.warps,
            'num_stages': tiling.stages,
        }

    def _launch_qkv(self, weight: Tensor, modulation: Tensor) -> None:
        expert = self.config.expert
        small_gemm.qkv_rope_kernel[self._qkv_grid](
            self._x, self._ssq_mlp, modulation, weight, self.cos, self.sin, self.n_prefix,
            self._qkv, self.horizon, expert.num_heads, D=expert.head_dim, **self._qkv_args,
        )  # fmt: skip

    def _launch_gate_up(self, weight: Tensor, modulation: Tensor) -> None:
        small_gemm.gate_up_kernel[self._gate_up_grid](
            self._x, self._ssq_attention, modulation, weight, self._activated, self.horizon,
            N=self.config.expert.mlp_dim, **self._gate_up_args,
        )  # fmt: skip

    def _launch_residual(
        self, plan: _ResidualPlan, a: Tensor, weight: Tensor, gate: Tensor, ssq: Tensor
    ) -> None:
        small_gemm.gated_residual_kernel[plan.grid](
            a, weight, gate, self._x, ssq, plan.partials, plan.counters, self.horizon,
            PDL=self._pdl, launch_pdl=self._pdl, **plan.args,
        )  # fmt: skip

    def _launch_attention(self, keys: Tensor, values: Tensor) -> None:
        expert, tiling = self.config.expert, self.tuning.attention
        heads, head_dim = expert.num_heads, expert.head_dim
        rows = heads * self.horizon
        sums, tops, norms = self._split_sums, self._split_max, self._split_norm
        split_attention.attend_kernel[(triton.cdiv(rows, tiling.rows), tiling.splits)](
            self._qkv, keys, values, self.n_prefix, sums, tops, norms,
            self.horizon, heads, head_dim**-0.5 * math.log2(math.e),
            D=head_dim, SPLITS=tiling.splits, BM=tiling.rows, BN=tiling.keys,
            PER_ROW=requests_per_row(tiling.keys, head_dim, tiling.warps, self.dtype.itemsize),
            PDL=self._pdl, launch_pdl=self._pdl,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        split_attention.merge_kernel[(rows,)](
            sums, tops, norms, self.n_prefix, self._attended, self.horizon, heads,
            D=head_dim, SPLITS=tiling.splits, SPLITS_POW2=triton.next_power_of_2(tiling.splits),
            BN=tiling.keys, PDL=self._pdl, launch_pdl=self._pdl,
            num_warps=self.tuning.merge_warps,
        )  # fmt: skip

    def _launch_euler(
        self, source: Tensor, row: int, dt: float, *, leave: bool, enter: bool, pdl: bool
    ) -> None:
        weights, width = self.weights, self.config.expert.width
        actions = self.config.action_dim
        euler.euler_kernel[(self.horizon,)](
            self._x, weights.modulations[row, -1], weights.action_out, weights.action_out_bias,
            weights.action_in, weights.action_in_bias, source, self.actions, self._ssq_mlp,
            dt, actions, W=width, PARTS=self._down.parts,
            PARTS_POW2=triton.next_power_of_2(self._down.parts),
            EPS=self.config.expert.rms_norm_eps, A_POW2=triton.next_power_of_2(actions),
            BK=block_size(width, 256, 'width'), LEAVE=leave, ENTER=enter,
            PDL=pdl, launch_pdl=pdl, num_warps=self.tuning.euler_warps,
        )  # fmt: skip


class _ResidualPlan:
    """Launch arguments and workspace of one product that ends in the residual stream."""

    def __init__(
        self, tiling: GemmTiling, name: str, depth: int, width: int,
        row_blocks: int, rows: int, like: Tensor,
    ) -> None:  # fmt: skip
        columns = block_size(width, tiling.columns, 'width')
        splits = tiling.splits
        while depth % splits or depth // splits % 16:
            splits -= 1
        block = block_size(depth // splits, tiling.depth, name)
        self.parts = width // columns
        self.grid = (self.parts, splits, row_blocks)
        tiles = self.parts * row_blocks
        self.partials = torch.zeros(tiles, splits, rows, columns, device=like.device)
        self.counters = torch.zeros(tiles, dtype=torch.int32, device=like.device)
        self.args: dict[str, Any] = {
            'N': width,
            'K': depth,
            'SPLITS': splits,
            'BM': rows,
            'BN': columns,
            'BK': block,
            'PER_ROW': requests_per_row(
                columns, depth // splits, tiling.warps, like.element_size()
            ),
            'num_warps': tiling.warps,
            'num_stages': tiling.stages,
        }


def row_block(horizon: int) -> int:
    """Return the rows per block: the horizon's next power of two, within what a block can hold."""
    return min(_MAX_ROW_BLOCK, max(16, triton.next_power_of_2(horizon)))


def step_size(num_steps: int) -> float:
    """Return dt, rounded to float32 as the reference does."""
    return torch.tensor(-1.0 / num_steps, dtype=torch.float32).item()


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

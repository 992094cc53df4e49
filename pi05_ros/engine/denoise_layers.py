"""One expert layer as six kernel launches over buffers that every layer and step reuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from pi05_ros.engine.denoise_tuning import DenoiseTuning, GemmTiling
from pi05_ros.engine.expert_weights import ExpertWeights
from pi05_ros.engine.kernels import small_gemm, split_attention
from pi05_ros.engine.kernels.adarms import GATE, SCALE, SHIFT
from pi05_ros.engine.kernels.launch import block_size, has_pdl
from pi05_ros.model.config import GemmaConfig

_MAX_ROW_BLOCK = 64


@dataclass(frozen=True)
class LayerBuffers:
    """What a layer reads and writes."""

    x: Tensor  # (H, W) residual stream
    scaled: Tensor  # (H, W) x * (1 + scale of the next norm)
    qkv: Tensor  # (heads + 2, H, D)
    attended: Tensor  # (H, heads * D)
    activated: Tensor  # (H, F)
    keys: Tensor  # (L, P_max, D) prefix
    values: Tensor  # (L, P_max, D) prefix
    n_prefix: Tensor  # (1,) int32
    cos: Tensor  # (P_max + H, D / 2)
    sin: Tensor  # (P_max + H, D / 2)


class ExpertLayer:
    """Six Triton kernels per layer, for any GPU that Triton knows, and for its interpreter."""

    def __init__(
        self, buffers: LayerBuffers, weights: ExpertWeights, expert: GemmaConfig,
        tuning: DenoiseTuning,
    ) -> None:  # fmt: skip
        self._buffers, self._weights, self._expert = buffers, weights, expert
        self.tuning = tuning
        self.horizon = buffers.x.shape[0]
        self.row_block = row_block(self.horizon)
        self.pdl = tuning.pdl and has_pdl(buffers.x.device)
        mods = weights.modulations
        self._qkv_shift = shift_products(mods[:, 0:-1:2, SHIFT], weights.qkv)
        self._gate_up_shift = shift_products(mods[:, 1:-1:2, SHIFT], weights.gate_up)
        self._plan()

    def launch(self, row: int, layer: int) -> None:
        """Enqueue one layer with the modulations of one row of the table."""
        self.launch_qkv(row, layer)
        self.launch_attend(row, layer)
        self.launch_merge()
        self.launch_attention_out(row, layer)
        self.launch_gate_up(row, layer)
        self.launch_down(row, layer)

    def _plan(self) -> None:
        """Turn the tuning into launch arguments and workspace that fit this model's shape."""
        expert, tuning, x = self._expert, self.tuning, self._buffers.x
        width, head_dim = expert.width, expert.head_dim
        split_rows = (tuning.attention.splits, expert.num_heads * self.horizon)
        self._parts = torch.zeros(*split_rows, head_dim, dtype=x.dtype, device=x.device)
        self._log_sums = torch.zeros(split_rows, device=x.device)
        row_blocks = triton.cdiv(self.horizon, self.row_block)
        self._attention_out = _ResidualPlan(
            tuning.attention_out, 'heads * head_dim', expert.num_heads * head_dim,
            width, row_blocks, self.row_block, x,
        )  # fmt: skip
        self._down = _ResidualPlan(
            tuning.down, 'mlp_dim', expert.mlp_dim, width, row_blocks, self.row_block, x
        )
        self.parts = self._down.parts
        self._ssq_attention = torch.zeros(self.horizon, self._attention_out.parts, device=x.device)
        self.ssq = torch.zeros(self.horizon, self.parts, device=x.device)
        self._qkv_args = self._normed(tuning.qkv, 'head_dim', head_dim, self.parts)
        self._gate_up_args = self._normed(
            tuning.gate_up, '2 * mlp_dim', 2 * expert.mlp_dim, self._attention_out.parts
        )
        self._qkv_grid = (
            (expert.num_heads + 2) * (head_dim // self._qkv_args['BN']), row_blocks
        )  # fmt: skip
        self._gate_up_grid = (2 * expert.mlp_dim // self._gate_up_args['BN'], row_blocks)

    def _start(self, *, prefetch: bool = True) -> dict[str, Any]:
        """Return the launch arguments that say how a kernel starts."""
        start = {'PDL': self.pdl, 'launch_pdl': self.pdl}
        return start | ({'PREFETCH': self.pdl and self.tuning.prefetch} if prefetch else {})

    def _normed(self, tiling: GemmTiling, name: str, size: int, parts: int) -> dict[str, Any]:
        """Return the launch arguments that the two products behind a norm share."""
        expert = self._expert
        return {
            'K': expert.width,
            'PARTS': parts,
            'PARTS_POW2': triton.next_power_of_2(parts),
            'EPS': expert.rms_norm_eps,
            'BM': self.row_block,
            'BN': block_size(size, tiling.columns, name),
            'BK': block_size(expert.width, tiling.depth, 'width'),
            'WARPS': tiling.warps,
            'num_warps': tiling.warps,
            'num_stages': tiling.stages,
        }

    def launch_qkv(self, row: int, layer: int) -> None:
        """Enqueue norm, q, k, v and their rotation: scaled to qkv."""
        b, expert = self._buffers, self._expert
        small_gemm.qkv_rope_kernel[self._qkv_grid](
            b.scaled, self.ssq, self._qkv_shift[row, layer], self._weights.qkv[layer],
            b.cos, b.sin, b.n_prefix, b.qkv, self.horizon, expert.num_heads,
            D=expert.head_dim, **self._qkv_args, **self._start(),
        )  # fmt: skip

    def launch_attend(self, row: int, layer: int) -> None:
        """Enqueue attention by key ranges: qkv to parts."""
        b, expert, tiling = self._buffers, self._expert, self.tuning.attention
        head_dim = expert.head_dim
        row_blocks = triton.cdiv(expert.num_heads * self.horizon, tiling.rows)
        split_attention.attend_kernel[(row_blocks, tiling.splits)](
            b.qkv, b.keys[layer], b.values[layer], b.n_prefix, self._parts, self._log_sums,
            self.horizon, expert.num_heads, head_dim**-0.5 * math.log2(math.e),
            D=head_dim, SPLITS=tiling.splits, BM=tiling.rows, BN=tiling.keys, WARPS=tiling.warps,
            num_warps=tiling.warps, num_stages=tiling.stages, **self._start(),
        )  # fmt: skip

    def launch_merge(self) -> None:
        """Enqueue the merge of the key ranges: parts to attended."""
        b, expert, tiling = self._buffers, self._expert, self.tuning.attention
        split_attention.merge_kernel[(expert.num_heads * self.horizon,)](
            self._parts, self._log_sums, b.n_prefix, b.attended, self.horizon, expert.num_heads,
            D=expert.head_dim, SPLITS=tiling.splits,
            SPLITS_POW2=triton.next_power_of_2(tiling.splits), BN=tiling.keys,
            num_warps=self.tuning.merge_warps, **self._start(prefetch=False),
        )  # fmt: skip

    def launch_attention_out(self, row: int, layer: int) -> None:
        """Enqueue the output projection: attended into x."""
        weight, norm = self._weights.attention_out[layer], 2 * layer
        self._launch_residual(
            self._attention_out, row, norm, self._buffers.attended, weight, self._ssq_attention
        )

    def launch_gate_up(self, row: int, layer: int) -> None:
        """Enqueue norm, gate, up and their product: scaled to activated."""
        b, weights = self._buffers, self._weights
        small_gemm.gate_up_kernel[self._gate_up_grid](
            b.scaled, self._ssq_attention, self._gate_up_shift[row, layer],
            weights.gate_up[layer], b.activated, self.horizon,
            N=self._expert.mlp_dim, **self._gate_up_args, **self._start(),
        )  # fmt: skip

    def launch_down(self, row: int, layer: int) -> None:
        """Enqueue the down projection: activated into x."""
        weight, norm = self._weights.down[layer], 2 * layer + 1
        self._launch_residual(self._down, row, norm, self._buffers.activated, weight, self.ssq)

    def _launch_residual(
        self, plan: _ResidualPlan, row: int, norm: int, a: Tensor, weight: Tensor, ssq: Tensor
    ) -> None:
        b, mods = self._buffers, self._weights.modulations[row]
        small_gemm.gated_residual_kernel[plan.grid](
            a, weight, mods[norm, GATE], mods[norm + 1, SCALE], b.x, b.scaled, ssq,
            plan.partials, plan.counters, self.horizon,
            **plan.args, **self._start(),
        )  # fmt: skip


def shift_products(shifts: Tensor, weights: Tensor) -> Tensor:
    """Return shift @ weight^T (rows, L, N) float32, for shifts (rows, L, W), weights (L, N, W)."""
    products = [shifts[:, i] @ weight.float().T for i, weight in enumerate(weights)]
    return torch.stack(products, dim=1)


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
        self.grid = (splits, self.parts, row_blocks)
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
            'WARPS': tiling.warps,
            'num_warps': tiling.warps,
            'num_stages': tiling.stages,
        }


def row_block(horizon: int) -> int:
    """Return the rows per block: the horizon's next power of two, within what a block can hold."""
    return min(_MAX_ROW_BLOCK, max(16, triton.next_power_of_2(horizon)))

"""Attention of the prefix on Hopper's tensor cores, see hopper_prefill_attention.cu."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import CudaKernel, TensorTiles, compile_module

_SOURCE = Path(__file__).with_name('hopper_prefill_attention.cu')
_DIM, _TILE_COLUMNS = 256, 64
_TILE_QUERIES, _WARPGROUPS = 64, 2
_THREADS = 384
_BLOCK_BYTES = 227 * 1024
_ALIGN_BYTES = 1024  # to begin at a multiple of them
_BARRIER_BYTES = 256
_LOG2_E = 1.4426950408889634  # exp2 is one instruction


@dataclass(frozen=True)
class Cut:
    """How the work is cut up.

    Args:
        keys: of a tile.
        block_splits: 2 if the warpgroups of a block have the same queries and divide the keys.
        cluster_splits: blocks that have the same queries and divide the keys.
        sharers: blocks with other queries and the same keys, which they bring together.
        sum_bytes: of a sum that goes to another block or warpgroup, 2 for bfloat16.
        held: steps of 16 columns of the queries that stay in registers; there is room for 8, 6
            and 2 with 64, 80 and 96 keys.
    """

    keys: int = 64
    block_splits: int = 1
    cluster_splits: int = 2
    sharers: int = 1
    sum_bytes: int = 4
    held: int = 8

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.cluster_splits * self.sharers

    def defines(self) -> dict[str, int]:
        """Return the macros that the source is compiled with."""
        return {
            'KEYS': self.keys, 'BLOCK_SPLITS': self.block_splits,
            'CLUSTER_SPLITS': self.cluster_splits, 'SHARERS': self.sharers,
            'SUM_BYTES': self.sum_bytes, 'HELD': self.held, 'STAGES': self._stages(),
        }  # fmt: skip

    def shared_bytes(self) -> int:
        """Return the dynamic shared memory of a block: its queries and its ring."""
        return self._query_bytes() + self._stages() * self._stage_bytes() + _ALIGN_BYTES

    def blocks(self, rows: int) -> int:
        """Return the grid for so many packed query rows: whole clusters."""
        return -(-rows // (self._queries() * self.sharers)) * self.cluster

    def _queries(self) -> int:
        return _TILE_QUERIES * _WARPGROUPS // self.block_splits

    def _query_bytes(self) -> int:
        return self._queries() * _DIM * 2

    def _stage_bytes(self) -> int:
        return self.keys * _DIM * 2

    def _stages(self) -> int:
        peers = self.block_splits * self.cluster_splits
        static = (peers - 1) * _WARPGROUPS * _TILE_QUERIES * 8 + _BARRIER_BYTES
        room = _BLOCK_BYTES - static - self._query_bytes() - _ALIGN_BYTES
        return room // self._stage_bytes()


def prefill_attention_misfit(q: Tensor, keys: Tensor) -> str | None:
    """Return why the kernel cannot take queries and keys, or None if it can."""
    if q.dtype != torch.bfloat16 or keys.dtype != torch.bfloat16:
        return f'it computes in bfloat16, not in {q.dtype} and {keys.dtype}'
    if keys.shape[1] != _DIM:
        return f'it is made for heads of {_DIM} columns, not {keys.shape[1]}'
    return None


class HopperPrefillAttention:
    """The kernels of one device, compiled when a number of queries first needs them."""

    def __init__(self, device: torch.device, cut: Cut | None = None) -> None:
        self._device = device
        self._cut = cut or Cut()
        self._kernels: dict[int, CudaKernel] = {}

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, count: Tensor, scale: float, out: Tensor
    ) -> None:
        """Do what :func:`~pi05_ros.engine.kernels.prefill_attention.prefill_attention` does.

        Args:
            scale: greater than 0.

        Raises:
            BackendError: the source does not compile here.
        """
        cut = self._cut
        heads = q.shape[1] // _DIM
        rows = q.shape[0] * heads
        box_keys = cut.keys // cut.sharers
        self._kernel(cut.blocks(rows)).launch(
            (
                TensorTiles(q.view(rows, _DIM), _TILE_QUERIES, _TILE_COLUMNS),
                TensorTiles(keys, box_keys, _TILE_COLUMNS),
                TensorTiles(values, box_keys, _TILE_COLUMNS),
                count, scale * _LOG2_E, out, heads,
            ),
            early=True,
        )  # fmt: skip

    def _kernel(self, blocks: int) -> CudaKernel:
        kernel = self._kernels.get(blocks)
        if kernel is None:
            macros = tuple(self._cut.defines().items())
            module = compile_module(_SOURCE, macros, self._device)
            kernel = CudaKernel(
                module, 'prefill_attention', blocks, _THREADS, self._cut.shared_bytes(),
                self._cut.cluster,
            )  # fmt: skip
            self._kernels[blocks] = kernel
        return kernel

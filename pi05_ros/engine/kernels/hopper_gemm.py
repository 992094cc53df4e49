"""GEMMs of vision and prefill in CUDA C++ for Hopper GPUs, see hopper_gemm.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .nvrtc import CudaKernel, TensorTiles, compile_module

_SOURCE = Path(__file__).with_name('hopper_gemm.cu')
_HEADERS = tuple(_SOURCE.with_name(name) for name in ('hopper.cuh', 'hopper_tile.cuh'))
_DEPTH = 64
_BLOCK_BYTES = 227 * 1024 - 2048


@dataclass(frozen=True)
class GemmTiles:
    """How a product is cut up.

    Args:
        rows, features: of a tile. cluster_rows, cluster_features: tiles of a cluster.
        stages: of the ring in shared memory, 0 for as many as fit.
    """

    rows: int
    features: int
    cluster_rows: int = 1
    cluster_features: int = 1
    stages: int = 0
    blocks: int = 1

    def stage_bytes(self) -> int:
        return (self.rows + self.features) * _DEPTH * 2

    def ring(self) -> int:
        return self.stages or min(8, _BLOCK_BYTES // self.blocks // self.stage_bytes())

    def shared_bytes(self) -> int:
        return self.ring() * self.stage_bytes() + 1024

    def cluster(self) -> int:
        return self.cluster_rows * self.cluster_features

    def units(self, rows: int, features: int) -> int:
        """Return the clusters' worth of work of a product."""
        row_units = -(-rows // (self.rows * self.cluster_rows))
        return row_units * -(-features // (self.features * self.cluster_features))

    def defines(self) -> dict[str, int]:
        return {
            'TILE_ROWS': self.rows, 'TILE_FEATURES': self.features, 'STAGES': self.ring(),
            'CLUSTER_ROWS': self.cluster_rows, 'CLUSTER_FEATURES': self.cluster_features,
            'BLOCKS': self.blocks,
        }  # fmt: skip


class HopperGemm:
    """Products with given tiles on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._null = torch.zeros(1, device=device)
        self._kernels: dict[tuple, CudaKernel] = {}
        self._maps: dict[tuple, Any] = {}

    def run(self, tiles: GemmTiles, x: Tensor, weight: Tensor, out: Tensor, *,
            bias: Tensor | None = None, residual: Tensor | None = None,
            row_scale: Tensor | None = None, gelu: bool = False, early: bool = True) -> None:
        rows, depth = x.shape
        features = weight.shape[0]
        names = {'BIAS': bias is not None, 'RESIDUAL': residual is not None, 'GELU': gelu,
                 'GEGLU': row_scale is not None}
        flags = tuple(name for name, on in names.items() if on)
        kernel = self._kernel(tiles, flags, rows, features)
        null = self._null
        kernel.launch(
            (
                self._map(x, tiles.rows // tiles.cluster_features),
                self._map(weight, tiles.features // tiles.cluster_rows),
                null if bias is None else bias, null if residual is None else residual,
                null if row_scale is None else row_scale, out, rows, features, depth,
            ), early=early)  # fmt: skip

    def _kernel(self, tiles: GemmTiles, flags: tuple[str, ...], rows: int, features: int):
        units = tiles.units(rows, features)
        key = (tiles, flags, units)
        if key not in self._kernels:
            module = compile_gemm(tiles, flags, self.device)
            threads = (128 if tiles.rows == 64 else 256) + (128 if tiles.blocks == 1 else 32)
            cluster, shared = tiles.cluster(), tiles.shared_bytes()
            kernel = CudaKernel(module, 'gemm', units * cluster, threads, shared, cluster)
            resident = kernel.resident_clusters() * (tiles.blocks if cluster == 1 else 1)
            if units > resident:
                kernel = CudaKernel(module, 'gemm', resident * cluster, threads, shared, cluster)
            self._kernels[key] = kernel
        return self._kernels[key]

    def _map(self, matrix: Tensor, box_rows: int):
        key = (matrix.data_ptr(), *matrix.shape, box_rows)
        if key not in self._maps:
            self._maps[key] = TensorTiles(matrix, box_rows, _DEPTH)
        return self._maps[key]


def compile_gemm(tiles: GemmTiles, flags: tuple[str, ...], device: torch.device):
    macros = (*tiles.defines().items(), *((flag, 1) for flag in flags))
    return compile_module(_SOURCE, _HEADERS, macros, device)


def interleave_for_hopper(gate: Tensor, up: Tensor) -> Tensor:
    """Return (2 F, W): by 32 units, the pairs in the order that makes a lane's pairs neighbours.

    Row 64 J + 8 j + 2 q of the result is gate unit 32 J + 8 q + j, the next row its up unit.
    """
    units = torch.arange(gate.shape[0], device=gate.device).view(-1, 4, 8).transpose(1, 2).flatten()
    return torch.stack((gate[units], up[units]), dim=1).flatten(0, 1)

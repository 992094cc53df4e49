"""Row scale, gate and up projection and GEGLU on Hopper's tensor cores, see hopper_gate_up.cu."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .gate_up import launch_row_scale
from .nvrtc import CudaKernel, TensorTiles, compile_module

_SOURCE = Path(__file__).with_name('hopper_gate_up.cu')
_FEATURES, _DEPTH = 256, 64  # of a tile, and of a step along K
_THREADS = 384
_RING_BYTES = 225 * 1024
_TILE_ROWS = (192, 128)


@dataclass(frozen=True)
class Tiling:
    """Rows of a tile, and how many blocks with different rows share their features' weights."""

    tile_rows: int
    cluster: int

    def defines(self) -> dict[str, int]:
        """Return the macros that the source is compiled with."""
        return {'TILE_ROWS': self.tile_rows, 'CLUSTER': self.cluster, 'STAGES': self._stages()}

    def shared_bytes(self) -> int:
        """Return the shared memory of a block: its ring, with room to begin at 1024 bytes."""
        return self._stages() * self._stage_bytes() + 1024

    def blocks(self, rows: int, features: int, processors: int) -> int:
        """Return the grid: a block per tile, but no more than there are multiprocessors."""
        units = -(-rows // (self.tile_rows * self.cluster)) * (features // _FEATURES)
        return min(units, processors // self.cluster) * self.cluster

    def _stage_bytes(self) -> int:
        return (self.tile_rows + _FEATURES) * _DEPTH * 2

    def _stages(self) -> int:
        return _RING_BYTES // self._stage_bytes()


def gate_up_misfit(hidden: int, width: int) -> str | None:
    """Return why the kernel cannot take (2 ``hidden``, ``width``) weights, or None if it can."""
    if 2 * hidden % _FEATURES or width % _DEPTH:
        return (
            f'the width {width} must be a multiple of {_DEPTH}, '
            f'the MLP width {hidden} of {_FEATURES // 2}'
        )
    return None


def choose_tiling(rows: int, features: int, processors: int) -> Tiling:
    """Return the tiling that takes the fewest turns, weighted by the rows of each.

    Neighbouring row tiles form clusters of two where their number is even.
    """

    def cost(tile_rows: int) -> int:
        tiles = -(-rows // tile_rows) * (features // _FEATURES)
        return -(-tiles // processors) * tile_rows

    tile_rows = min(_TILE_ROWS, key=cost)
    return Tiling(tile_rows, 2 if -(-rows // tile_rows) % 2 == 0 else 1)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Return (2 F, W): gate and up rows alternating, units of 32 in the order of the kernel.

    Rows 64 n + 8 j + 2 q and the next one are gate and up of unit 32 n + 8 q + j: a thread has the
    sums of one q, and writes those units side by side.
    """
    units = torch.arange(len(gate), device=gate.device).view(-1, 4, 8).transpose(1, 2).flatten()
    return torch.stack((gate[units], up[units]), dim=1).flatten(0, 1)


class HopperGateUp:
    """The kernels of one device, compiled when a number of rows first needs them.

    The weight has its rows in the order of :func:`interleave`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernels: dict[tuple[Tiling, int], CudaKernel] = {}

    def __call__(self, x: Tensor, weight: Tensor, eps: float, scale: Tensor, out: Tensor) -> None:
        """Do what :func:`~pi05_ros.engine.kernels.gate_up.gate_up` does.

        Raises:
            BackendError: the source does not compile here.
        """
        rows, depth = x.shape
        features = weight.shape[0]
        tiling = choose_tiling(rows, features, self._processors)
        blocks = tiling.blocks(rows, features, self._processors)
        launch_row_scale(x, eps, scale, early_next=True)
        self._kernel(tiling, blocks).launch(
            (
                TensorTiles(x, tiling.tile_rows, _DEPTH),
                TensorTiles(weight, _FEATURES // tiling.cluster, _DEPTH),
                scale, out, rows, features, depth,
            ),
            early=True,
        )  # fmt: skip

    def _kernel(self, tiling: Tiling, blocks: int) -> CudaKernel:
        kernel = self._kernels.get((tiling, blocks))
        if kernel is None:
            macros = tuple(tiling.defines().items())
            module = compile_module(_SOURCE, macros, self._device)
            kernel = CudaKernel(
                module, 'gate_up', blocks, _THREADS, tiling.shared_bytes(), tiling.cluster
            )
            self._kernels[tiling, blocks] = kernel
        return kernel

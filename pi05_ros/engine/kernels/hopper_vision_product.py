"""Vision's products on Hopper's tensor cores, norms inside, see hopper_vision_product.cu."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from .folded_norm import NormedLinear, RowMoments
from .nvrtc import CudaKernel, TensorTiles, compile_module

_SOURCE = Path(__file__).with_name('hopper_vision_product.cu')
_DEPTH = 64  # of a step along K
# Half of a multiprocessor's shared memory, less what a block has beside its ring.
_RING_BYTES = 110 * 1024
_MIN_STAGES = 3
_TILE_ROWS = (64, 128)
_TILE_FEATURES = (208, 160, 144, 128, 96, 64)
# From here on along K, operands that clusters share are worth that blocks wait for each other.
_LONG_DEPTH = 2048


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up.

    Args:
        rows, features: of a tile.
        cluster: blocks with different rows that share their features' weights.
        rotate: blocks with different features begin at different columns of x.
    """

    rows: int
    features: int
    cluster: int
    rotate: bool = True

    def defines(self) -> dict[str, int]:
        """Return the macros that the source is compiled with."""
        return {
            'TILE_ROWS': self.rows, 'TILE_FEATURES': self.features, 'CLUSTER': self.cluster,
            'STAGES': self._stages(), 'ROTATE': int(self.rotate),
        }  # fmt: skip

    def threads(self) -> int:
        """Return the threads of a block: a warpgroup per 64 rows, and a warp that copies."""
        return 2 * self.rows + 32

    def shared_bytes(self) -> int:
        """Return the shared memory of a block: its ring, with room to begin at 1024 bytes."""
        return self._stages() * self._stage_bytes() + 1024

    def blocks(self, rows: int, features: int) -> int:
        """Return the grid: one block per tile, in whole clusters."""
        row_clusters = -(-rows // (self.rows * self.cluster))
        return row_clusters * self.cluster * -(-features // self.features)

    def _stage_bytes(self) -> int:
        return (self.rows + self.features) * _DEPTH * 2

    def _stages(self) -> int:
        return max(_MIN_STAGES, _RING_BYTES // self._stage_bytes())


def choose_tiling(rows: int, features: int, depth: int, processors: int) -> Tiling:
    """Return the tiling with the fewest turns, weighted by the tile, then the fewest operands.

    Neighbouring row tiles form clusters where their number allows it: pairs of 128 rows, and where
    K is long as many as four of 64.
    """

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        tiles = -(-rows // tile[0]) * -(-features // tile[1])
        return -(-tiles // processors) * tile[0] * tile[1], tiles * sum(tile)

    tile_rows, tile_features = min(product(_TILE_ROWS, _TILE_FEATURES), key=cost)
    row_tiles = -(-rows // tile_rows)
    largest = 2 if tile_rows == 128 else 4 if depth >= _LONG_DEPTH else 1
    cluster = next(size for size in (4, 2, 1) if size <= largest and row_tiles % size == 0)
    return Tiling(tile_rows, tile_features, cluster)


class HopperVisionProduct:
    """The kernels of one device, compiled when a shape first needs them.

    All start before the kernel before them has completed, and let the next one do so.

    Args:
        tilings: other tilings than :func:`choose_tiling`'s, by (rows, features, depth).
    """

    def __init__(
        self, device: torch.device, tilings: dict[tuple[int, int, int], Tiling] | None = None
    ) -> None:
        self._device = device
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._tilings = dict(tilings or {})
        self._kernels: dict[tuple, CudaKernel] = {}

    def moments(self, rows: int, width: int, depth: int) -> RowMoments:
        """Return room for what :meth:`add` leaves of a (``rows``, ``width``) result."""
        tiling = self._tiling(rows, width, depth)
        return RowMoments.zeros(rows, width, tiling.features, self._device)

    def normed(
        self, x: Tensor, moments: RowMoments, layer: NormedLinear, eps: float, out: Tensor, *,
        gelu: bool,
    ) -> None:  # fmt: skip
        """Do what :func:`~.folded_norm.normed_linear_plain` does.

        Raises:
            BackendError: the source does not compile here.
        """
        parts = moments.values.shape[0]
        macros = {'PARTS': parts, 'PART_FEATURES': moments.part_columns}
        if gelu:
            macros['GELU'] = 1
        self._launch(x, layer.weight, layer.bias, layer.sums, moments, out, eps, macros)

    def add(
        self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: RowMoments
    ) -> None:
        """Do what :func:`~.folded_norm.add_linear_plain` does.

        Raises:
            BackendError: the source does not compile here.
        """
        self._launch(x, weight, bias, bias, moments, out, 0.0, {'RESIDUAL': 1})

    def _launch(
        self, x: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, moments: RowMoments,
        out: Tensor, eps: float, macros: dict[str, int],
    ) -> None:  # fmt: skip
        rows, depth = x.shape
        features = weight.shape[0]
        tiling = self._tiling(rows, features, depth)
        assert 'RESIDUAL' not in macros or moments.part_columns == tiling.features
        blocks = tiling.blocks(rows, features)
        self._kernel(tiling, blocks, macros).launch(
            (
                TensorTiles(x, tiling.rows, _DEPTH),
                TensorTiles(weight, tiling.features // tiling.cluster, _DEPTH),
                bias, sums, moments.values, out, rows, features, depth, eps,
            ),
            early=True,
        )  # fmt: skip

    def _tiling(self, rows: int, features: int, depth: int) -> Tiling:
        key = (rows, features, depth)
        if key not in self._tilings:
            self._tilings[key] = choose_tiling(*key, self._processors)
        return self._tilings[key]

    def _kernel(self, tiling: Tiling, blocks: int, macros: dict[str, int]) -> CudaKernel:
        defines = (*tiling.defines().items(), *macros.items())
        key = (defines, blocks)
        if key not in self._kernels:
            module = compile_module(_SOURCE, defines, self._device)
            self._kernels[key] = CudaKernel(
                module, 'vision_product', blocks, tiling.threads(), tiling.shared_bytes(),
                tiling.cluster,
            )  # fmt: skip
        return self._kernels[key]

"""Vision's products on Hopper's tensor cores, norms inside, see hopper_vision_product.cu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .folded_norm import NormedLinear, RowMoments
from .nvrtc import ShapedKernel, TensorTiles

_SOURCE = Path(__file__).with_name('hopper_vision_product.cu')
_DEPTH = 64  # of a step along K
_RING_BYTES = 216 * 1024  # of the 227 KB that a block may have
_MAX_STAGES = 12
_GROUP = 16  # features that a thread and its three neighbours have of a row
_TILE_FEATURES = {64: (160, 144, 128, 96, 64), 128: (208, 160, 144, 128, 112, 96)}  # by rows
# From here on along K, shared weights are worth that four blocks wait for each other.
_LONG_DEPTH = 2048


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up.

    Args:
        rows, features: of a tile.
        cluster: blocks with different rows that share their features' weights.
        stages: of the ring in shared memory.
    """

    rows: int
    features: int
    cluster: int
    stages: int

    def defines(self) -> dict[str, int]:
        """Return the macros that the source is compiled with."""
        return {
            'TILE_ROWS': self.rows, 'TILE_FEATURES': self.features, 'CLUSTER': self.cluster,
            'STAGES': self.stages,
        }  # fmt: skip

    def threads(self) -> int:
        """Return the threads of a block: a warpgroup per 64 rows, and a warp that copies."""
        return 2 * self.rows + 32

    def shared_bytes(self) -> int:
        """Return the shared memory of a block: its ring, with room to begin at 1024 bytes."""
        return self.stages * _stage_bytes(self.rows, self.features) + 1024

    def blocks(self, rows: int, features: int) -> int:
        """Return the grid: one block per tile, in whole clusters."""
        row_clusters = -(-rows // (self.rows * self.cluster))
        return row_clusters * self.cluster * -(-features // self.features)


@dataclass(frozen=True)
class Shape:
    """Sizes of a product: (rows, depth) times (features, depth)."""

    rows: int
    features: int
    depth: int


def choose_tiling(shape: Shape, processors: int) -> Tiling:
    """Return the tiling that moves the fewest bytes through a multiprocessor's shared memory.

    That is what bounds a block: per step along K the tiles of x and of the weight are written, and
    every warpgroup reads its 64 rows and all features. Among equals it is the one with the fewest
    bytes from L2. Where K is long, tiles have 64 rows.
    """
    steps = -(-shape.depth // _DEPTH)

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        rows, features = tile
        blocks = -(-shape.rows // rows) * -(-shape.features // features)
        moved = (rows + features) + (rows + features * rows // 64)
        return -(-blocks // processors) * moved, blocks * (rows + features)

    tile_rows = (64,) if shape.depth >= _LONG_DEPTH else _TILE_FEATURES
    tiles = [(rows, features) for rows in tile_rows for features in _TILE_FEATURES[rows]]
    rows, features = min(tiles, key=cost)
    stages = min(_RING_BYTES // _stage_bytes(rows, features), _MAX_STAGES, steps)
    return Tiling(rows, features, _choose_cluster(shape, rows, features), stages)


def _choose_cluster(shape: Shape, rows: int, features: int) -> int:
    """Return how many neighbouring row tiles share weights: two of 128 rows, four where K is long.

    Of 132 multiprocessors, clusters of four fill no more than 120 at once. The cost of a tiling
    leaves that out: the released model with up to three views has fewer blocks in them.
    """
    largest = 4 if shape.depth >= _LONG_DEPTH else 2 if rows == 128 else 1
    row_tiles = -(-shape.rows // rows)
    fitting = (size for size in (4, 2, 1) if size <= largest and features % (8 * size) == 0)
    return next(size for size in fitting if row_tiles % size == 0)


def _stage_bytes(rows: int, features: int) -> int:
    return (rows + features) * _DEPTH * 2


def order_features(weight: Tensor) -> Tensor:
    """Return (N, K) with each 16 rows in the order of the kernel; N is padded to whole groups.

    Row 8 j + 2 q + e of a group is feature 4 q + 2 j + e: a thread has the sums of one q, and
    writes those features side by side.
    """
    features, depth = weight.shape
    padded = weight.new_zeros(-(-features // _GROUP) * _GROUP, depth)
    padded[:features] = weight
    return padded.view(-1, 4, 2, 2, depth).transpose(1, 2).reshape(padded.shape)


class HopperVisionProduct:
    """The kernels of one device, compiled when a shape first needs them.

    All start before the kernel before them has completed, and let the next one do so. Weights have
    their rows in the order of :func:`order_features`.

    Args:
        tilings: other tilings than :func:`choose_tiling`'s.
    """

    def __init__(
        self, device: torch.device, tilings: Mapping[Shape, Tiling] | None = None
    ) -> None:
        self._device = device
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._tilings = dict(tilings or {})
        self._kernel = ShapedKernel(_SOURCE, 'vision_product', device)

    def moments(self, rows: int, width: int, depth: int) -> RowMoments:
        """Return room for what :meth:`add` leaves of a (``rows``, ``width``) result."""
        tiling = self._tiling(Shape(rows, width, depth))
        return RowMoments.zeros(rows, width, tiling.features, self._device)

    def normed(
        self, x: Tensor, moments: RowMoments, layer: NormedLinear, eps: float, out: Tensor, *,
        gelu: bool,
    ) -> None:  # fmt: skip
        """Do what :func:`~.folded_norm.normed_linear_plain` does.

        Raises:
            BackendError: the source does not compile here.
        """
        macros = {'PARTS': moments.values.shape[0], 'PART_FEATURES': moments.part_columns}
        if gelu:
            macros['GELU'] = 1
        self._launch(x, layer, moments, out, eps, macros)

    def add(
        self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: RowMoments
    ) -> None:
        """Do what :func:`~.folded_norm.add_linear_plain` does.

        Raises:
            BackendError: the source does not compile here.
        """
        self._launch(x, NormedLinear(weight, bias, bias), moments, out, 0.0, {'RESIDUAL': 1})

    def _launch(
        self, x: Tensor, layer: NormedLinear, moments: RowMoments, out: Tensor, eps: float,
        macros: dict[str, int],
    ) -> None:  # fmt: skip
        (rows, depth), features = x.shape, out.shape[1]
        tiling = self._tiling(Shape(rows, features, depth))
        assert 'RESIDUAL' not in macros or moments.part_columns == tiling.features
        blocks = tiling.blocks(rows, features)
        self._kernel.made_for(
            {**tiling.defines(), **macros}, blocks, tiling.threads(), tiling.shared_bytes(),
            tiling.cluster,
        ).launch(
            (
                TensorTiles(x, tiling.rows, _DEPTH),
                TensorTiles(layer.weight, tiling.features // tiling.cluster, _DEPTH),
                layer.bias, layer.sums, moments.values, out, rows, features, depth, eps,
            ),
            early=True,
        )  # fmt: skip

    def _tiling(self, shape: Shape) -> Tiling:
        if shape not in self._tilings:
            self._tilings[shape] = choose_tiling(shape, self._processors)
        return self._tilings[shape]

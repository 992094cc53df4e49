"""A linear layer with a long K and a residual on Hopper GPUs, see hopper_prefill_down.cu."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from .hopper_prefill_product import DEPTH, THREADS, Tiling, tokens_of_tile
from .nvrtc import ShapedKernel, TensorTiles

_SOURCE = Path(__file__).with_name('hopper_prefill_down.cu')
_MAX_TOKENS = {128: 256, 256: 192}  # of a tile of so many features: four stages, and registers
_SPLITS = (1, 2)  # larger clusters leave multiprocessors idle
# Roughly, what blocks of a cluster move through shared memory of others, and what a tile costs
# besides: its first operands, the exchange, the residual.
_EXCHANGED_BYTES_PER_CLOCK, _TILE_CLOCKS = 32, 2500


def prefill_down_misfit(hidden: int, width: int) -> str | None:
    """Return why the kernel cannot take (``width``, ``hidden``) weights, or None if it can."""
    if hidden % DEPTH or width % max(_MAX_TOKENS):
        return (
            f'the MLP width {hidden} must be a multiple of {DEPTH}, '
            f'the width {width} of {max(_MAX_TOKENS)}'
        )
    return None


@dataclass(frozen=True)
class SplitTiling:
    """How a product is cut up.

    Args:
        tile: features and tokens of a block.
        split: blocks of a cluster, each with a part of K.
    """

    tile: Tiling
    split: int

    def defines(self) -> dict[str, int]:
        """Return the macros that the source is compiled with."""
        return {**self.tile.defines(), 'SPLIT': self.split}

    def blocks(self, rows: int, features: int) -> int:
        """Return the grid: a cluster per tile."""
        return self.tile.units(rows, features) * self.split

    def clocks(self, rows: int, features: int, depth: int, processors: int) -> int:
        """Return what the product costs, in clocks of a multiprocessor."""
        turns = -(-self.tile.units(rows, features) // max(processors // self.split, 1))
        steps = -(-depth // (DEPTH * self.split))
        sent_bytes = self.tile.features * self.tile.tokens * 4 * (self.split - 1) // self.split
        end = sent_bytes // _EXCHANGED_BYTES_PER_CLOCK + _TILE_CLOCKS
        return turns * (steps * self.tile.step_clocks() + end)


def choose_tiling(rows: int, features: int, depth: int, processors: int) -> SplitTiling:
    """Return the tiling with the fewest clocks."""
    tilings = []
    for (tile_features, most), split in product(_MAX_TOKENS.items(), _SPLITS):
        fewest = -(-rows // most)
        for tiles in range(fewest, fewest + 8):
            tile = Tiling(tile_features, tokens_of_tile(rows, tiles), 1)
            tilings.append(SplitTiling(tile, split))
    return min(tilings, key=lambda tiling: tiling.clocks(rows, features, depth, processors))


class HopperPrefillDown:
    """The kernels of one device, compiled when a number of rows first needs them.

    The weight has its rows in the order of :func:`.hopper_vision_product.order_features`.
    """

    def __init__(self, device: torch.device) -> None:
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernel = ShapedKernel(_SOURCE, 'prefill_down', device)

    def __call__(
        self, x: Tensor, weight: Tensor, residual: Tensor, out: Tensor,
        tiling: SplitTiling | None = None,
    ) -> None:  # fmt: skip
        """Write ``x @ weight.T + residual``; ``out`` may be ``residual``.

        Args:
            tiling: another one than :func:`choose_tiling`'s.
        Raises:
            BackendError: the source does not compile here.
        """
        (rows, depth), features = x.shape, weight.shape[0]
        tiling = tiling or choose_tiling(rows, features, depth, self._processors)
        self._kernel.made_for(
            tiling.defines(), tiling.blocks(rows, features), THREADS, tiling.tile.shared_bytes(),
            tiling.split,
        ).launch(
            (
                TensorTiles(x, tiling.tile.tokens, DEPTH),
                TensorTiles(weight, tiling.tile.box_rows(), DEPTH),
                residual, out, rows, features, depth,
            ),
            early=True,
        )  # fmt: skip

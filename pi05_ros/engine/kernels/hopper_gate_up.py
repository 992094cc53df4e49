"""Row scale, gate and up projection and GEGLU on Hopper's tensor cores, see hopper_gate_up.cu."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .gate_up import launch_row_scale
from .hopper_prefill_product import DEPTH, THREADS, Tiling, pairs_or_none, tokens_of_tile
from .nvrtc import ShapedKernel, TensorTiles

_SOURCE = Path(__file__).with_name('hopper_gate_up.cu')
_FEATURES = 256  # of a tile
_MAX_TOKENS = 200  # of a tile: more do not fit into the registers
# What a tile costs besides its products, roughly: they begin again with an empty pipeline.
_TILE_CLOCKS = 500


def gate_up_misfit(hidden: int, width: int) -> str | None:
    """Return why the kernel cannot take (2 ``hidden``, ``width``) weights, or None if it can."""
    if 2 * hidden % _FEATURES or width % DEPTH:
        return (
            f'the width {width} must be a multiple of {DEPTH}, '
            f'the MLP width {hidden} of {_FEATURES // 2}'
        )
    return None


def choose_tiling(rows: int, features: int, depth: int, processors: int) -> Tiling:
    """Return the tiling that takes a block with the most tiles the fewest clocks.

    An even number of neighbouring tiles of tokens forms clusters of two.
    """
    fewest = -(-rows // _MAX_TOKENS)
    tilings = []
    for tiles in range(fewest, 2 * fewest + 1):
        tokens = tokens_of_tile(rows, tiles)
        tilings.append(Tiling(_FEATURES, tokens, pairs_or_none(rows, tokens)))

    def clocks(tiling: Tiling) -> int:
        units, resident = tiling.units(rows, features), max(processors // tiling.cluster, 1)
        return -(-units // resident) * (depth // DEPTH * tiling.step_clocks() + _TILE_CLOCKS)

    return min(tilings, key=clocks)


def grid(tiling: Tiling, rows: int, features: int, processors: int) -> int:
    """Return the blocks: one per tile, but no more than there are multiprocessors."""
    units = tiling.units(rows, features)
    return min(units, processors // tiling.cluster) * tiling.cluster


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Return (2 F, W): gate and up rows in the order of the kernel.

    Row 128 g + 64 p + 16 w + 8 e + 2 q + s of a tile is gate (e = 0) or up of its unit
    64 g + 16 w + 4 q + 2 p + s: a thread has gate and up of a unit, and writes those of both p and
    s side by side.
    """
    count, width = gate.shape
    both = torch.stack((gate, up)).view(2, -1, 2, 4, 4, 2, 2, width)  # e, tile, g, w, q, p, s
    return both.permute(1, 2, 5, 3, 0, 4, 6, 7).reshape(2 * count, width)


class HopperGateUp:
    """The kernels of one device, compiled when a number of rows first needs them.

    The weight has its rows in the order of :func:`interleave`.
    """

    def __init__(self, device: torch.device) -> None:
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernel = ShapedKernel(_SOURCE, 'gate_up', device)

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, scale: Tensor, out: Tensor,
        tiling: Tiling | None = None,
    ) -> None:  # fmt: skip
        """Do what :func:`~pi05_ros.engine.kernels.gate_up.gate_up` does.

        Whoever wrote x must be complete before the kernel before this one begins: x is read while
        the scale is computed, which nothing else waits for.

        Args:
            tiling: another one than :func:`choose_tiling`'s.
        Raises:
            BackendError: the source does not compile here.
        """
        (rows, depth), features = x.shape, weight.shape[0]
        tiling = tiling or choose_tiling(rows, features, depth, self._processors)
        blocks = grid(tiling, rows, features, self._processors)
        launch_row_scale(x, eps, scale, early_next=True)
        self._kernel.made_for(
            tiling.defines(), blocks, THREADS, tiling.shared_bytes(), tiling.cluster
        ).launch(
            (
                TensorTiles(x, tiling.tokens, DEPTH),
                TensorTiles(weight, tiling.box_rows(), DEPTH),
                scale, out, rows, features, depth,
            ),
            early=True,
        )  # fmt: skip

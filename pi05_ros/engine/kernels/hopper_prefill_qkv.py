"""Row scale, projection to q, k and v and RoPE on Hopper GPUs, see hopper_prefill_qkv.cu."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .gate_up import launch_row_scale
from .hopper_prefill_product import (
    DEPTH,
    MAX_TOKENS,
    THREADS,
    Tiling,
    pairs_or_none,
    tokens_of_tile,
)
from .nvrtc import ShapedKernel, TensorTiles

_SOURCE = Path(__file__).with_name('hopper_prefill_qkv.cu')
_DIM = 256
_FEATURES = 128  # of a tile


def prefill_qkv_misfit(head_dim: int, width: int) -> str | None:
    """Return why the kernel cannot take a layer's q, k and v, or None if it can."""
    if head_dim != _DIM or width % DEPTH:
        return (
            f'q, k and v need heads of {_DIM} columns, not {head_dim}, and a width that is a '
            f'multiple of {DEPTH}, not {width}'
        )
    return None


def choose_tiling(rows: int, features: int, processors: int) -> Tiling:
    """Return the tiling with the fewest tokens per block of all that take one turn.

    Where none does, it is that of the fewest turns. An even number of neighbouring tiles of tokens
    forms clusters of two.
    """
    feature_tiles, turns = features // _FEATURES, 1
    while True:
        tokens = tokens_of_tile(rows, max(turns * processors // feature_tiles, 1))
        if tokens <= MAX_TOKENS:
            return Tiling(_FEATURES, tokens, pairs_or_none(rows, tokens))
        turns += 1


def order_qkv(weight: Tensor) -> Tensor:
    """Return ((heads + 2) D, W) with the rows of each head in the order of the kernel.

    Row 128 b + 16 j + 8 e + r of a head is its column 128 e + 64 b + 8 j + r: both halves of a
    rotation pair are 8 rows apart, and a block has 64 neighbouring pairs.
    """
    parts = weight.view(-1, 2, 2, 8, 8, weight.shape[1])  # head, e, b, j, r
    return parts.permute(0, 2, 3, 1, 4, 5).reshape(weight.shape)


class HopperPrefillQkv:
    """The kernels of one device, compiled when a number of rows first needs them.

    The weight has its rows in the order of :func:`order_qkv`.
    """

    def __init__(self, device: torch.device) -> None:
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernel = ShapedKernel(_SOURCE, 'prefill_qkv', device)

    def __call__(
        self, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: Tensor,
        q: Tensor | None, keys: Tensor, values: Tensor, tiling: Tiling | None = None,
    ) -> None:  # fmt: skip
        """Do what :func:`~pi05_ros.engine.kernels.rope.qkv_rope_plain` does.

        Whoever wrote x must be complete before the kernel before this one begins: x is read while
        the scale is computed, which nothing else waits for.

        Args:
            tiling: another one than :func:`choose_tiling`'s.
        Raises:
            BackendError: the source does not compile here.
        """
        (rows, depth), features = x.shape, weight.shape[0]
        tiling = tiling or choose_tiling(rows, features, self._processors)
        blocks = tiling.units(rows, features) * tiling.cluster
        launch_row_scale(x, eps, scale, early_next=True)
        self._kernel.made_for(
            tiling.defines(), blocks, THREADS, tiling.shared_bytes(), tiling.cluster
        ).launch(
            (
                TensorTiles(x, tiling.tokens, DEPTH),
                TensorTiles(weight, tiling.box_rows(), DEPTH),
                scale, cos, sin, keys if q is None else q, keys, values, rows, features, depth,
            ),
            early=True,
        )  # fmt: skip

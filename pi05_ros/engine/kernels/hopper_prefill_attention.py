"""Attention of the prefix on Hopper's tensor cores, see hopper_prefill_attention.cu."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import ShapedKernel, TensorTiles

_SOURCE = Path(__file__).with_name('hopper_prefill_attention.cu')
_DIM = 256
_TILE_ROWS, _TILE_COLUMNS = 64, 64  # of queries, keys and values
_THREADS = 384
# The queries and six stages of keys or values, beginning at a multiple of 1024 bytes.
_SHARED_BYTES = 7 * _TILE_ROWS * _DIM * 2 + 1024
_LOG2_E = 1.4426950408889634  # exp2 is one instruction


def prefill_attention_misfit(head_dim: int) -> str | None:
    """Return why the kernel cannot take heads of a size, or None if it can."""
    return None if head_dim == _DIM else f'it is made for heads of {_DIM} columns, not {head_dim}'


class HopperPrefillAttention:
    """The kernel of one device, compiled when it is first called."""

    def __init__(self, device: torch.device) -> None:
        self._kernel = ShapedKernel(_SOURCE, 'prefill_attention', device)

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, count: Tensor, scale: float, out: Tensor
    ) -> None:
        """Do what :func:`~pi05_ros.engine.kernels.prefill_attention.prefill_attention` does.

        Args:
            scale: greater than 0.
        Raises:
            BackendError: the source does not compile here.
        """
        rows, heads = q.numel() // _DIM, q.shape[1] // _DIM
        tiles = [
            TensorTiles(matrix, _TILE_ROWS, _TILE_COLUMNS)
            for matrix in (q.view(rows, _DIM), keys, values)
        ]
        blocks = -(-rows // _TILE_ROWS)
        kernel = self._kernel.made_for({}, blocks, _THREADS, _SHARED_BYTES)
        kernel.launch((*tiles, count, scale * _LOG2_E, out, heads), early=True)

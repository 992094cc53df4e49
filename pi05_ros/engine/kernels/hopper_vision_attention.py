"""Vision's attention on Hopper's tensor cores, see hopper_vision_attention.cu."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import ShapedKernel, TensorTiles

_SOURCE = Path(__file__).with_name('hopper_vision_attention.cu')
_DIM, _TOKENS = 72, 256
_QUERIES = 64  # of a block
_WIDE, _NARROW = 64, 16  # columns of the tiles that a head's rows lie in
_THREADS = 256
# Queries, keys and values, what the warpgroups give each other, beginning at a multiple of 1024.
_SHARED_BYTES = (_QUERIES + 2 * _TOKENS) * 2 * (_WIDE + _NARROW) + 2 * 9 * 1024 + 1024
_ALONE_BYTES = 120 * 1024  # more than half of a multiprocessor's
_LOG2_E = 1.4426950408889634  # exp2 is one instruction


def vision_attention_misfit(head_dim: int, tokens_per_view: int) -> str | None:
    """Return why the kernel cannot take heads and views of a size, or None if it can."""
    if (head_dim, tokens_per_view) == (_DIM, _TOKENS):
        return None
    return (
        f'it is made for heads of {_DIM} columns and {_TOKENS} tokens per view, '
        f'not {head_dim} and {tokens_per_view}'
    )


@dataclass(frozen=True)
class Tiling:
    """How the kernel is launched.

    Args:
        blocks: of the grid: 64 queries of a head each.
        cluster: neighbouring blocks that share copies: 1, 2 or 4.
        together: blocks that a multiprocessor runs at once: 1 or 2. One has more registers.
    """

    blocks: int
    cluster: int
    together: int

    def defines(self, num_heads: int) -> dict[str, int]:
        """Return the macros that the source is compiled with."""
        return {'HEADS': num_heads, 'CLUSTER': self.cluster, 'BLOCKS': self.together}

    def shared_bytes(self) -> int:
        """Return the shared memory of a block.

        A block that is to be alone takes so much that no other fits beside it: two could begin on
        one multiprocessor while others still run the kernel before.
        """
        return _SHARED_BYTES if self.together == 2 else _ALONE_BYTES


def choose_tiling(rows: int, num_heads: int, processors: int) -> Tiling:
    """Return the tiling of ``rows`` tokens: one block per multiprocessor where that suffices.

    Two blocks share copies; few blocks do not wait for each other instead.
    """
    blocks = rows // _QUERIES * num_heads
    return Tiling(blocks, 1 if 2 * blocks <= processors else 2, 1 if blocks <= processors else 2)


class HopperVisionAttention:
    """The kernels of one device, compiled when a shape first needs them.

    They start before the kernel before them has completed, and let the next one do so.
    """

    def __init__(self, device: torch.device) -> None:
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernel = ShapedKernel(_SOURCE, 'vision_attention', device)

    def __call__(self, qkv: Tensor, num_heads: int, out: Tensor) -> None:
        """Do what :func:`~pi05_ros.engine.kernels.vision_attention.vision_attention` does.

        Raises:
            BackendError: the source does not compile here.
        """
        tiling = choose_tiling(qkv.shape[0], num_heads, self._processors)
        self._kernel.made_for(
            tiling.defines(num_heads),
            tiling.blocks,
            _THREADS,
            tiling.shared_bytes(),
            tiling.cluster,
        ).launch(
            (
                TensorTiles(qkv, _QUERIES, _WIDE),
                TensorTiles(qkv, _QUERIES, _NARROW),
                _DIM**-0.5 * _LOG2_E,
                out,
            ),
            early=True,
        )

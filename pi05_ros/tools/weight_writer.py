"""Random weights for a whole model, streamed to ``model.safetensors``.

The same seed gives the same bytes on every machine: each piece of a tensor is drawn on the CPU
from a generator of its own, keyed by seed, tensor and piece, so neither order nor threads matter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pi05_ros.model.config import Pi05Config
from pi05_ros.model.errors import CheckpointError
from pi05_ros.model.names import EMBEDDING, UNUSED_HEAD, expected_shapes

_PIECE_ELEMENTS = 1 << 24
_STORED_NAMES = {torch.float32: 'F32', torch.bfloat16: 'BF16'}
_SPREAD = 0.1  # standard deviation of biases and of norm weights


@dataclass(frozen=True)
class Distribution:
    """Uniform values of a given mean and standard deviation.

    Args:
        gate_mean: mean of the last third instead, for the bias of an adaptive norm.
    """

    mean: float
    std: float
    gate_mean: float | None = None


@dataclass(frozen=True)
class _Piece:
    """Elements ``start`` to ``stop`` of one flattened tensor; ``offset``: of all before them."""

    offset: int
    name: str
    start: int
    stop: int
    size: int
    distribution: Distribution


def write_random_weights(path: Path, config: Pi05Config, dtype: torch.dtype, seed: int) -> None:
    """Write every tensor of :func:`expected_shapes`; needs a few hundred MB of memory.

    Args:
        path: the file; it appears only once it is complete.
        config: the dimensions.
        dtype: float32 or bfloat16, of every tensor.
        seed: determines every value.
    Raises:
        CheckpointError: the disk is too small.
    """
    shapes = dict(sorted(expected_shapes(config).items()))
    header = _header(shapes, dtype, seed)
    needed = len(header) + sum(map(math.prod, shapes.values())) * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise CheckpointError(
            f'{path.parent} has {free / 1e9:.1f} GB free, the weights need {needed / 1e9:.1f} GB'
        )
    partial = path.with_name(path.name + '.part')
    workers = os.cpu_count() or 1
    pieces = _pieces(shapes, config)
    try:
        with partial.open('wb', buffering=0) as file, ThreadPoolExecutor(workers) as pool:
            file.write(header)

            def write(piece: _Piece) -> None:
                start = len(header) + piece.offset * dtype.itemsize
                _write_at(file.fileno(), start, _draw(piece, dtype, seed))

            try:
                for _ in pool.map(write, pieces):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def distribution_of(name: str, shape: tuple[int, ...], config: Pi05Config) -> Distribution:
    """Return what a tensor is drawn from, so that activations keep their size through the layers.

    Matrices keep the variance of their input; what is added to a residual stream is smaller the
    deeper the stack; adaptive norms depend weakly on the flow time and let their branch through,
    so that actions depend on images and prompt.
    """
    if name.endswith('.dense.bias'):
        return Distribution(0.0, _SPREAD, gate_mean=1.0)
    if name.endswith('.bias'):
        return Distribution(0.0, _SPREAD)
    if len(shape) == 1:  # LayerNorm stores the factor itself, RMSNorm its distance from one
        return Distribution(1.0 if 'vision_tower' in name else 0.0, _SPREAD)
    if name.endswith('position_embedding.weight'):
        return Distribution(0.0, 0.5)
    fan_in = math.prod(shape[1:])
    if name in (EMBEDDING, UNUSED_HEAD):  # the prompt is scaled by sqrt(width) again
        return Distribution(0.0, fan_in**-0.5)
    scale = 1.0
    if name.endswith('.dense.weight'):
        scale = 0.3
    elif name.endswith(('o_proj.weight', 'down_proj.weight', 'out_proj.weight', 'fc2.weight')):
        stack = config.vision if 'vision_tower' in name else config.vlm
        if not name.startswith('action_'):
            scale = (2 * stack.depth) ** -0.5
    return Distribution(0.0, scale * fan_in**-0.5)


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> bytes:
    """Return the start of a safetensors file: the header's length, then the header as JSON."""
    entries: dict[str, object] = {
        '__metadata__': {'format': 'pt', 'source': f'random weights, seed {seed}'}
    }
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        stored = {'dtype': _STORED_NAMES[dtype], 'shape': shape, 'data_offsets': (start, end)}
        entries[name] = stored
    text = json.dumps(entries, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # the format asks for data aligned to eight bytes
    return len(text).to_bytes(8, 'little') + text


def _pieces(shapes: dict[str, tuple[int, ...]], config: Pi05Config) -> list[_Piece]:
    pieces, offset = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        distribution = distribution_of(name, shape, config)
        for start in range(0, size, _PIECE_ELEMENTS):
            stop = min(size, start + _PIECE_ELEMENTS)
            pieces.append(_Piece(offset + start, name, start, stop, size, distribution))
        offset += size
    return pieces


def _draw(piece: _Piece, dtype: torch.dtype, seed: int) -> Tensor:
    """Return the values of one piece, (n,) of ``dtype``."""
    key = hashlib.sha256(f'{seed}/{piece.name}/{piece.start}'.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], 'little') >> 1)
    half_width = piece.distribution.std * 3**0.5
    values = torch.empty(piece.stop - piece.start)
    values.uniform_(-half_width, half_width, generator=generator).add_(piece.distribution.mean)
    if piece.distribution.gate_mean is not None:
        values[max(0, 2 * piece.size // 3 - piece.start) :] += piece.distribution.gate_mean
    return values.to(dtype)


def _write_at(descriptor: int, start: int, values: Tensor) -> None:
    """Write the bytes of a tensor into an open file, from byte ``start`` on."""
    left = values.view(torch.uint8).numpy().data
    while left:
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written

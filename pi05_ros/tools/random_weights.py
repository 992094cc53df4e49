"""Random weights for a whole model, drawn on the device that runs it: for benchmarks.

The distributions are those of :mod:`.weight_writer`, which writes a checkpoint; the values are
not the same, as a GPU draws other numbers than the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pi05_ros.model.config import Pi05Config
from pi05_ros.model.names import UNUSED_HEAD, UNUSED_NORM, expected_shapes
from pi05_ros.model.precision import parameter_dtype

from .weight_writer import distribution_of


def random_state(
    config: Pi05Config, device: str, precision: str = 'bfloat16', seed: int = 0
) -> dict[str, Tensor]:
    """Return every tensor that inference uses, by openpi key name, on ``device``.

    Args:
        precision: 'float32' or 'bfloat16'; each tensor has the dtype that the model gives it.
        seed: the same seed gives the same values on the same kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        if name in (UNUSED_NORM, UNUSED_HEAD):
            continue
        drawn = distribution_of(name, shape, config)
        tensor = torch.empty(shape, dtype=parameter_dtype(name, precision), device=device)
        tensor.normal_(generator=generator).mul_(drawn.std).add_(drawn.mean)
        if drawn.gate_mean is not None:
            tensor[2 * shape[0] // 3 :] += drawn.gate_mean
        state[name] = tensor
    return state

"""Random weights of a model's dimensions, made where they are needed: for measuring and tests."""

from __future__ import annotations

import math

import torch

from pi05_ros.model.config import Pi05Config
from pi05_ros.model.names import UNUSED_HEAD, UNUSED_NORM, expected_shapes
from pi05_ros.model.precision import parameter_dtype


def random_state(
    config: Pi05Config, device: str, precision: str = 'bfloat16', seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return every tensor that inference uses, by openpi key name, on ``device``.

    Matrices keep the size of what passes through them, so that activations stay in range through
    all layers and no layer is numerically idle.
    """
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        if name in (UNUSED_NORM, UNUSED_HEAD):
            continue
        scale, offset = _scale_and_offset(name, shape)
        tensor = torch.empty(shape, dtype=parameter_dtype(name, precision), device=device)
        tensor.normal_(generator=generator)
        state[name] = tensor.mul_(scale).add_(offset)
    return state


def _scale_and_offset(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if len(shape) > 1:
        fan_in = math.prod(shape[1:])
        # The embedding is a table, not a product: its rows are scaled by sqrt(width) in the model.
        return (1.0 if 'position' in name else fan_in**-0.5), 0.0
    is_layer_norm = 'layer_norm' in name or 'post_layernorm.weight' in name
    return 0.1, 1.0 if is_layer_norm and name.endswith('weight') else 0.0

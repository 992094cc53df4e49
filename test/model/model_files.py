"""Small models and checkpoint directories with known content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pi05_ros.model.checkpoint import load_state, open_checkpoint
from pi05_ros.model.config import GemmaConfig, Pi05Config, VisionConfig
from pi05_ros.model.names import UNUSED_HEAD, UNUSED_NORM, expected_shapes
from pi05_ros.tools.weight_writer import write_random_weights

GOLDEN_DIR = Path(__file__).parents[1] / 'data' / 'golden' / 'pi05_tiny'


def small_config(**changes: Any) -> Pi05Config:
    """Return a model of four image tokens per view, with two K/V heads and uneven sizes."""
    dims: dict[str, Any] = {
        'vision': VisionConfig(24, 2, 40, num_heads=3, image_px=28),
        'vlm': GemmaConfig(32, 3, 48, num_heads=4, num_kv_heads=2, head_dim=8),
        'expert': GemmaConfig(16, 3, 24, num_heads=6, num_kv_heads=2, head_dim=8),
        'vocab_size': 64,
        'action_dim': 7,
        'action_horizon': 5,
    }
    return Pi05Config(**(dims | changes))


def golden_state() -> dict[str, Tensor]:
    """Return the golden weights with every tensor that openpi writes."""
    state = load_state(open_checkpoint(GOLDEN_DIR))
    config = open_checkpoint(GOLDEN_DIR).config
    state[UNUSED_NORM] = torch.zeros(config.vlm.width)
    state[UNUSED_HEAD] = torch.zeros(config.vocab_size, config.expert.width)
    assert state.keys() == expected_shapes(config).keys()
    return state


def write_checkpoint(path: Path, state: dict[str, Tensor], **config: Any) -> Path:
    """Write model.safetensors and a config.json of the golden dimensions."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, path / 'model.safetensors'
    )
    dims = json.loads((GOLDEN_DIR / 'dims.json').read_text())
    (path / 'config.json').write_text(json.dumps({'dims': dims} | config))
    return path


def write_random(path: Path, config: Pi05Config, seed: int = 0) -> Path:
    """Write a checkpoint of random weights with the given dimensions."""
    path.mkdir(parents=True)
    write_random_weights(path / 'model.safetensors', config, torch.float32, seed)
    (path / 'dims.json').write_text(json.dumps(config.to_dims()))
    return path

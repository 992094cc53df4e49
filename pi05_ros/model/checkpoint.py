"""Checkpoint directories: openpi, lerobot, and golden data. Weights are safetensors only.

The layouts:

- ``openpi``   config.json and model.safetensors, as openpi's converter writes them
- ``lerobot``  config.json with ``"type": "pi05"`` and model.safetensors with ``model.`` names
- ``golden``   dims.json and model.safetensors

A config.json may hold ``"dims"`` in the form of dims.json, for a model that no variant describes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .config import GEMMA_VARIANTS, GemmaConfig, Pi05Config
from .errors import CheckpointError, ConfigError
from .files import local_path, read_json_object
from .names import expected_shapes, model_name
from .pi05 import Pi05Model
from .weights import check_names, read_header, read_state

__all__ = [
    'Checkpoint',
    'check_weights',
    'expected_shapes',
    'load_model',
    'load_state',
    'open_checkpoint',
]

Layout = Literal['openpi', 'lerobot', 'golden']
WEIGHTS_FILE = 'model.safetensors'
_HASH_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose config was read; its weights are still on the disk.

    Args:
        path: the directory.
        layout: 'openpi', 'lerobot' or 'golden'.
        config: the dimensions.
        raw_config: config.json (or dims.json), as parsed.
        weights_path: the safetensors file.
    """

    path: Path
    layout: Layout
    config: Pi05Config
    raw_config: dict[str, Any]
    weights_path: Path

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the weights file. The first use reads the whole file."""
        digest = hashlib.sha256()
        with self.weights_path.open('rb') as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find out what a directory holds, and read its dimensions.

    Raises:
        CheckpointError: no directory, no weights in it, or a config that cannot be read.
        ConfigError: the dimensions are missing, unknown or contradict each other.
    """
    path = local_path(path, CheckpointError)
    try:
        return _open(path)
    except OSError as cause:
        raise CheckpointError(f'checkpoint {path} cannot be read: {cause}') from cause


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(
            f'checkpoint {path} does not exist; give a local directory with {WEIGHTS_FILE}'
        )
    if not path.is_dir():
        raise CheckpointError(
            f'checkpoint {path} is a file; give the directory that holds {WEIGHTS_FILE}'
        )
    weights_path = path / WEIGHTS_FILE
    if not weights_path.is_file():
        raise CheckpointError(_no_weights(path))
    layout, raw, config = _read_config(path)
    return Checkpoint(path, layout, config, raw, weights_path)


def check_weights(checkpoint: Checkpoint) -> None:
    """Check names, shapes and dtypes of the weights without reading their values.

    Raises:
        CheckpointError: the file is corrupt, or its tensors do not fit; lists every fault.
    """
    path = checkpoint.weights_path
    check_names(path, read_header(path), checkpoint.config, checkpoint.layout)


def load_state(
    checkpoint: Checkpoint, device: str = 'cpu', precision: str | None = None
) -> dict[str, Tensor]:
    """Return the tensors that inference uses, under openpi's names, checked.

    The token embedding is under ``…paligemma.lm_head.weight``.

    Args:
        checkpoint: from :func:`open_checkpoint`.
        device: where the tensors go, such as 'cpu' or 'cuda:0'.
        precision: 'float32' or 'bfloat16' casts each tensor to its own (``precision.py``);
            None leaves the dtypes as stored.
    Raises:
        CheckpointError: the file is corrupt, or its tensors do not fit; lists every fault.
    """
    return read_state(
        checkpoint.weights_path, checkpoint.config, checkpoint.layout, device, precision
    )


def load_model(
    checkpoint: Checkpoint, device: str = 'cpu', precision: str = 'bfloat16'
) -> Pi05Model:
    """Return the oracle with the checkpoint's weights; nothing in it is initialised otherwise.

    Raises:
        CheckpointError: see :func:`load_state`.
    """
    state = load_state(checkpoint, device, precision)
    with torch.device('meta'):
        model = Pi05Model(checkpoint.config)
    renamed = {model_name(name): tensor for name, tensor in state.items()}
    model.load_state_dict(renamed, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _no_weights(path: Path) -> str:
    """Say why there is nothing to load, as exactly as the directory's content allows."""
    start = f'no {WEIGHTS_FILE} in {path}'
    if (path / 'params').is_dir():
        return (
            f'{start}: this is a JAX checkpoint; convert it with openpi '
            'examples/convert_jax_model_to_pytorch.py'
        )
    if (path / f'{WEIGHTS_FILE}.index.json').is_file():
        return f'{start}: it is split into several files; join them into one {WEIGHTS_FILE}'
    pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in ('.bin', '.pt', '.pth')]
    if pickles:
        return f'{start}, only {", ".join(pickles)}: convert to safetensors; pickle is not loaded'
    return f'{start}; give the directory that holds it'


def _read_config(path: Path) -> tuple[Layout, dict[str, Any], Pi05Config]:
    config_path, dims_path = path / 'config.json', path / 'dims.json'
    if config_path.is_file():
        raw = read_json_object(config_path, CheckpointError)
        dims = raw.get('dims')
        if dims is None and dims_path.is_file():
            dims = read_json_object(dims_path, CheckpointError)
        if 'type' in raw:
            return 'lerobot', raw, _lerobot_config(raw, dims, config_path)
        return 'openpi', raw, _openpi_config(raw, dims, config_path)
    if dims_path.is_file():
        raw = read_json_object(dims_path, CheckpointError)
        return 'golden', raw, Pi05Config.from_dims(raw, str(dims_path))
    raise CheckpointError(f'neither config.json nor dims.json in {path}: dimensions are unknown')


def _openpi_config(raw: Mapping[str, Any], dims: Any, where: Path) -> Pi05Config:
    return _config(raw, dims, {'action_dim': 'action_dim'}, 'action_horizon', where)


def _lerobot_config(raw: Mapping[str, Any], dims: Any, where: Path) -> Pi05Config:
    if raw['type'] != 'pi05':
        raise CheckpointError(f"{where}: type is {raw['type']!r}, pi05_ros runs 'pi05'")
    names = {'action_dim': 'max_action_dim', 'max_prompt_tokens': 'tokenizer_max_length'}
    return _config(raw, dims, names, 'chunk_size', where)


def _config(
    raw: Mapping[str, Any], dims: Any, names: Mapping[str, str], horizon_key: str, where: Path
) -> Pi05Config:
    """Join the variants (or ``dims``) with the numbers that config.json gives by name.

    A variant that is not named is openpi's default: the shapes of all weights are checked against
    it. The horizon is in no shape, so without ``dims`` it must be there.
    """
    if dims is not None:
        config = Pi05Config.from_dims(dims, f'{where}: dims')
    else:
        full = Pi05Config.full()
        config = replace(
            full,
            vlm=_variant(raw, 'paligemma_variant', 'gemma_2b', where),
            expert=_variant(raw, 'action_expert_variant', 'gemma_300m', where),
            vision=replace(full.vision, image_px=_image_px(raw, full.vision.image_px, where)),
        )
        _number(raw, horizon_key, where)
    names = {**names, 'action_horizon': horizon_key}
    numbers: dict[str, Any] = {
        ours: _number(raw, key, where) for ours, key in names.items() if key in raw
    }
    return replace(config, **numbers)


def _number(raw: Mapping[str, Any], key: str, where: Path) -> int:
    number = raw.get(key)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        found = 'missing' if number is None else repr(number)
        raise ConfigError(f'{where}: {key} must be a positive integer, it is {found}')
    return number


def _variant(raw: Mapping[str, Any], key: str, default: str, where: Path) -> GemmaConfig:
    name = raw.get(key, default)
    if not isinstance(name, str) or name not in GEMMA_VARIANTS:
        known = ', '.join(sorted(GEMMA_VARIANTS))
        raise ConfigError(f'{where}: {key} is {name!r}; known: {known}')
    return GEMMA_VARIANTS[name]


def _image_px(raw: Mapping[str, Any], default_px: int, where: Path) -> int:
    """Read lerobot's ``image_resolution``; openpi's config has no such key."""
    resolution = raw.get('image_resolution', [default_px, default_px])
    sides = resolution if isinstance(resolution, list) else []
    if not sides or any(side != sides[0] for side in sides):
        raise ConfigError(f'{where}: image_resolution must be [px, px], it is {resolution!r}')
    return _number({'image_resolution': resolution[0]}, 'image_resolution', where)

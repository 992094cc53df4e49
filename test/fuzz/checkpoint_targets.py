"""The files of a checkpoint directory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from target import Target, scratch, written

from pi05_ros.model.checkpoint import check_weights, load_state, open_checkpoint
from pi05_ros.model.config import GemmaConfig, Pi05Config, VisionConfig
from pi05_ros.model.errors import CheckpointError, ConfigError
from pi05_ros.model.names import expected_shapes
from pi05_ros.policy.errors import NormError, PromptError, RobotError, TokenizerError
from pi05_ros.policy.robot import RobotSpec, load_robot
from pi05_ros.policy.stats import load_stats
from pi05_ros.policy.tokenizer import PromptTokenizer
from pi05_ros.tools.random_checkpoint import franka_stats, train_tokenizer

from policy_files import lerobot_steps, write_lerobot  # isort: skip (test/policy)

SMALL = Pi05Config(
    vision=VisionConfig(4, 1, 4, num_heads=1, image_px=28),
    vlm=GemmaConfig(4, 1, 4, num_heads=1, num_kv_heads=1, head_dim=2),
    expert=GemmaConfig(4, 1, 4, num_heads=1, num_kv_heads=1, head_dim=2),
    vocab_size=8,
    action_dim=4,
    action_horizon=2,
)


@cache
def franka() -> RobotSpec:
    return load_robot('franka')


@cache
def tokenizer() -> PromptTokenizer:
    path = written('valid.model', train_tokenizer())
    return PromptTokenizer(path, max_tokens=200, vocab_size=512)


@cache
def small_weights() -> bytes:
    """Return all weights of :data:`SMALL`, zero."""
    shapes = expected_shapes(SMALL)
    return save({name: np.zeros(shape, np.float16) for name, shape in shapes.items()})


def read_config(data: bytes) -> None:
    path = written('config/config.json', data)
    weights = path.parent / 'model.safetensors'
    if not weights.exists():
        weights.write_bytes(small_weights())
    check_weights(open_checkpoint(path.parent))


def config_seeds() -> list[bytes]:
    common = {'action_dim': 4, 'action_horizon': 2}
    contents = [
        {**common, 'dims': SMALL.to_dims()},
        {**common, 'paligemma_variant': 'gemma_2b', 'action_expert_variant': 'gemma_300m'},
        {'type': 'pi05', 'chunk_size': 50, 'max_action_dim': 32, 'image_resolution': [224, 224],
         'tokenizer_max_length': 200},
    ]  # fmt: skip
    return [json.dumps(content).encode() for content in contents]


def read_weights(data: bytes) -> None:
    path = written('weights/model.safetensors', data)
    dims = path.parent / 'dims.json'
    if not dims.exists():
        dims.write_text(json.dumps(SMALL.to_dims()))
    load_state(open_checkpoint(path.parent))


def weights_seeds() -> list[bytes]:
    return [small_weights(), save({'a': np.ones((2, 3), np.float32), 'b': np.ones(0, np.int8)})]


def read_norm_stats(data: bytes) -> None:
    path = written('openpi/assets/franka/norm_stats.json', data)
    load_stats(path.parents[2], 'openpi', franka(), 32)


def norm_stats_seeds() -> list[bytes]:
    return [json.dumps({'norm_stats': franka_stats()}).encode()]


def lerobot_processors(mode: str) -> tuple[dict, dict]:
    """Return the content of two processor files that fit the robot franka."""
    before, after = lerobot_steps(mode)
    names = list(franka().action_names)
    relative = {'enabled': True, 'exclude_joints': ['finger'], 'action_names': names}
    before['steps'][2]['config'] = relative
    return before, after


@cache
def _lerobot(name: str) -> Path:
    """Return the directory of a lerobot checkpoint; the inputs of one target replace a file."""
    stats = franka_stats()
    steps = lerobot_processors('QUANTILES')
    return write_lerobot(scratch() / name, steps, stats['state'], stats['actions'])


def _load_lerobot(directory: Path) -> None:
    load_stats(directory, 'lerobot', franka(), 32)


def read_processor(data: bytes) -> None:
    directory = _lerobot('lerobot_processor')
    (directory / 'policy_preprocessor.json').write_bytes(data)
    _load_lerobot(directory)


def processor_seeds() -> list[bytes]:
    modes = ('QUANTILES', 'MEAN_STD')
    return [json.dumps(lerobot_processors(mode)[0]).encode() for mode in modes]


def read_lerobot_stats(data: bytes) -> None:
    directory = _lerobot('lerobot_stats')
    for path in directory.glob('*.safetensors'):
        path.write_bytes(data)
    _load_lerobot(directory)


def lerobot_stats_seeds() -> list[bytes]:
    path = next(_lerobot('lerobot_seeds').glob('*.safetensors'))
    return [path.read_bytes()]


def read_tokenizer(data: bytes) -> None:
    path = written('tokenizer.model', data)
    read = PromptTokenizer(path, max_tokens=200, vocab_size=512)
    read.check_state_dim(8)
    read.encode('pick up the bowl', None)


def tokenizer_seeds() -> list[bytes]:
    return [train_tokenizer()]


CHECKPOINT_ERRORS = (CheckpointError, ConfigError)
STATS_ERRORS = (NormError, RobotError)
TARGETS = {
    'config_json': Target(read_config, CHECKPOINT_ERRORS, config_seeds),
    'weights': Target(read_weights, CHECKPOINT_ERRORS, weights_seeds),
    'norm_stats': Target(read_norm_stats, STATS_ERRORS, norm_stats_seeds),
    'lerobot_processor': Target(read_processor, STATS_ERRORS, processor_seeds),
    'lerobot_stats': Target(read_lerobot_stats, STATS_ERRORS, lerobot_stats_seeds),
    'tokenizer': Target(read_tokenizer, (TokenizerError, PromptError), tokenizer_seeds),
}

"""lerobot's processor files: which normalisation, which prompt, which deltas a checkpoint expects.

``policy_preprocessor.json`` and ``policy_postprocessor.json`` list named steps, some with a
safetensors file of statistics. A step that changes numbers in a way not known here is an error.
Source: lerobot src/lerobot/processor (commit 7427f31).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pi05_ros.model.files import read_json_object
from pi05_ros.model.safetensors_header import HeaderError, read_checked_header

from .errors import NormError, RobotError
from .robot import RobotSpec
from .transforms import NormMode

PREPROCESSOR = 'policy_preprocessor.json'
POSTPROCESSOR = 'policy_postprocessor.json'
MAX_STATS_BYTES = 16 * 1024 * 1024

_PROMPT_STEP = 'pi05_prepare_state_tokenizer_processor_step'
# Steps that this package does in its own way, or that do nothing at inference.
_KNOWN_STEPS = {
    'rename_observations_processor',  # camera names: the robot file's cameras say it
    'to_batch_processor',
    'relative_actions_processor',
    'absolute_actions_processor',
    'normalizer_processor',
    'unnormalizer_processor',
    _PROMPT_STEP,
    'tokenizer_processor',
    'device_processor',
}
# A plain name, so that it stays in the directory of the checkpoint.
_STATE_FILE = re.compile(r'\w[\w.-]{0,200}\.safetensors')
_MODES: dict[str, NormMode] = {'QUANTILES': 'quantile', 'MEAN_STD': 'zscore'}


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of one feature: ``mode`` and, by name (``q01``, ``mean``, ...), arrays."""

    key: str
    mode: NormMode
    eps: float
    values: Mapping[str, np.ndarray]
    path: Path


@dataclass(frozen=True)
class Processors:
    """What the two processor files of a checkpoint say."""

    state: FeatureStats
    actions: FeatureStats
    state_in_prompt: bool
    relative: Mapping[str, Any]  # config of relative_actions_processor; empty where there is none
    path: Path

    def delta_mask(self, action_dim: int) -> tuple[bool, ...]:
        """Return which actions the checkpoint gives relative to the state.

        Source: lerobot relative_action_processor.py, RelativeActionsProcessorStep._build_mask.
        """
        if not self.relative.get('enabled', False):
            return (False,) * action_dim
        excluded = _lower_names(self.relative.get('exclude_joints'))
        names = _lower_names(self.relative.get('action_names'))
        absolute = [any(part in name for part in excluded) for name in names[:action_dim]]
        return tuple(not flag for flag in absolute) + (True,) * (action_dim - len(absolute))

    def check_robot(self, robot: RobotSpec) -> None:
        """Refuse a robot file that contradicts the checkpoint.

        Raises:
            RobotError: names the key of the robot file and the value that fits.
        """
        if self.state_in_prompt != robot.discrete_state:
            raise RobotError(
                f'robot {robot.name}: discrete_state is {robot.discrete_state}, but {self.path} '
                f'{"puts the state into" if self.state_in_prompt else "keeps the state out of"} '
                f'the prompt; set discrete_state: {str(self.state_in_prompt).lower()}'
            )
        expected = self.delta_mask(robot.action_dim)
        for dim, is_delta in zip(robot.actions, expected, strict=True):
            if dim.delta_to_state != is_delta:
                raise RobotError(
                    f'robot {robot.name}: action {dim.name} has delta_to_state '
                    f'{dim.delta_to_state}, but {self.path} has {is_delta} (use_relative_actions)'
                )


def _lower_names(names: list[str] | None) -> list[str]:
    return [name.lower() for name in names or [] if name]


def _relative_config(path: Path, steps: dict[str, dict[str, Any]]) -> Mapping[str, Any]:
    """Return the config of relative_actions_processor, with the types that its keys must have."""
    config = steps.get('relative_actions_processor', {}).get('config', {})
    if not isinstance(config.get('enabled', False), bool):
        raise NormError(f'{path}: relative_actions_processor: enabled must be true or false')
    for key in ('exclude_joints', 'action_names'):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise NormError(f'{path}: relative_actions_processor: {key} must be a list of names')
    return config


def read_processors(checkpoint_dir: Path) -> Processors:
    """Read both processor files and the statistics that they name.

    Raises:
        NormError: a file or statistic is missing or damaged, or a step is unknown.
    """
    before_path, before = _read_steps(checkpoint_dir, PREPROCESSOR)
    after_path, after = _read_steps(checkpoint_dir, POSTPROCESSOR)
    return Processors(
        state=_feature(before_path, before, 'normalizer_processor', 'observation.state', 'STATE'),
        actions=_feature(after_path, after, 'unnormalizer_processor', 'action', 'ACTION'),
        state_in_prompt=_PROMPT_STEP in before,
        relative=_relative_config(before_path, before),
        path=before_path,
    )


def _read_steps(checkpoint_dir: Path, name: str) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Return the steps of one file by their registry name."""
    path = checkpoint_dir / name
    if not path.is_file():
        raise NormError(
            f'{path} is missing; a lerobot checkpoint keeps its normalisation there. Copy it and '
            'the safetensors files that it names from the training output'
        )
    entries = read_json_object(path, NormError).get('steps')
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise NormError(f"{path}: expected the key 'steps' with a list of steps")
    steps: dict[str, dict[str, Any]] = {}
    for entry in entries:
        step = entry.get('registry_name', entry.get('class'))
        if not isinstance(step, str) or step not in _KNOWN_STEPS:
            known = sorted(_KNOWN_STEPS)
            raise NormError(f'{path}: step {step!r} is not supported; known: {known}')
        if step in steps:
            raise NormError(f'{path}: step {step!r} is given twice')
        if not isinstance(entry.get('config', {}), dict):
            raise NormError(f'{path}: the config of step {step!r} is not an object')
        steps[step] = entry
    return path, steps


def _feature(
    path: Path, steps: dict[str, dict[str, Any]], step: str, key: str, kind: str
) -> FeatureStats:
    """Return the statistics of one feature from the (un)normaliser step of one file."""
    if step not in steps:
        raise NormError(f'{path}: no step {step!r}; found: {sorted(steps)}')
    config = steps[step].get('config', {})
    norm_map = config.get('norm_map')
    mode = norm_map.get(kind) if isinstance(norm_map, dict) else None
    if not isinstance(mode, str) or mode not in _MODES:
        raise NormError(
            f'{path}: {step}: norm_map has {mode!r} for {kind}; supported: {sorted(_MODES)}'
        )
    if norm_map.get('VISUAL', 'IDENTITY') != 'IDENTITY':
        raise NormError(
            f'{path}: {step}: images are normalised by {norm_map["VISUAL"]!r}; expected IDENTITY'
        )
    only = config.get('normalize_observation_keys')
    if only is not None and not isinstance(only, list):
        raise NormError(f'{path}: {step}: normalize_observation_keys must be a list')
    if kind == 'STATE' and only is not None and key not in only:
        raise NormError(f'{path}: {step} leaves {key} unnormalised; found only: {only}')
    eps = config.get('eps', 1e-8)
    if not isinstance(eps, float) or not 0.0 <= eps < 1.0:
        raise NormError(f'{path}: {step}: eps must be a number from 0 to 1, found {eps!r}')
    state_file = _state_file(path, step, steps[step].get('state_file'))
    return FeatureStats(key, _MODES[mode], eps, _read_tensors(state_file, key), state_file)


def _state_file(path: Path, step: str, name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise NormError(
            f'{path}: {step} names no statistics (state_file); this checkpoint has none, as '
            'pi05_base: use a fine-tuned one, or save it with the statistics of its dataset'
        )
    if not _STATE_FILE.fullmatch(name):
        raise NormError(
            f'{path}: {step}: state_file {name[:80]!r} is no name of a safetensors file beside it'
        )
    state_file = path.parent / name
    if not state_file.is_file():
        raise NormError(f'{path}: {step} names {name}, which is missing in {path.parent}')
    return state_file


def _read_tensors(path: Path, key: str) -> dict[str, np.ndarray]:
    """Return the statistics ``<key>.<name>`` of one file by name."""
    size = path.stat().st_size
    if size > MAX_STATS_BYTES:
        raise NormError(f'{path}: {size} bytes, more than statistics can have ({MAX_STATS_BYTES})')
    prefix = f'{key}.'
    try:
        names = [name for name in read_checked_header(path) if name.startswith(prefix)]
        with safe_open(path, framework='numpy') as tensors:
            values = {name[len(prefix) :]: tensors.get_tensor(name) for name in names}
    except (HeaderError, SafetensorError, OSError, TypeError, ValueError) as error:
        raise NormError(f'{path}: not a readable safetensors file: {error}') from error
    if not values:
        raise NormError(f'{path}: no statistics of {key}; this checkpoint has none for it')
    return values

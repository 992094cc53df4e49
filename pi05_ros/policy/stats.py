"""Normalisation statistics of a checkpoint, in openpi's and in lerobot's layout.

A policy without its statistics moves a robot by numbers that mean nothing, so everything that is
missing or doubtful here is a :class:`NormError`; nothing passes through unnormalised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pi05_ros.model.files import read_json_object

from .errors import NormError
from .lerobot import FeatureStats, read_processors
from .robot import RobotSpec
from .transforms import Normalizer, NormMode

STATS_FILE = 'norm_stats.json'
OPENPI_EPS = 1e-6
_ASSET_ID = re.compile(r'\w[\w.-]*(/\w[\w.-]*)*')
_NEEDED: dict[NormMode, tuple[str, str]] = {'quantile': ('q01', 'q99'), 'zscore': ('mean', 'std')}


@dataclass(frozen=True)
class NormStats:
    """How state and actions are normalised, and where that was read.

    Args:
        state: None where the robot has no state.
        actions: covers at least the robot's action dimensions.
        files: the files that the numbers came from.
        rule: 'openpi' or 'lerobot': whose epsilon.
    """

    state: Normalizer | None
    actions: Normalizer
    files: tuple[Path, ...]
    rule: str

    def describe(self) -> str:
        """Return modes and rule in a few words, for the diagnostics."""
        state = self.state.mode if self.state else 'none'
        return f'state {state}, actions {self.actions.mode} ({self.rule})'


def load_stats(
    checkpoint_dir: Path, layout: str, robot: RobotSpec, model_dim: int, asset_id: str = ''
) -> NormStats:
    """Read and check the statistics that belong to a checkpoint and a robot.

    Args:
        checkpoint_dir: directory of the checkpoint.
        layout: 'openpi' or 'lerobot'.
        robot: its dimensions; for openpi also the mode, and the asset if ``asset_id`` is empty.
        model_dim: dimensions to which the model pads; statistics may be padded likewise.
        asset_id: overrides the robot's; openpi only.
    Raises:
        NormError: missing, damaged, or of another number of dimensions.
        RobotError: a lerobot checkpoint contradicts the robot file.
    """
    if layout == 'lerobot':
        return _load_lerobot(checkpoint_dir, robot, model_dim)
    if layout == 'openpi':
        return _load_openpi(checkpoint_dir, robot, model_dim, asset_id or robot.asset_id)
    raise NormError(
        f'{checkpoint_dir}: a {layout} directory has no normalisation statistics, so it can be '
        'compared with golden data but cannot drive a robot'
    )


def find_openpi_stats(checkpoint_dir: Path, asset_id: str) -> Path:
    """Return ``assets/<asset_id>/norm_stats.json``, or the same without ``assets/``.

    Raises:
        NormError: neither exists; lists the asset ids that the checkpoint has.
    """
    if not _ASSET_ID.fullmatch(asset_id):
        raise NormError(
            f'asset id {asset_id!r} is not a relative path of plain names such as '
            'physical-intelligence/libero'
        )
    candidates = [checkpoint_dir / part / asset_id / STATS_FILE for part in ('assets', '.')]
    for path in candidates:
        if path.is_file():
            return path
    found = ', '.join(asset_ids(checkpoint_dir)) or 'none'
    raise NormError(
        f'no normalisation statistics for asset {asset_id!r}: looked for '
        f'{" and ".join(map(str, candidates))}; assets of this checkpoint: {found}. Copy '
        f'{STATS_FILE} of the training run there, or set the parameter asset_id'
    )


def asset_ids(checkpoint_dir: Path) -> list[str]:
    """Return the asset ids for which a checkpoint has statistics (at most 50)."""
    found = set()
    for root in (checkpoint_dir / 'assets', checkpoint_dir):
        for depth in (f'*/{STATS_FILE}', f'*/*/{STATS_FILE}'):
            for path in islice(root.glob(depth), 50):
                name = path.parent.relative_to(root)
                if name.parts[0] != 'assets':
                    found.add(str(name))
    return sorted(found)


def _load_openpi(
    checkpoint_dir: Path, robot: RobotSpec, model_dim: int, asset_id: str
) -> NormStats:
    path = find_openpi_stats(checkpoint_dir, asset_id)
    tree = read_json_object(path, NormError).get('norm_stats')
    if not isinstance(tree, dict):
        raise NormError(f"{path}: expected the key 'norm_stats' with state and actions")

    def normalizer(feature: str, dim: int) -> Normalizer:
        entry = tree.get(feature)
        if not isinstance(entry, dict):
            raise NormError(f"{path}: no statistics of '{feature}'; found: {sorted(tree)}")
        mode: NormMode = robot.normalization
        low, high = _pair(entry, mode, f'{path}: {feature}')
        _check_dims(low.shape[0], feature, dim, model_dim, path)
        width = high - low if mode == 'quantile' else high
        divisor = width + OPENPI_EPS  # added always, openpi transforms.py:137-181
        return Normalizer(mode, low, divisor, divisor)

    state = normalizer('state', robot.state_dim) if robot.state else None
    return NormStats(state, normalizer('actions', robot.action_dim), (path,), 'openpi')


def _load_lerobot(checkpoint_dir: Path, robot: RobotSpec, model_dim: int) -> NormStats:
    processors = read_processors(checkpoint_dir)
    processors.check_robot(robot)

    def normalizer(feature: FeatureStats, what: str, dim: int) -> Normalizer:
        low, high = _pair(feature.values, feature.mode, f'{feature.path}: {feature.key}')
        _check_dims(low.shape[0], what, dim, model_dim, feature.path)
        if feature.mode == 'zscore':  # the epsilon is in one direction only, as lerobot has it
            return Normalizer('zscore', low, high + feature.eps, high)
        width = high - low
        divisor = np.where(width == 0.0, feature.eps, width)
        return Normalizer('quantile', low, divisor, divisor)

    state = normalizer(processors.state, 'state', robot.state_dim) if robot.state else None
    actions = normalizer(processors.actions, 'actions', robot.action_dim)
    files = tuple(dict.fromkeys([processors.state.path, processors.actions.path]))
    return NormStats(state, actions, files, 'lerobot')


def _pair(entry: Mapping[str, Any], mode: NormMode, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (q01, q99) or (mean, std) as finite float64 vectors that can be used."""
    names = _NEEDED[mode]
    missing = [name for name in names if entry.get(name) is None]
    if missing:
        raise NormError(
            f'{where}: {mode} normalisation needs {" and ".join(names)}, but '
            f'{" and ".join(missing)} is missing; found: {sorted(entry)}'
        )
    low, high = (_vector(entry[name], f'{where}.{name}') for name in names)
    if low.shape != high.shape:
        raise NormError(
            f'{where}: {names[0]} has {low.shape[0]} dimensions, {names[1]} has {high.shape[0]}'
        )
    wrong = np.flatnonzero(high < low if mode == 'quantile' else high < 0.0)
    if wrong.size:
        i = int(wrong[0])
        relation = f'{names[1]} {high[i]:g} is below ' + (
            f'{names[0]} {low[i]:g}' if mode == 'quantile' else '0'
        )
        raise NormError(f'{where}: dimension {i}: {relation}; the statistics are damaged')
    with np.errstate(over='ignore'):
        width = high - low
    if not np.isfinite(width).all():
        raise NormError(f'{where}: {names[1]} - {names[0]} overflows; the statistics are damaged')
    return low, high


def _vector(values: Any, where: str) -> np.ndarray:
    """Return a list of numbers as (N,) float64, all finite."""
    try:
        if isinstance(values, list) and any(type(value) not in (int, float) for value in values):
            raise TypeError
        with np.errstate(invalid='ignore'):  # a NaN of another width; refused below
            vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise NormError(f'{where}: expected a list of numbers') from None
    if vector.ndim != 1 or not vector.size:
        raise NormError(f'{where}: expected a list of numbers, found shape {vector.shape}')
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        i = int(bad[0])
        raise NormError(f'{where}: dimension {i} is {vector[i]}; the statistics are damaged')
    return vector


def _check_dims(found: int, feature: str, expected: int, model_dim: int, path: Path) -> None:
    """Refuse statistics of another robot; they may be padded to the model's dimension."""
    if found not in (expected, model_dim):
        raise NormError(
            f'{feature} has {expected} dims in the robot file, norm stats have {found}: {path}; '
            'take the statistics of this robot, or correct the robot file'
        )

"""What a checkpoint directory holds, and what a robot would miss in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi05_ros.model.checkpoint import Checkpoint, check_weights, open_checkpoint
from pi05_ros.model.errors import Pi05Error
from pi05_ros.model.weights import read_header
from pi05_ros.policy.lerobot import read_processors
from pi05_ros.policy.stats import asset_ids, find_openpi_stats
from pi05_ros.policy.tokenizer import find_tokenizer


@dataclass(frozen=True)
class CheckpointReport:
    """The findings; ``missing`` says per fault what to do about it.

    Args:
        parameters: number of values in all tensors of the weights file.
        dtypes: number of values by dtype as stored, such as BF16.
        statistics: one line per set of normalisation statistics.
        tokenizer: path of the tokenizer; empty: there is none.
    """

    checkpoint: Checkpoint
    weights_bytes: int
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    statistics: tuple[str, ...]
    tokenizer: str
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            'directory': str(self.checkpoint.path),
            'layout': self.checkpoint.layout,
            'sha256': self.checkpoint.sha256,
            'weights_bytes': self.weights_bytes,
            'tensors': self.tensors,
            'parameters': self.parameters,
            'dtypes': dict(self.dtypes),
            'dims': self.checkpoint.config.to_dims(),
            'statistics': list(self.statistics),
            'tokenizer': self.tokenizer,
            'missing': list(self.missing),
        }


def report_on(directory: Path) -> CheckpointReport:
    """Inspect a directory without reading the values of its weights.

    Raises:
        CheckpointError: there is no checkpoint, or its weights file is damaged.
        ConfigError: its dimensions cannot be read.
    """
    checkpoint = open_checkpoint(directory)
    header = read_header(checkpoint.weights_path)
    dtypes: Counter[str] = Counter()
    for shape, dtype in header.values():
        dtypes[dtype] += math.prod(shape)
    missing: list[str] = []
    try:
        check_weights(checkpoint)
    except Pi05Error as fault:
        missing.append(str(fault))
    statistics = _statistics(checkpoint, missing)
    return CheckpointReport(
        checkpoint=checkpoint,
        weights_bytes=checkpoint.weights_path.stat().st_size,
        tensors=len(header),
        parameters=dtypes.total(),
        dtypes=dict(dtypes),
        statistics=tuple(statistics),
        tokenizer=_tokenizer(checkpoint, missing),
        missing=tuple(missing),
    )


def _tokenizer(checkpoint: Checkpoint, missing: list[str]) -> str:
    try:
        return str(find_tokenizer(checkpoint.path))
    except Pi05Error as fault:
        missing.append(str(fault))
        return ''


def _statistics(checkpoint: Checkpoint, missing: list[str]) -> list[str]:
    if checkpoint.layout == 'lerobot':
        return _lerobot_statistics(checkpoint, missing)
    found = asset_ids(checkpoint.path)
    if not found:
        missing.append(
            f'no normalisation statistics: copy norm_stats.json of the training run to '
            f'{checkpoint.path}/assets/ASSET_ID/norm_stats.json'
        )
    return [f'asset {name}: {find_openpi_stats(checkpoint.path, name)}' for name in found]


def _lerobot_statistics(checkpoint: Checkpoint, missing: list[str]) -> list[str]:
    try:
        processors = read_processors(checkpoint.path)
    except Pi05Error as fault:
        missing.append(str(fault))
        return []
    features = (processors.state, processors.actions)
    return [f'{feature.key}: {feature.mode}, {feature.path}' for feature in features]

"""The actions of a run as arrays: one row per tick that acted, with a digest, in an .npz file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.types import ActionChunk

from .npz import NpzError, read_arrays

# 30 hours at 20 Hz of 15 rows of 8 actions.
MAX_LOG_BYTES = 1 << 30
_ARRAYS = {'actions': '<f4', 'ticks': '<i8', 'times_ns': '<i8', 'stamps_ns': '<i8'}


class ActionLogError(Pi05Error):
    """A file is not an action log, or two logs cannot be compared."""


@dataclass(frozen=True)
class ActionLog:
    """What a run answered.

    Args:
        names: D action dimensions.
        units: unit of each.
        actions: (N, H, D) float32 in robot units, one chunk per tick that acted.
        ticks: (N,) int64 tick numbers, ascending.
        times_ns: (N,) int64 instant of each tick.
        stamps_ns: (N,) int64 stamp of the oldest input of each.
        origin: what made them (settings, checkpoint, backend), as plain JSON data.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    actions: np.ndarray
    ticks: np.ndarray
    times_ns: np.ndarray
    stamps_ns: np.ndarray
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        chunks: Sequence[tuple[int, ActionChunk]],
        names: Sequence[str],
        units: Sequence[str],
        origin: Mapping[str, Any],
    ) -> ActionLog:
        """Collect (instant of the tick in ns, chunk) pairs; all chunks have one shape."""
        empty = np.empty((0, 0, len(names)))
        actions = np.stack([chunk.actions for _, chunk in chunks]) if chunks else empty
        return cls(
            tuple(names),
            tuple(units),
            np.ascontiguousarray(actions, dtype='<f4'),
            np.array([chunk.tick for _, chunk in chunks], dtype='<i8'),
            np.array([now_ns for now_ns, _ in chunks], dtype='<i8'),
            np.array([chunk.stamp_ns for _, chunk in chunks], dtype='<i8'),
            origin,
        )

    @property
    def sha256(self) -> str:
        """Digest of the bytes of ``actions``: little-endian float32, the last index fastest."""
        return hashlib.sha256(self.actions.astype('<f4').tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the log; the same log gives the same bytes.

        Raises:
            ActionLogError: the file cannot be written.
        """
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays['names'], arrays['units'] = np.array(self.names), np.array(self.units)
        arrays['origin'] = np.array(json.dumps(dict(self.origin), sort_keys=True))
        try:
            with open(path, 'wb') as file:  # given a path, numpy would append .npz
                np.savez_compressed(file, **arrays)
        except OSError as error:
            raise ActionLogError(f'cannot write {path}: {error}') from error

    @classmethod
    def load(cls, path: Path) -> ActionLog:
        """Read a log.

        Raises:
            ActionLogError: the file cannot be read or is not a whole action log.
        """
        try:
            found = read_arrays(path, MAX_LOG_BYTES)
            arrays = {
                name: found[name].astype(dtype, casting='equiv') for name, dtype in _ARRAYS.items()
            }
            names, units = (tuple(map(str, found[name])) for name in ('names', 'units'))
            log = cls(names, units, **arrays, origin=json.loads(str(found['origin'])))
        except (OSError, NpzError, ValueError, KeyError, TypeError, RecursionError) as error:
            detail = ' '.join(str(error).split()) or type(error).__name__
            raise ActionLogError(
                f'{path} is not an action log of "pi05-ros replay --actions": {detail}'
            ) from error
        log._check(path)
        return log

    def _check(self, path: Path) -> None:
        """Refuse arrays that contradict each other, which no replay writes."""
        count, width = len(self.ticks), len(self.names)
        shapes = (self.actions.shape[::2], self.times_ns.shape, self.stamps_ns.shape)
        if shapes != ((count, width), (count,), (count,)) or self.actions.ndim != 3:
            raise ActionLogError(
                f'{path}: {count} ticks and {width} names do not fit actions of shape '
                f'{self.actions.shape}'
            )
        if np.any(np.diff(self.ticks) <= 0):
            raise ActionLogError(f'{path}: its tick numbers do not ascend')
        if not np.isfinite(self.actions).all():
            raise ActionLogError(f'{path}: it has actions that are not finite')

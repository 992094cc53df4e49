"""Block sizes of the denoise kernels: defaults that fit any GPU, and measured ones per GPU.

A measured set is a JSON file ``denoise_<gpu>.json`` with one entry per model shape and number of
rows, shipped in ``engine/tuned`` or the user's own (``pi05-ros tune`` writes it), which comes
first. A GPU without an entry takes that of the same chip (:mod:`.chips`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from pi05_ros.engine.chips import chip_of, shipped_files, user_path
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.config import GemmaConfig
from pi05_ros.model.files import read_json_object

_log = logging.getLogger(__name__)
_MAX_SIZE = 4096


@dataclass(frozen=True)
class GemmTiling:
    """How one product is cut up.

    ``columns`` are output columns per program; ``qkv`` and ``gate_up`` take half of them from
    each of the two halves that they combine. ``depth`` is the block of K, ``splits`` cuts K.
    """

    columns: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class AttentionTiling:
    """Query rows and keys per block, and how many key ranges work side by side."""

    rows: int
    keys: int
    splits: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class DenoiseTuning:
    """Every choice that changes the speed of a denoise step but not its function."""

    qkv: GemmTiling = GemmTiling(columns=32, depth=128, warps=4, stages=3)
    attention: AttentionTiling = AttentionTiling(rows=64, keys=32, splits=8, warps=4, stages=2)
    attention_out: GemmTiling = GemmTiling(columns=32, depth=64, splits=4, warps=4, stages=4)
    gate_up: GemmTiling = GemmTiling(columns=64, depth=64, warps=4, stages=4)
    down: GemmTiling = GemmTiling(columns=32, depth=128, splits=4, warps=4, stages=3)
    merge_warps: int = 1
    pdl: bool = True  # where the GPU can: a kernel starts while the one before still runs
    prefetch: bool = True  # with PDL: bring what no kernel writes to L2 before the wait

    @classmethod
    def from_dict(cls, values: Any) -> DenoiseTuning:
        """Read the JSON form.

        Raises:
            BackendError: a choice is missing, unknown or no number that a kernel can take.
        """
        return _filled(cls(), values, 'the entry')


def _filled(default: Any, values: Any, place: str) -> Any:
    """Return a dataclass like ``default`` with the ``values`` of a JSON object."""
    expected = sorted(field.name for field in fields(default))
    if not isinstance(values, Mapping) or sorted(values) != expected:
        found = sorted(values) if isinstance(values, Mapping) else values
        raise BackendError(f'{place} must have {expected}, it has {found!r:.200}')
    changes = {}
    for name, value in values.items():
        usual = getattr(default, name)
        least = 0 if isinstance(usual, bool) else 1
        if is_dataclass(usual):
            changes[name] = _filled(usual, value, name)
        elif type(value) is type(usual) and least <= value <= _MAX_SIZE:
            changes[name] = value
        else:
            kind = 'true or false' if isinstance(usual, bool) else f'{least} to {_MAX_SIZE}'
            raise BackendError(f'{name} of {place} must be {kind}, it is {value!r:.80}')
    return type(default)(**changes)


def load_denoise_tuning(device: torch.device, expert: GemmaConfig, rows: int) -> DenoiseTuning:
    """Return the measured choices for this GPU, model shape and row count, or the defaults.

    Raises:
        BackendError: the user's own file is not such a file.
    """
    if device.type != 'cuda':
        return DenoiseTuning()
    gpu = torch.cuda.get_device_name(device)
    own = user_path('denoise', gpu)
    places = [(own, str(own))] if own.is_file() else []
    shipped = shipped_files('denoise', gpu, chip_of(device))
    places += [(file.path, file.source(gpu)) for file in shipped]
    for path, source in places:
        found = read_denoise_tunings(path).get(shape_key(expert, rows))
        if found is not None:
            _log.info('denoise block sizes for %s: %s', gpu, source)
            return found
    _log.info('denoise block sizes for %s: defaults', gpu)
    return DenoiseTuning()


def read_denoise_tunings(path: Path) -> dict[str, DenoiseTuning]:
    """Read one file: model shape (:func:`shape_key`) to choices.

    Raises:
        BackendError: it is not such a file.
    """
    try:
        content = read_json_object(path, BackendError)
        return {key: DenoiseTuning.from_dict(entry) for key, entry in content.items()}
    except BackendError as error:
        raise BackendError(
            f'{path}: not a tuning file ({error}); remove it or tune again'
        ) from error


def save_denoise_tuning(path: Path, expert: GemmaConfig, rows: int, tuning: DenoiseTuning) -> None:
    """Add measured choices to a GPU's file, which keeps its entries of other shapes."""
    found = read_denoise_tunings(path) if path.is_file() else {}
    entries = found | {shape_key(expert, rows): tuning}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {key: asdict(entry) for key, entry in entries.items()}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + '\n', encoding='utf-8')


def shape_key(expert: GemmaConfig, rows: int) -> str:
    """Return the entry name: what the best choices depend on. ``rows`` is the padded horizon."""
    return (
        f'width{expert.width}_mlp{expert.mlp_dim}_heads{expert.num_heads}'
        f'x{expert.head_dim}_rows{rows}'
    )

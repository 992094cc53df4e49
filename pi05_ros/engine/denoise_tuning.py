"""Block sizes of the denoise kernels: defaults that fit any GPU, and measured ones per GPU.

A measured set is a JSON file ``tuned/denoise_<gpu>.json``, with one entry per model shape and
number of row blocks. ``scripts/bench_denoise.py --retune`` writes it. A GPU without an entry takes
that of the same chip (:mod:`.chips`).
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pi05_ros.engine.chips import chip_of, file_name, shipped_files
from pi05_ros.model.config import GemmaConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GemmTiling:
    """How one product is cut up.

    ``columns`` are output columns per program; ``qkv`` and ``gate_up`` take half of them from
    each of the two halves that they combine. ``depth`` is the block of K; where it is all of K (or
    of a split), the weights are loaded before the wait for the previous kernel. ``splits`` cuts K.
    """

    columns: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class AttentionTiling:
    """Query rows and keys per block, and how many key ranges work side by side.

    ``splits`` 0 makes ranges of one block each, as many as there are, without a loop.
    """

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
    pdl: str = 'early'  # when a kernel lets the next one start: of kernels.launch.PDL_MODES
    prefetch: bool = True  # with PDL: bring what no kernel writes to L2 before the wait
    prefetch_later: bool = False  # with PDL: attention brings the weights of gate_up to L2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DenoiseTuning:
        """Read the JSON form."""
        kinds: dict[str, type] = {
            f.name: type(getattr(cls(), f.name)) for f in fields(cls) if f.name in values
        }
        return cls(**{
            name: kind(**values[name]) if isinstance(values[name], dict) else values[name]
            for name, kind in kinds.items()
        })  # fmt: skip


def load_denoise_tuning(device: torch.device, expert: GemmaConfig, rows: int) -> DenoiseTuning:
    """Return the measured choices for this GPU, model shape and row count, or the defaults."""
    if device.type != 'cuda':
        return DenoiseTuning()
    gpu = torch.cuda.get_device_name(device)
    for shipped in shipped_files('denoise', gpu, chip_of(device)):
        entry = json.loads(shipped.path.read_text()).get(shape_key(expert, rows))
        if entry is not None:
            _log.info('denoise block sizes for %s: %s', gpu, shipped.source(gpu))
            return DenoiseTuning.from_dict(entry)
    _log.info('denoise block sizes for %s: defaults', gpu)
    return DenoiseTuning()


def save_denoise_tuning(
    folder: Path, gpu: str, expert: GemmaConfig, rows: int, tuning: DenoiseTuning
) -> Path:
    """Add measured choices to a GPU's file in ``folder``; return the file."""
    path = folder / file_name('denoise', gpu)
    entries = json.loads(path.read_text()) if path.is_file() else {}
    entries[shape_key(expert, rows)] = asdict(tuning)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=1, sort_keys=True) + '\n')
    return path


def shape_key(expert: GemmaConfig, rows: int) -> str:
    """Return the entry name: what the best choices depend on. ``rows`` is the padded horizon."""
    return (
        f'width{expert.width}_mlp{expert.mlp_dim}_heads{expert.num_heads}'
        f'x{expert.head_dim}_rows{rows}'
    )

"""Choices that were timed on one GPU: GEMM algorithms and kernel block sizes.

They belong to vision and prefill (the denoise keeps its own, see :mod:`.denoise_tuning`) and are
stored as one JSON file per GPU name, shipped in ``engine/tuned`` and overridden by the
user's own file (``pi05-ros tune`` writes it). A GPU without a shipped file takes that of the same
chip (:mod:`.chips`). A shape that nobody tuned runs with safe defaults; nothing is timed when a
pipeline is built, so that the same machine always runs the same kernels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pi05_ros.model.files import read_json_object

from .chips import Chip, shipped_files, user_path
from .pipeline import BackendError

FORMAT = 1
# Prefixes are timed at multiples of so many rows; those between take the choice of the next one.
TUNED_ROWS = 32
_ALGORITHM = re.compile(r'[0-9a-f]{128}')  # cublasLtMatmulAlgo_t, 64 bytes
_MAX_LAUNCH = 4096  # of a block size or a count of warps


@dataclass(frozen=True)
class TunedChoices:
    """What was found fastest on one GPU.

    Args:
        gpu: the GPU's name as its driver reports it.
        cublaslt_version: the library that ``algorithms`` belong to; another one ignores them.
        algorithms: linear-layer signature -> opaque cuBLASLt algorithm, hexadecimal.
        kernels: kernel shape -> launch settings, such as block sizes and warps.
        source: where this came from, for the log.
    """

    gpu: str
    cublaslt_version: int = 0
    algorithms: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    source: str = 'defaults'

    def algorithm(self, key: str, cublaslt_version: int) -> str | None:
        """Return the stored algorithm of a linear layer, if it fits this library version."""
        return self.algorithms.get(key) if cublaslt_version == self.cublaslt_version else None

    def kernel(self, key: str, default: Mapping[str, int]) -> dict[str, int]:
        """Return a kernel's launch settings: the stored ones, or ``default``."""
        return {**default, **self.kernels.get(key, {})}

    def merged(self, other: TunedChoices) -> TunedChoices:
        """Return these choices overridden by ``other``'s; algorithms only of one version."""
        same = other.cublaslt_version == self.cublaslt_version
        mine = self.algorithms if same or not other.algorithms else {}
        return TunedChoices(
            gpu=self.gpu,
            cublaslt_version=other.cublaslt_version or self.cublaslt_version,
            algorithms={**mine, **other.algorithms},
            kernels={**self.kernels, **other.kernels},
            source=f'{self.source}, {other.source}',
        )

    def save(self, path: Path) -> None:
        """Write the JSON form; :func:`read_choices` reads it back."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            'format': FORMAT,
            'gpu': self.gpu,
            'cublaslt_version': self.cublaslt_version,
            'algorithms': dict(sorted(self.algorithms.items())),
            'kernels': {key: dict(value) for key, value in sorted(self.kernels.items())},
        }
        path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def tuned_rows(rows: int) -> int:
    """Return the number of rows, at least ``rows``, that is timed for prefixes like it."""
    return -(-rows // TUNED_ROWS) * TUNED_ROWS


def load_choices(gpu: str, chip: Chip) -> TunedChoices:
    """Return what is known about a GPU: the shipped choices, overridden by the user's own."""
    choices = TunedChoices(gpu)
    for shipped in shipped_files('prefix', gpu, chip)[:1]:
        found = replace(read_choices(shipped.path, shipped.gpu), source=shipped.source(gpu))
        choices = choices.merged(found)
    own = user_path('prefix', gpu)
    return choices.merged(read_choices(own, gpu)) if own.is_file() else choices


def read_choices(path: Path, gpu: str) -> TunedChoices:
    """Read one file.

    Raises:
        BackendError: it is not such a file, or belongs to another GPU.
    """
    try:
        content = read_json_object(path, BackendError)
        fault = _fault(content)
    except BackendError as error:
        fault = str(error)
    if fault:
        raise BackendError(f'{path}: not a tuning file ({fault}); remove it or tune again')
    found = content['gpu'], content['format']
    choices = TunedChoices(
        gpu=gpu,
        cublaslt_version=content['cublaslt_version'],
        algorithms=content['algorithms'],
        kernels=content['kernels'],
        source=str(path),
    )
    if found != (gpu, FORMAT):
        raise BackendError(
            f'{path}: made for {found[0]} in format {found[1]}, expected {gpu} in format '
            f'{FORMAT}; remove it or tune again'
        )
    return choices


def _fault(content: Mapping[str, Any]) -> str:
    """Say what is wrong with the content of a tuning file; empty if it is one."""
    kinds = {'gpu': str, 'format': int, 'cublaslt_version': int, 'algorithms': dict,
             'kernels': dict}  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            return f'{key} must be {kind.__name__}, it is {content.get(key)!r:.80}'
    for key, text in content['algorithms'].items():
        if not isinstance(text, str) or not _ALGORITHM.fullmatch(text):
            return f'algorithm {key!r:.80} is no 128 hexadecimal digits'
    for key, launch in content['kernels'].items():
        values = launch.values() if isinstance(launch, dict) else [None]
        if not all(type(value) is int and 0 <= value <= _MAX_LAUNCH for value in values):
            return f'kernel {key!r:.80} has no whole numbers from 0 to {_MAX_LAUNCH}'
    return ''

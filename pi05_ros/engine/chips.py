"""Where choices that were timed on a GPU lie, and which GPUs are the same chip.

A driver reports a marketing name, and one chip is sold under several of them. What decides which
kernel is fastest is the compute capability and the number of multiprocessors: an H100 SXM and an
H200 are both a GH100 with 132 of them and differ in memory alone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

_TUNED_DIR = Path(__file__).parent / 'tuned'


@dataclass(frozen=True)
class Chip:
    """What a GPU computes with."""

    capability: tuple[int, int]
    multiprocessors: int


# The chips of the GPUs that the package ships choices for.
_TUNED_GPUS = {'NVIDIA H100 80GB HBM3': Chip((9, 0), 132), 'NVIDIA H200': Chip((9, 0), 132)}


@dataclass(frozen=True)
class ShippedFile:
    """A file of choices and the GPU that they were timed on."""

    path: Path
    gpu: str

    def source(self, gpu: str) -> str:
        """Return where choices come from, for the log of a machine with ``gpu``."""
        if gpu == self.gpu:
            return str(self.path)
        return f'{self.path} (tuned on {self.gpu}, the same chip)'


def chip_of(device: torch.device) -> Chip:
    """Return the chip of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return Chip((properties.major, properties.minor), properties.multi_processor_count)


def shipped_files(kind: str, gpu: str, chip: Chip) -> list[ShippedFile]:
    """Return the package's files for a GPU: its own first, then those of the same chip.

    Args:
        kind: 'denoise' or 'prefix'.
        gpu: the name as the driver reports it.
    """
    owners = [gpu, *(name for name, tuned in _TUNED_GPUS.items() if tuned == chip and name != gpu)]
    files = [ShippedFile(_TUNED_DIR / file_name(kind, name), name) for name in owners]
    return [file for file in files if file.path.is_file()]


def file_name(kind: str, gpu: str) -> str:
    """Return the name of the file that holds a GPU's choices of a kind."""
    slug = re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')
    return f'{kind}_{slug}.json'


def user_path(kind: str, gpu: str) -> Path:
    """Return where ``pi05-ros tune`` writes: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(root) / 'pi05_ros' / 'tuned' / file_name(kind, gpu)

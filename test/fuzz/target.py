"""What a fuzzing target is, and where its files lie.

A target must return, or raise its documented error (:attr:`Target.errors`): nothing else, soon,
and without taking more memory than the input justifies.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / 'test' / 'data' / 'fuzz'
# Where the helpers of the other tests lie, which make valid inputs.
for _folder in ('control', 'policy', 'tools'):
    sys.path.append(str(ROOT / 'test' / _folder))


@dataclass(frozen=True)
class Target:
    """One reader.

    Args:
        run: reads bytes.
        errors: what it may raise.
        seeds: returns valid inputs.
    """

    run: Callable[[bytes], None]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]

    def accepts(self, data: bytes) -> bool:
        """Tell whether the input was taken; False if it was refused as documented."""
        try:
            self.run(data)
        except self.errors:
            return False
        return True


@cache
def scratch() -> Path:
    """Return a directory of this process; in memory where the system has one there."""
    shared = Path('/dev/shm')
    path = Path(tempfile.mkdtemp(prefix='pi05_fuzz_', dir=shared if shared.is_dir() else None))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


def written(name: str, data: bytes) -> Path:
    """Write the input to a file and return its path."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def corpus_files(name: str) -> list[Path]:
    """Return the inputs of a target that were worth keeping."""
    return sorted((CORPUS / name).glob('*'))

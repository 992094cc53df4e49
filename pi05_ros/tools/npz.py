"""Read an ``.npz`` that may be damaged: no pickle, no more memory than it holds."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

# What zipfile, zlib and numpy make of damage; NotImplementedError and RuntimeError of members that
# are compressed or encrypted in a way that zipfile lacks.
_DAMAGE = (
    *(OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, OverflowError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


class NpzError(Exception):
    """The file is no archive of plain arrays; the message says in what."""


def read_arrays(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name, read-only.

    Args:
        max_bytes: most that they may take in memory.
    Raises:
        NpzError: the file is no such archive, damaged, or larger.
        FileNotFoundError: there is none.
    """
    # numpy takes any other file for a pickle, and advises to allow those.
    if path.is_file() and not zipfile.is_zipfile(path):
        raise NpzError('it is no such archive, or cut short')
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total_bytes = sum(member.file_size for member in members)
            if total_bytes > max_bytes:
                raise NpzError(f'it unpacks to {total_bytes} bytes, at most {max_bytes}')
            return {
                member.filename.removesuffix('.npy'): _read_array(archive, member)
                for member in members
            }
    except FileNotFoundError:
        raise
    except _DAMAGE as cause:
        raise NpzError(str(cause)) from cause


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Read one ``.npy``; its data must be there before anything is allocated for its shape."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, in_columns, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f'{member.filename!r:.80} is of format {version}')
        if dtype.hasobject:
            raise ValueError(f'{member.filename!r:.80} holds pickled objects')
        data = file.read()
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed or not dtype.itemsize:
        raise ValueError(f'{member.filename!r:.80} has {len(data)} bytes, {shape} takes {needed}')
    return np.frombuffer(data, dtype).reshape(shape, order='F' if in_columns else 'C')

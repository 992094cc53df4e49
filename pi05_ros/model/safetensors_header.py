"""The header of a safetensors file, checked against the file before anything else trusts it.

Source of the layout: the format's README (github.com/huggingface/safetensors, "Format"): eight
bytes with the length of the header, little endian; the header, a JSON object of name ->
``{"dtype", "shape", "data_offsets"}`` and ``__metadata__``; then the data, without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH = struct.Struct('<Q')
_METADATA = '__metadata__'
_BITS = {
    'F4': 4,
    **dict.fromkeys(('F6_E2M3', 'F6_E3M2'), 6),
    **dict.fromkeys(('BOOL', 'U8', 'I8', 'F8_E5M2', 'F8_E4M3', 'F8_E8M0'), 8),
    **dict.fromkeys(('U16', 'I16', 'F16', 'BF16'), 16),
    **dict.fromkeys(('U32', 'I32', 'F32'), 32),
    **dict.fromkeys(('U64', 'I64', 'F64', 'C64'), 64),
}


class HeaderError(Exception):
    """The file is not a whole safetensors file; the message says in what."""


def read_checked_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> (shape, dtype such as 'BF16') in the order of the data.

    The header's length must fit the file; no name may come twice; each tensor takes as many bytes
    as dtype and shape say; the tensors fill the data from its begin to its end without a hole and
    without an overlap.

    Raises:
        HeaderError: one of this does not hold.
        OSError: the file cannot be read.
    """
    with path.open('rb') as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise HeaderError(f'{file_bytes} bytes are too few for a header')
        header_bytes = _LENGTH.unpack(start)[0]
        if header_bytes > MAX_HEADER_BYTES:
            raise HeaderError(f'a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES}')
        if header_bytes > file_bytes - _LENGTH.size:
            raise HeaderError(f'a header of {header_bytes} bytes in a file of {file_bytes}')
        raw = file.read(header_bytes)
    header = _parse(raw)
    header.pop(_METADATA, None)
    _check_data(header, file_bytes - _LENGTH.size - header_bytes)
    in_order = sorted(header, key=lambda name: header[name]['data_offsets'])
    return {name: (tuple(header[name]['shape']), header[name]['dtype']) for name in in_order}


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as cause:
        raise HeaderError(f'its header is no JSON: {cause}') from None
    if not isinstance(header, dict):
        raise HeaderError(f'its header is a {type(header).__name__}, no JSON object')
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise HeaderError(f'{name[:80]!r} is given twice')
        found[name] = value
    return found


def _check_data(header: dict[str, Any], data_bytes: int) -> None:
    """Check that the tensors fill the data exactly, each with the bytes that it needs."""
    ranges = sorted((*_range(name, entry), name) for name, entry in header.items())
    at = 0
    for begin, end, name in ranges:
        if begin != at:
            fault = 'overlaps the one before' if begin < at else 'leaves a hole before it'
            raise HeaderError(f'{name[:80]!r} at {begin} {fault}, which ends at {at}')
        at = end
    if at != data_bytes:
        raise HeaderError(f'{data_bytes} bytes of data, its tensors take {at}')


def _range(name: str, entry: Any) -> tuple[int, int]:
    """Return the begin and end of a tensor's data, after checking its entry."""
    where = f'{name[:80]!r}'
    if not isinstance(entry, dict) or entry.keys() != {'dtype', 'shape', 'data_offsets'}:
        raise HeaderError(f'{where} must have dtype, shape and data_offsets')
    dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise HeaderError(f'{where}: unknown dtype {str(dtype)[:20]!r}')
    if not _are_sizes(shape):
        raise HeaderError(f'{where}: its shape is no list of sizes')
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(f'{where}: its data_offsets are not [begin, end]')
    needed = math.prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != needed:
        raise HeaderError(
            f'{where}: {dtype} {shape} takes {needed} bytes, its data {offsets[1] - offsets[0]}'
        )
    return offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    """Tell whether this is a short list of numbers that fit 63 bits."""
    if not isinstance(values, list) or len(values) > 16:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)

"""A safetensors header is believed only where it agrees with itself and with its file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pi05_ros.model.safetensors_header import (
    MAX_HEADER_BYTES,
    HeaderError,
    read_checked_header,
)


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = 'F32') -> dict:
    return {'dtype': dtype, 'shape': [1] if shape is None else shape, 'data_offsets': [begin, end]}


def write(path: Path, header: Any, data_bytes: int, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(raw) if length is None else length) + raw)
    with path.open('ab') as file:
        file.write(bytes(data_bytes))
    return path


def test_what_the_library_writes_is_read_as_the_library_reads_it(tmp_path):
    tensors = {
        'b': torch.zeros(2, 3, dtype=torch.bfloat16),
        'a': torch.zeros(5),
        'empty': torch.zeros(0, 7, dtype=torch.int64),
        'scalar': torch.tensor(1, dtype=torch.uint8),
    }
    path = tmp_path / 'a.safetensors'
    save_file(tensors, path, metadata={'format': 'pt'})
    with safe_open(path, framework='pt') as file:
        slices = {name: file.get_slice(name) for name in tensors}
        expected = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    assert read_checked_header(path) == expected


TWICE = b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":' + json.dumps(entry(0, 4)).encode()


@pytest.mark.parametrize(
    ('header', 'data_bytes', 'message'),
    [
        ({'a': entry(0, 4), 'b': entry(2, 6)}, 6, "'b' at 2 overlaps the one before"),
        ({'a': entry(0, 4), 'b': entry(0, 4)}, 4, "'b' at 0 overlaps the one before"),
        ({'a': entry(0, 4), 'b': entry(8, 12)}, 12, "'b' at 8 leaves a hole before it"),
        ({'a': entry(4, 8)}, 8, "'a' at 4 leaves a hole before it"),
        ({'a': entry(0, 4)}, 3, '3 bytes of data, its tensors take 4'),
        ({'a': entry(0, 4)}, 5, '5 bytes of data, its tensors take 4'),
        ({'a': entry(0, 4, [2])}, 4, r"'a': F32 \[2\] takes 8 bytes, its data 4"),
        ({'a': entry(0, 4, [2**33, 2**31])}, 4, 'takes 73786976294838206464 bytes'),
        ({'a': entry(0, 4, [-1, -1])}, 4, 'its shape is no list of sizes'),
        ({'a': entry(0, 4, [True])}, 4, 'its shape is no list of sizes'),
        ({'a': entry(4, 0)}, 4, 'takes 4 bytes, its data -4'),
        ({'a': entry(0, 4, dtype='P9')}, 4, "unknown dtype 'P9'"),
        ({'a': {'shape': [1], 'data_offsets': [0, 4]}}, 4, 'must have dtype, shape and data_off'),
        ({'a': 5}, 0, 'must have dtype, shape and data_offsets'),
        (TWICE + b'}', 4, "'a' is given twice"),
        ([], 0, 'its header is a list, no JSON object'),
        (b'{"a"', 0, 'its header is no JSON'),
        (b'[' * 5000, 0, 'its header is no JSON: maximum recursion depth'),
    ],
)
def test_a_header_that_contradicts_itself_or_its_file_is_refused(
    tmp_path, header, data_bytes, message
):
    path = write(tmp_path / 'a.safetensors', header, data_bytes)
    with pytest.raises(HeaderError, match=message):
        read_checked_header(path)


@pytest.mark.parametrize(
    ('length', 'message'),
    [
        (11, 'a header of 11 bytes in a file of 10'),
        (MAX_HEADER_BYTES, 'a header of 100000000 bytes in a file of 10'),
        (MAX_HEADER_BYTES + 1, 'a header of 100000001 bytes, at most 100000000'),
        (2**64 - 1, 'at most 100000000'),
    ],
)
def test_a_length_that_does_not_fit_the_file_is_refused_before_it_is_read(
    tmp_path, length, message
):
    path = write(tmp_path / 'a.safetensors', {}, 0, length)
    with pytest.raises(HeaderError, match=message):
        read_checked_header(path)


def test_a_file_without_a_length_is_refused(tmp_path):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(b'1234567')
    with pytest.raises(HeaderError, match='7 bytes are too few for a header'):
        read_checked_header(path)

"""Small damages to valid inputs: what a broken disk, a broken sender or an attacker may do."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

# Lengths and counts at which arithmetic breaks, in the widths in which formats store them.
_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**64 - 1)
_TOKENS = (
    *(b'\0', b'"', b'{', b'[', b']', b'}', b':', b',', b'-', b'..', b'/', b'../../', b'~nobody/'),
    *(b'&a ', b'*a', b'<<: ', b'? ', b'!!python/name:', b'1:1:1.5', b'2001-99-99', b'\n', b'\t'),
    *(b'null', b'true', b'NaN', b'Infinity', b'1e999', b'-1', b'9' * 400, b'1' * 5000),
    *(b'0x' + b'f' * 5000, b'[' * 300, b'{"a":' * 300, b'- ' * 300, b'\xff\xfe', b'\xed\xa0\x80'),
)


def mutate(randomness: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return the input with one to eight damages, spliced with another one at times."""
    damaged = bytearray(data)
    for _ in range(randomness.choice((1, 1, 2, 3, 8))):
        _damage(randomness, damaged, others)
    return bytes(damaged)


def _damage(randomness: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    at = randomness.randrange(len(data) + 1)
    end = min(len(data), at + randomness.choice((1, 2, 4, 8, 32, 256)))
    kind = randomness.randrange(8)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << randomness.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = randomness.randrange(256)
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = data[at:end]
    elif kind == 4:
        data[at:at] = randomness.choice(_TOKENS)
    elif kind == 5:
        layout = randomness.choice(('<H', '<I', '<Q', '>H', '>I', '>Q'))
        number = randomness.choice(_NUMBERS) % (1 << 8 * struct.calcsize(layout))
        data[at : at + struct.calcsize(layout)] = struct.pack(layout, number)
    elif kind == 6:
        data[at:] = b''
    else:
        other = randomness.choice(others)
        start = randomness.randrange(len(other) + 1)
        data[at:end] = other[start : start + randomness.choice((4, 32, 256, 4096))]

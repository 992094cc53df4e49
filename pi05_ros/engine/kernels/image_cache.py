"""Compiled CUDA C++ on disk, so that a process does not compile what one before it has.

A file belongs to everything that its content depends on: all source text, the compiler's options
and version. Its name is the hash of that, so nothing is ever out of date. Files begin with the
hash of the rest: what is cut short is compiled again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

_log = logging.getLogger(__name__)
_DIGEST_BYTES = sha256().digest_size


def image_folder() -> Path:
    """Return where images lie: below ``$XDG_CACHE_HOME`` or ``~/.cache``, as Triton's do."""
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(root) / 'pi05_ros' / 'kernels'


def cached_image(inputs: Iterable[bytes], compile_now: Callable[[], bytes]) -> bytes:
    """Return an image from the disk, or compile it and leave it there.

    A folder that cannot be read or written costs the time to compile, and a line in the log.

    Args:
        inputs: all that the image depends on.
    """
    key = sha256(b''.join(sha256(part).digest() for part in inputs)).hexdigest()
    try:
        path = image_folder() / f'{key}.cubin'
    except RuntimeError as error:  # a user without a home
        _log.info('compiled kernels are not kept: %s', error)
        return compile_now()
    image = _read(path)
    if image is None:
        image = compile_now()
        _write(path, image)
    return image


def _read(path: Path) -> bytes | None:
    """Return the content of a whole file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.info('compiled kernels are not read from %s: %s', path.parent, error)
        return None
    digest, image = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return image if sha256(image).digest() == digest else None


def _write(path: Path, image: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            unfinished.write_bytes(sha256(image).digest() + image)
            os.replace(unfinished, path)
    except OSError as error:
        _log.info('compiled kernels are not kept in %s: %s', path.parent, error)

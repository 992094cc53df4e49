"""Paths that a user gives, and small JSON files: every failure is one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import Pi05Error

MAX_JSON_BYTES = 4 * 1024 * 1024  # a config or statistics of 32 dimensions take some kilobytes


def local_path(text: str | Path, error: type[Pi05Error]) -> Path:
    """Return a path that a user gave, ``~`` expanded.

    Args:
        error: raised where the system cannot even look for it: no such home, too long, forbidden.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as cause:
        raise error(f'{str(text)[:200]!r} is no path that can be opened: {cause}') from cause
    return path


def read_json_object(path: Path, error: type[Pi05Error]) -> dict[str, Any]:
    """Return the object in one JSON file.

    Args:
        error: raised, with one line, where it cannot be read, is larger than
            :data:`MAX_JSON_BYTES`, or is not a JSON object.
    """
    try:
        with path.open('rb') as stream:
            raw = stream.read(MAX_JSON_BYTES + 1)
    except OSError as cause:
        raise error(f'{path}: cannot be read: {cause.strerror or cause}') from cause
    if len(raw) > MAX_JSON_BYTES:
        raise error(f'{path}: larger than {MAX_JSON_BYTES} bytes, so not a file of this kind')
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as cause:
        raise error(f'{path}: not valid JSON: {cause}') from cause
    if not isinstance(content, dict):
        raise error(f'{path}: expected a JSON object, found {type(content).__name__}')
    return content

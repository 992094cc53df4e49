"""Small JSON files of a checkpoint: size-limited, and every failure names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import NormError

MAX_JSON_BYTES = 4 * 1024 * 1024  # statistics of 32 dimensions take some kilobytes


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in one JSON file.

    Raises:
        NormError: it cannot be read, is too large, or is not a JSON object.
    """
    try:
        with path.open('rb') as stream:
            raw = stream.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise NormError(f'{path}: cannot be read: {error.strerror or error}') from error
    if len(raw) > MAX_JSON_BYTES:
        raise NormError(f'{path}: larger than {MAX_JSON_BYTES} bytes, so not a statistics file')
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise NormError(f'{path}: not valid JSON: {error}') from error
    if not isinstance(content, dict):
        raise NormError(f'{path}: expected a JSON object, found {type(content).__name__}')
    return content

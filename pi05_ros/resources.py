"""Where the files that are not Python lie: robot files, launch files, the demo bag."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pi05_ros.model.errors import Pi05Error


class ResourceError(Pi05Error):
    """The package's own files cannot be found."""


def share_dir() -> Path:
    """Return the directory that holds ``config/`` and ``launch/``.

    In a source tree that is its root, else ``share/pi05_ros`` of the install prefix.

    Raises:
        ResourceError: neither is there; lists where it looked.
    """
    source_tree = Path(__file__).resolve().parent.parent
    if (source_tree / 'CMakeLists.txt').is_file() and (source_tree / 'config').is_dir():
        return source_tree
    prefixes = [p for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    looked = [Path(prefix) / 'share' / 'pi05_ros' for prefix in [*prefixes, sys.prefix]]
    for directory in looked:
        if (directory / 'config').is_dir():
            return directory
    raise ResourceError(
        'the files of pi05_ros are not installed; looked in ' + ', '.join(map(str, looked))
    )


def robot_dir() -> Path:
    """Return the directory of the shipped robot files."""
    return share_dir() / 'config' / 'robots'


def demo_bag() -> Path:
    """Return the directory of the shipped LIBERO bag."""
    source = share_dir() / 'test' / 'data' / 'libero_spatial_bowl'
    return source if source.is_dir() else share_dir() / 'demo' / 'libero_spatial_bowl'

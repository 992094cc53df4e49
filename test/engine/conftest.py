"""What the tests of the engine share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def golden_dir() -> Path:
    """The tiny model with outputs of openpi's own code."""
    return Path(__file__).parents[1] / 'data' / 'golden' / 'pi05_tiny'

from __future__ import annotations

from pathlib import Path

import pytest
from bag_files import write_bag
from replay_bags import shipped_rows


@pytest.fixture(scope='session')
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pi05_ros.tools.random_checkpoint import make_checkpoint

    path = tmp_path_factory.mktemp('tiny') / 'checkpoint'
    make_checkpoint('tiny', path, seed=0)
    return path


@pytest.fixture(scope='session')
def short_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 0.6 s of the shipped recording."""
    return write_bag(tmp_path_factory.mktemp('short') / 'bag', shipped_rows())

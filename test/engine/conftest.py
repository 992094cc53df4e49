"""Without a GPU, Triton kernels run through its interpreter: chosen before their import."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'


@pytest.fixture(scope='session')
def golden_dir() -> Path:
    """The tiny model with outputs of openpi's own code."""
    return Path(__file__).parents[1] / 'data' / 'golden' / 'pi05_tiny'

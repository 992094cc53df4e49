"""Fixtures of the policy tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from policy_files import train_tokenizer

# The same examples on every run, and no limit on the time of one: the machine may be busy.
settings.register_profile('deterministic', deadline=None, derandomize=True)
settings.load_profile('deterministic')


@pytest.fixture(scope='session')
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'paligemma_tokenizer.model')

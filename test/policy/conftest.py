"""Fixtures of the policy tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from policy_files import train_tokenizer


@pytest.fixture(scope='session')
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'paligemma_tokenizer.model')

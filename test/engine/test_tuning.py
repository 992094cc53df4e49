"""Stored choices: which file counts, and what makes one invalid."""

from __future__ import annotations

import json

import pytest

from pi05_ros.engine import tuning
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.engine.tuning import TunedChoices

GPU = 'NVIDIA Test 9000'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path


def test_a_gpu_that_nobody_tuned_has_safe_defaults(cache):
    choices = tuning.load_choices(GPU)
    assert choices.source == 'defaults'
    assert choices.algorithm('any', 1) is None
    assert choices.kernel('any', {'warps': 4}) == {'warps': 4}


def test_what_was_saved_is_loaded(cache):
    saved = TunedChoices(GPU, 13, {'a': '00ff' * 32}, {'k': {'warps': 8}})
    saved.save(tuning.user_path(GPU))
    found = tuning.load_choices(GPU)
    assert found.algorithm('a', 13) == '00ff' * 32
    assert found.kernel('k', {'warps': 4, 'stages': 2}) == {'warps': 8, 'stages': 2}
    assert str(tuning.user_path(GPU)) in found.source


def test_an_algorithm_of_another_library_version_is_ignored():
    """The library only accepts what the same version gave."""
    assert TunedChoices(GPU, 13, {'a': '00ff'}).algorithm('a', 14) is None


def test_the_users_own_file_overrides_the_shipped_one():
    shipped = TunedChoices(GPU, 13, {'a': '01', 'b': '02'}, {'k': {'warps': 4}})
    merged = shipped.merged(TunedChoices(GPU, 13, {'a': '03'}, {'k': {'warps': 8}}))
    assert merged.algorithms == {'a': '03', 'b': '02'}
    assert merged.kernel('k', {}) == {'warps': 8}
    other = shipped.merged(TunedChoices(GPU, 14, {'a': '04'}))
    assert other.algorithms == {'a': '04'} and other.cublaslt_version == 14


def test_a_file_of_another_gpu_is_refused(cache):
    TunedChoices('Other GPU', 13).save(tuning.user_path(GPU))
    with pytest.raises(BackendError, match='made for Other GPU in format 1, expected NVIDIA Test'):
        tuning.load_choices(GPU)


@pytest.mark.parametrize('content', ['{', '[]', '{"format": 1}'], ids=['cut', 'list', 'empty'])
def test_a_broken_file_is_refused(cache, content):
    path = tuning.user_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(BackendError, match='not a tuning file .*; remove it or tune again'):
        tuning.load_choices(GPU)


def test_the_shipped_choices_are_readable():
    path = tuning.shipped_path('NVIDIA H200')
    choices = tuning.read_choices(path, 'NVIDIA H200')
    assert choices.algorithms and choices.cublaslt_version
    assert all(len(bytes.fromhex(a)) == 64 for a in choices.algorithms.values())
    assert json.loads(path.read_text())['gpu'] == 'NVIDIA H200'

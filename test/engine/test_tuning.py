"""Stored choices: which file counts, and what makes one invalid."""

from __future__ import annotations

import json

import pytest
import torch

from pi05_ros.engine import chips, tuning
from pi05_ros.engine.chips import Chip
from pi05_ros.engine.kernels import prefill_attention
from pi05_ros.engine.kernels.cublaslt import LinearSignature, stored_algorithm
from pi05_ros.engine.ops import FusedOps
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.engine.tuning import TunedChoices

GPU = 'NVIDIA Test 9000'
CHIP = Chip((4, 2), 77)
GH100 = Chip((9, 0), 132)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path


def test_a_gpu_that_nobody_tuned_has_safe_defaults(cache):
    choices = tuning.load_choices(GPU, CHIP)
    assert choices.source == 'defaults'
    assert choices.algorithm('any', 1) is None
    assert choices.kernel('any', {'warps': 4}) == {'warps': 4}


def test_what_was_saved_is_loaded(cache):
    saved = TunedChoices(GPU, 13, {'a': '00ff' * 32}, {'k': {'warps': 8}})
    saved.save(chips.user_path('prefix', GPU))
    found = tuning.load_choices(GPU, CHIP)
    assert found.algorithm('a', 13) == '00ff' * 32
    assert found.kernel('k', {'warps': 4, 'stages': 2}) == {'warps': 8, 'stages': 2}
    assert str(chips.user_path('prefix', GPU)) in found.source


def test_an_algorithm_of_another_library_version_is_ignored():
    """The library only accepts what the same version gave."""
    assert TunedChoices(GPU, 13, {'a': '00ff'}).algorithm('a', 14) is None


def test_rows_that_are_not_timed_take_the_choice_of_the_next_ones():
    def found(rows: int, **other: bool) -> str | None:
        fixed = {'bias': False, 'gelu': False, 'residual': True, **other}
        signature = LinearSignature(rows, 2048, 16384, 'bfloat16', 'bfloat16', **fixed)
        return stored_algorithm(choices, signature, 13)

    stored = {f'{rows}x16384-2048-bfloat16-residual': f'{rows}' for rows in (576, 600, 640)}
    choices = TunedChoices(GPU, 13, stored)
    assert [found(rows) for rows in (552, 576, 600, 616, 640)] == [
        '576',
        '576',
        '600',
        '640',
        '640',
    ]
    assert found(544) is None and found(648) is None and found(552, residual=False) is None


def test_attention_takes_the_launch_of_the_next_rows_that_are_timed(monkeypatch):
    launches = []
    monkeypatch.setattr(
        prefill_attention, 'prefill_attention', lambda *a: launches.append(a[-1]['warps'])
    )
    monkeypatch.setattr(FusedOps, '__init__', lambda self: None)
    ops = FusedOps()
    kernels = {'prefill_attention-576': {'warps': 16}, 'prefill_attention-560': {'warps': 2}}
    ops.choices = TunedChoices(GPU, kernels=kernels)
    for rows in (552, 560, 576, 584):
        q = torch.zeros(rows, 8)
        ops.prefill_attention(q, q, q, torch.tensor([rows]), 1.0, q)
    default = prefill_attention.default_launch(torch.device('cpu'))['warps']
    assert launches == [16, 2, 16, default]


def test_the_users_own_file_overrides_the_shipped_one():
    shipped = TunedChoices(GPU, 13, {'a': '01', 'b': '02'}, {'k': {'warps': 4}})
    merged = shipped.merged(TunedChoices(GPU, 13, {'a': '03'}, {'k': {'warps': 8}}))
    assert merged.algorithms == {'a': '03', 'b': '02'}
    assert merged.kernel('k', {}) == {'warps': 8}
    other = shipped.merged(TunedChoices(GPU, 14, {'a': '04'}))
    assert other.algorithms == {'a': '04'} and other.cublaslt_version == 14


def test_a_file_of_another_gpu_is_refused(cache):
    TunedChoices('Other GPU', 13).save(chips.user_path('prefix', GPU))
    with pytest.raises(BackendError, match='made for Other GPU in format 1, expected NVIDIA Test'):
        tuning.load_choices(GPU, CHIP)


def test_a_gpu_takes_the_shipped_choices_of_the_same_chip(cache):
    shipped = tuning.load_choices('NVIDIA H200', GH100)
    found = tuning.load_choices('NVIDIA H100 80GB HBM3', GH100)
    assert found.algorithms == shipped.algorithms and found.kernels == shipped.kernels
    assert found.gpu == 'NVIDIA H100 80GB HBM3'
    assert 'tuned on NVIDIA H200, the same chip' in found.source
    assert 'same chip' not in shipped.source


@pytest.mark.parametrize('chip', [Chip((9, 0), 114), Chip((10, 0), 132)], ids=['fewer', 'newer'])
def test_another_chip_takes_nothing_of_it(cache, chip):
    assert tuning.load_choices('NVIDIA H100 PCIe', chip).source == 'defaults'


def test_the_users_own_tuning_wins_over_that_of_the_same_chip(cache):
    gpu = 'NVIDIA H100 80GB HBM3'
    shipped = tuning.load_choices(gpu, GH100)
    key = next(iter(shipped.algorithms))
    own = TunedChoices(gpu, shipped.cublaslt_version, {key: '00ff' * 32})
    own.save(chips.user_path('prefix', gpu))
    found = tuning.load_choices(gpu, GH100)
    assert found.algorithms == {**shipped.algorithms, key: '00ff' * 32}
    assert found.source.endswith(str(chips.user_path('prefix', gpu)))


def test_a_gpus_own_shipped_file_comes_before_that_of_the_same_chip(tmp_path, monkeypatch):
    monkeypatch.setattr(chips, '_TUNED_DIR', tmp_path)
    for gpu in ('NVIDIA H200', 'NVIDIA GH200 480GB'):
        (tmp_path / chips.file_name('prefix', gpu)).touch()
    found = chips.shipped_files('prefix', 'NVIDIA GH200 480GB', GH100)
    assert [file.gpu for file in found] == ['NVIDIA GH200 480GB', 'NVIDIA H200']
    assert chips.shipped_files('denoise', 'NVIDIA GH200 480GB', GH100) == []


@pytest.mark.parametrize('content', ['{', '[]', '{"format": 1}'], ids=['cut', 'list', 'empty'])
def test_a_broken_file_is_refused(cache, content):
    path = chips.user_path('prefix', GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(BackendError, match='not a tuning file .*; remove it or tune again'):
        tuning.load_choices(GPU, CHIP)


def test_the_shipped_choices_are_readable():
    (shipped,) = chips.shipped_files('prefix', 'NVIDIA H200', GH100)
    path = shipped.path
    choices = tuning.read_choices(path, 'NVIDIA H200')
    assert choices.algorithms and choices.cublaslt_version
    assert all(len(bytes.fromhex(a)) == 64 for a in choices.algorithms.values())
    assert json.loads(path.read_text())['gpu'] == 'NVIDIA H200'

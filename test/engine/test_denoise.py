"""The fused denoise against its plain twin and against openpi's own actions.

On a machine without a GPU the kernels run in Triton's interpreter, in float32.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pi05_ros.engine import chips, denoise_tuning
from pi05_ros.engine.chips import Chip
from pi05_ros.engine.denoise import DenoiseStage
from pi05_ros.engine.denoise_layers import row_block
from pi05_ros.engine.denoise_tuning import (
    AttentionTiling,
    DenoiseTuning,
    GemmTiling,
    load_denoise_tuning,
    save_denoise_tuning,
)
from pi05_ros.engine.kernels.adarms import table_row
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.config import Pi05Config

_GOLDEN = Path(__file__).parents[1] / 'data' / 'golden' / 'pi05_tiny'
_CHIP = Chip((4, 2), 77)
_DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Few, large blocks: the interpreter pays per program.
_LARGE = DenoiseTuning(
    attention=AttentionTiling(rows=128, keys=256, splits=2),
    attention_out=GemmTiling(columns=64, depth=256),
    gate_up=GemmTiling(columns=256, depth=64),
    down=GemmTiling(columns=64, depth=128),
)
_SMALL = DenoiseTuning(
    qkv=GemmTiling(columns=32, depth=32),
    attention=AttentionTiling(rows=32, keys=32, splits=5, warps=4),
    attention_out=GemmTiling(columns=32, depth=64, splits=4),
    gate_up=GemmTiling(columns=64, depth=64),
    down=GemmTiling(columns=16, depth=16, splits=2),
)


@pytest.fixture(scope='module')
def state() -> dict[str, torch.Tensor]:
    return load_file(_GOLDEN / 'model.safetensors')


def _stage(
    state, *, prefix=40, room=64, horizon=3, max_steps=3, tuning=_SMALL, depth=1, **changes
):
    config = Pi05Config.from_dims(json.loads((_GOLDEN / 'dims.json').read_text()))
    config = replace(
        config, vlm=replace(config.vlm, depth=depth), expert=replace(config.expert, depth=depth)
    )
    generator = torch.Generator().manual_seed(3)
    shape = (config.expert.depth, room, config.expert.head_dim)
    arguments = {
        'keys': torch.randn(shape, generator=generator).to(_DEVICE),
        'values': torch.randn(shape, generator=generator).to(_DEVICE),
        'n_prefix': torch.tensor([prefix], dtype=torch.int32, device=_DEVICE),
        'noise': torch.randn(horizon, config.action_dim, generator=generator).to(_DEVICE),
        'max_steps': max_steps,
        'dtype': torch.float32,
        **changes,
    }
    stage = DenoiseStage(state, config, **arguments)
    stage.use_tuning(tuning)
    return stage


def test_actions_equal_openpi_golden(state):
    """Prefix K/V and noise of the golden file in, its actions out."""
    golden = np.load(_GOLDEN / 'two_views_37_tokens_float32.npz')
    keys, values = (torch.from_numpy(golden[f'prefix_{n}']) for n in ('keys', 'values'))
    stage = _stage(
        state,
        keys=keys.contiguous().to(_DEVICE),
        values=values.contiguous().to(_DEVICE),
        n_prefix=torch.tensor([keys.shape[1]], dtype=torch.int32, device=_DEVICE),
        horizon=10,
        depth=keys.shape[0],
        max_steps=1,
        tuning=_LARGE,
    )
    stage.noise.copy_(torch.from_numpy(golden['noise']))
    stage.launch(1)
    expected = torch.from_numpy(golden['actions_1'])
    torch.testing.assert_close(stage.actions.cpu(), expected, atol=2e-4, rtol=1e-3)


def test_plain_twin_equals_openpi_golden_over_many_steps(state):
    golden = np.load(_GOLDEN / 'two_views_37_tokens_float32.npz')
    keys, values = (torch.from_numpy(golden[f'prefix_{n}']) for n in ('keys', 'values'))
    stage = _stage(
        state,
        keys=keys.contiguous().to(_DEVICE),
        values=values.contiguous().to(_DEVICE),
        n_prefix=torch.tensor([keys.shape[1]], dtype=torch.int32, device=_DEVICE),
        horizon=10,
        depth=keys.shape[0],
        max_steps=10,
    )
    stage.noise.copy_(torch.from_numpy(golden['noise']))
    for num_steps in (3, 10):
        expected = torch.from_numpy(golden[f'actions_{num_steps}'])
        torch.testing.assert_close(stage.eager(num_steps).cpu(), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize('prefix', [1, 31, 32, 64])
def test_kernels_equal_plain_twin(state, prefix):
    stage = _stage(state, prefix=prefix, max_steps=1)
    stage.launch(1)
    torch.testing.assert_close(stage.actions, stage.eager(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('horizon', [1, 17, 70] if _DEVICE == 'cuda' else [1, 17])
def test_horizons_that_do_not_fill_their_row_blocks(state, horizon):
    stage = _stage(state, horizon=horizon, max_steps=1)
    stage.launch(1)
    torch.testing.assert_close(stage.actions, stage.eager(1), atol=1e-4, rtol=1e-4)


def test_default_tuning_fits_a_tiny_model(state):
    stage = _stage(state, max_steps=1, tuning=DenoiseTuning())
    stage.launch(1)
    torch.testing.assert_close(stage.actions, stage.eager(1), atol=1e-4, rtol=1e-4)


def test_repeated_launches_give_the_same_bits(state):
    """The split products' counters return to zero and their sums keep one order."""
    stage = _stage(state, horizon=2, max_steps=2)
    stage.launch(2)
    first = stage.actions.clone()
    stage.launch(2)
    assert torch.equal(stage.actions, first)


def test_prefix_rows_beyond_the_valid_ones_do_not_matter(state):
    stage = _stage(state, prefix=33, max_steps=1)
    stage.launch(1)
    expected = stage.actions.clone()
    stage.keys[:, 33:] = float('nan')
    stage.values[:, 33:] = float('nan')
    stage.launch(1)
    assert torch.equal(stage.actions, expected)


def test_a_new_prefix_length_needs_no_new_stage(state):
    stage = _stage(state, prefix=64, max_steps=1)
    stage.launch(1)
    stage.n_prefix.fill_(20)
    stage.launch(1)
    torch.testing.assert_close(stage.actions, stage.eager(1), atol=1e-4, rtol=1e-4)


def test_step_count_beyond_the_table_is_refused(state):
    stage = _stage(state, max_steps=3)
    with pytest.raises(BackendError, match='num_steps 4 is outside 1 to 3'):
        stage.launch(4)


def test_every_step_of_every_run_has_modulations_of_its_own(state):
    stage = _stage(state, max_steps=3)
    rows = [table_row(n, step) for n in (1, 2, 3) for step in range(n)]
    assert rows == list(range(len(stage.weights.modulations)))


def test_missing_weight_is_named(state):
    broken = {k: v for k, v in state.items() if 'layers.0.mlp.up_proj' not in k}
    broken = {k: v for k, v in broken.items() if 'gemma_expert' in k or 'action' in k}
    with pytest.raises(BackendError, match='gemma_expert.model.layers.0.mlp.up_proj.weight'):
        _stage(broken)


def test_wrong_cache_dtype_is_refused(state):
    with pytest.raises(BackendError, match='keys must be contiguous .* torch.float32'):
        _stage(state, keys=torch.zeros(3, 64, 32, dtype=torch.float64, device=_DEVICE))


def test_wrong_prefix_counter_is_refused(state):
    with pytest.raises(BackendError, match='n_prefix must be one int32'):
        _stage(state, n_prefix=torch.tensor([4], device=_DEVICE))


def test_wrong_noise_is_refused(state):
    with pytest.raises(BackendError, match=r'noise must be contiguous \(horizon, 32\)'):
        _stage(state, noise=torch.zeros(3, device=_DEVICE))
    with pytest.raises(BackendError, match='noise must be float32'):
        _stage(state, noise=torch.zeros(3, 32, dtype=torch.bfloat16, device=_DEVICE))
    with pytest.raises(BackendError, match='horizon 0 and max_steps 3 must be at least 1'):
        _stage(state, noise=torch.zeros(0, 32, device=_DEVICE))


@pytest.mark.parametrize(('horizon', 'rows'), [(1, 16), (10, 16), (17, 32), (50, 64), (70, 64)])
def test_row_block_follows_the_horizon(horizon, rows):
    assert row_block(horizon) == rows


def test_tuning_survives_its_json_form():
    assert DenoiseTuning.from_dict(asdict(_SMALL)) == _SMALL


_TINY = Pi05Config.tiny().expert


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads the tuning of a GPU; the package has one of NVIDIA X1."""
    monkeypatch.setattr(chips, '_TUNED_DIR', tmp_path)
    monkeypatch.setattr(chips, '_TUNED_GPUS', {'NVIDIA X1': _CHIP})
    monkeypatch.setattr(denoise_tuning, 'chip_of', lambda device: _CHIP)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    save_denoise_tuning(tmp_path / 'denoise_nvidia_x1.json', _TINY, 16, _SMALL)

    def load(gpu, rows=16):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: gpu)
        return load_denoise_tuning(torch.device('cuda'), _TINY, rows)

    return load


def test_measured_tuning_is_found_again_for_its_shape_only(load):
    assert load('NVIDIA X1') == _SMALL
    assert load('NVIDIA X1', rows=64) == DenoiseTuning()


def test_tuning_of_the_same_chip_is_taken_and_the_log_says_whose_it_is(load, caplog):
    with caplog.at_level('INFO'):
        assert load('NVIDIA X1 80GB') == _SMALL
    assert 'tuned on NVIDIA X1, the same chip' in caplog.text


def test_the_users_own_tuning_comes_first_where_it_has_the_shape(load, caplog):
    own = chips.user_path('denoise', 'NVIDIA X1')
    save_denoise_tuning(own, _TINY, 64, _LARGE)
    assert (load('NVIDIA X1'), load('NVIDIA X1', rows=64)) == (_SMALL, _LARGE)
    save_denoise_tuning(own, _TINY, 16, replace(_LARGE, pdl=False))
    with caplog.at_level('INFO'):
        assert load('NVIDIA X1') == replace(_LARGE, pdl=False)
    assert str(own) in caplog.text
    assert load('NVIDIA X1', rows=64) == _LARGE


_WITHOUT_QKV = {name: value for name, value in asdict(_SMALL).items() if name != 'qkv'}


@pytest.mark.parametrize(
    ('entry', 'reason'),
    [
        ([], 'the entry must have .* it has '),
        (_WITHOUT_QKV, 'the entry must have .*qkv'),
        ({**asdict(_SMALL), 'splits': 3}, 'the entry must have .* it has .*splits'),
        ({**asdict(_SMALL), 'pdl': 'early'}, "pdl of the entry must be true or false, .*'early'"),
        ({**asdict(_SMALL), 'merge_warps': 0}, 'merge_warps .* must be 1 to 4096, it is 0'),
        ({**asdict(_SMALL), 'down': {'columns': 16}}, 'down must have .*depth'),
        (
            {**asdict(_SMALL), 'qkv': asdict(GemmTiling(32, 64, splits=0))},
            'splits of qkv must be 1',
        ),
    ],
)
def test_a_broken_tuning_is_refused_with_its_file_and_the_reason(load, entry, reason):
    own = chips.user_path('denoise', 'NVIDIA X1')
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({denoise_tuning.shape_key(_TINY, 16): entry}))
    with pytest.raises(BackendError, match=f'{own}: not a tuning file .{reason}'):
        load('NVIDIA X1')


@pytest.mark.parametrize('gpu', ['NVIDIA H100 80GB HBM3', 'NVIDIA H200', 'NVIDIA GH200 480GB'])
def test_every_gh100_has_the_measured_tuning_of_the_released_model(
    monkeypatch, tmp_path, caplog, gpu
):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: gpu)
    monkeypatch.setattr(denoise_tuning, 'chip_of', lambda device: Chip((9, 0), 132))
    with caplog.at_level('INFO'):
        found = load_denoise_tuning(torch.device('cuda'), Pi05Config.full().expert, 64)
    assert ('tuned on NVIDIA H100 80GB HBM3, the same chip' in caplog.text) == ('H100' not in gpu)
    assert found.pdl and found.prefetch
    assert found.qkv == GemmTiling(columns=32, depth=256, splits=1, warps=4, stages=4)

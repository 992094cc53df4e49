"""The whole oracle: against openpi's own outputs, and the properties that other parts rely on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_files import GOLDEN_DIR, small_config, write_random

from pi05_ros.model.checkpoint import load_model, open_checkpoint
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.images import to_pixels
from pi05_ros.model.pi05 import Pi05Model, Sample

CASES = sorted(GOLDEN_DIR.glob('*.npz'), key=lambda path: path.name)


@pytest.fixture(scope='module')
def small(tmp_path_factory: pytest.TempPathFactory) -> Pi05Model:
    path = write_random(tmp_path_factory.mktemp('small') / 'checkpoint', small_config())
    return load_model(open_checkpoint(path), 'cpu', 'float32')


def inputs(views: int = 3, tokens: int = 9, horizon: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (views, 28, 28, 3), generator=generator, dtype=torch.uint8)
    return {
        'pixels': to_pixels(images),
        'tokens': torch.randint(0, 64, (tokens,), generator=generator),
        'noise': torch.randn(horizon, 7, generator=generator),
    }


def assert_same(a: Sample, b: Sample, tolerance: float = 2e-5) -> None:
    for name in ('prefix_embs', 'keys', 'values', 'velocities', 'actions'):
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize('masking', ['drop', 'mask'])
@pytest.mark.parametrize('case', CASES, ids=lambda path: path.stem)
def test_golden_actions_are_reproduced_with_masked_tokens_dropped_or_kept(
    case: Path, masking: str
):
    precision = 'bfloat16' if case.stem.endswith('bfloat16') else 'float32'
    model = load_model(open_checkpoint(GOLDEN_DIR), 'cpu', precision)
    golden = {name: torch.from_numpy(array) for name, array in np.load(case).items()}
    sample = model.sample_actions(
        to_pixels(golden['images_u8']),
        golden['tokens'],
        golden['noise'],
        10,
        golden['view_mask'],
        golden['token_mask'],
        masking,
    )
    tolerance = 2e-5 if precision == 'float32' else 0.05
    expected = Sample(
        *(golden[name] for name in ('prefix_embs', 'prefix_keys', 'prefix_values')),
        golden['v_10'],
        golden['actions_10'],
    )
    found = Sample(*(getattr(sample, name).float() for name in Sample.__dataclass_fields__))
    assert_same(found, expected, tolerance)


@pytest.mark.parametrize('present', ['111', '110', '010', '001', '000'])
@pytest.mark.parametrize('prompt_tokens', [1, 4, 9])
def test_dropping_and_masking_give_the_same_result(
    small: Pi05Model, present: str, prompt_tokens: int
):
    view_mask = torch.tensor([flag == '1' for flag in present])
    token_mask = torch.arange(9) < prompt_tokens
    case = inputs()
    dropped, masked = (
        small.sample_actions(
            **case, num_steps=3, view_mask=view_mask, token_mask=token_mask, masking=masking
        )
        for masking in ('drop', 'mask')
    )
    assert dropped.keys.shape[1] == 4 * view_mask.sum() + prompt_tokens
    assert_same(dropped, masked)


def test_what_is_masked_has_no_influence_at_all(small: Pi05Model):
    view_mask = torch.tensor([True, False, True])
    token_mask = torch.arange(9) < 6
    case = inputs()
    masks = {'view_mask': view_mask, 'token_mask': token_mask, 'masking': 'mask'}
    before = small.sample_actions(**case, num_steps=2, **masks)
    case['pixels'][1] = -case['pixels'][1]
    case['tokens'][6:] = 0
    after = small.sample_actions(**case, num_steps=2, **masks)
    assert torch.equal(before.actions, after.actions)


@pytest.mark.parametrize('change', ['pixels', 'tokens', 'noise'])
def test_actions_depend_on_every_input(small: Pi05Model, change: str):
    """A gate near zero in random weights would hide a wrong prefix from all other tests."""
    case = inputs()
    before = small.sample_actions(**case, num_steps=2).actions
    case[change] = case[change].flip(0)
    after = small.sample_actions(**case, num_steps=2).actions
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize('horizon', [1, 5, 50])
@pytest.mark.parametrize('steps', [1, 4])
def test_horizon_and_steps_are_those_of_the_call(small: Pi05Model, horizon: int, steps: int):
    sample = small.sample_actions(**inputs(horizon=horizon), num_steps=steps)
    assert sample.actions.shape == (horizon, 7)
    assert sample.velocities.shape == (steps, horizon, 7)
    assert sample.keys.shape == sample.values.shape == (3, 21, 16)


@pytest.mark.parametrize('masked', [False, True])
def test_full_size_passes_through_without_leaving_its_device(masked: bool):
    """Shapes, dtypes and devices of the released model, without its 7 GB."""
    with torch.device('meta'):
        model = Pi05Model(Pi05Config.full()).to_precision('bfloat16')
        pixels, tokens = torch.empty(2, 3, 224, 224), torch.empty(37, dtype=torch.long)
        noise, valid = torch.empty(50, 32), torch.empty(549, dtype=torch.bool)
    prefix = torch.cat([model.embed_images(pixels).flatten(0, 1), model.embed_prompt(tokens)])
    cache = model.prefill(prefix, valid if masked else None)
    actions, velocities = model.denoise(noise, cache, 3)
    assert (prefix.shape, prefix.dtype) == ((549, 2048), torch.bfloat16)
    assert (cache.keys.shape, cache.keys.dtype) == ((18, 549, 256), torch.bfloat16)
    assert (velocities.shape, velocities.dtype) == ((3, 50, 32), torch.float32)
    assert (actions.shape, actions.dtype) == ((50, 32), torch.float32)


def test_two_runs_are_bit_identical(small: Pi05Model):
    first, second = (small.sample_actions(**inputs(), num_steps=3).actions for _ in range(2))
    assert torch.equal(first, second)


def test_noise_is_left_as_it_was(small: Pi05Model):
    case = inputs()
    before = case['noise'].clone()
    small.sample_actions(**case, num_steps=1)
    assert torch.equal(case['noise'], before)


def test_bfloat16_keeps_the_parameters_of_the_dtype_map_in_float32():
    with torch.device('meta'):
        model = Pi05Model(small_config()).to_precision('bfloat16')
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {name for name, p in model.named_parameters()} - kept == {
        name for name, p in model.named_parameters() if p.dtype == torch.bfloat16
    }
    assert kept == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(('vision.patch_', 'vision.position_', 'action_', 'time_mlp_'))
        or '.input_layernorm.' in name
        or '.post_attention_layernorm.' in name
        or name.startswith('expert.norm.')
    }
    assert model.precision == 'bfloat16'

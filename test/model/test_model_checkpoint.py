"""Every way in which a checkpoint can be right, and every way in which it can be wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from model_files import GOLDEN_DIR, golden_state, small_config, write_checkpoint, write_random
from safetensors.torch import save_file

from pi05_ros.model.checkpoint import (
    check_weights,
    load_model,
    load_state,
    open_checkpoint,
)
from pi05_ros.model.errors import CheckpointError, ConfigError
from pi05_ros.model.names import EMBEDDING, EMBEDDING_ALIAS, UNUSED_HEAD, UNUSED_NORM

Q_PROJ = 'paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.weight'


def write_json(path: Path, content: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / 'config.json').write_text(json.dumps(content))
    (path / 'model.safetensors').touch()
    return path


def same_weights(path: Path) -> bool:
    state, golden = load_state(open_checkpoint(path)), load_state(open_checkpoint(GOLDEN_DIR))
    return state.keys() == golden.keys() and all(
        torch.equal(state[name], golden[name]) for name in golden
    )


# ---- layouts


def test_golden_directory_gives_its_dims_json():
    checkpoint = open_checkpoint(GOLDEN_DIR)
    assert checkpoint.layout == 'golden'
    assert checkpoint.config.vocab_size == 512
    assert checkpoint.config.action_horizon == 10
    assert same_weights(GOLDEN_DIR)


def test_openpi_config_names_the_released_dimensions(tmp_path: Path):
    raw = {
        'action_dim': 32,
        'action_horizon': 15,
        'paligemma_variant': 'gemma_2b',
        'action_expert_variant': 'gemma_300m',
        'precision': 'bfloat16',
    }
    checkpoint = open_checkpoint(write_json(tmp_path, raw))
    assert checkpoint.layout == 'openpi'
    assert (checkpoint.config.vlm.width, checkpoint.config.expert.width) == (2048, 1024)
    assert checkpoint.config.action_horizon == 15
    assert checkpoint.raw_config == raw


def test_lerobot_config_gives_chunk_size_and_prompt_limit(tmp_path: Path):
    raw = {
        'type': 'pi05',
        'chunk_size': 30,
        'max_action_dim': 24,
        'tokenizer_max_length': 120,
        'paligemma_variant': 'gemma_2b',
        'action_expert_variant': 'gemma_300m',
        'image_resolution': [224, 224],
    }
    checkpoint = open_checkpoint(write_json(tmp_path, raw))
    assert checkpoint.layout == 'lerobot'
    config = checkpoint.config
    assert (config.action_horizon, config.action_dim, config.max_prompt_tokens) == (30, 24, 120)


def test_dims_beside_or_in_config_json_replace_the_variants(tmp_path: Path):
    inside = write_checkpoint(tmp_path / 'inside', golden_state(), action_horizon=7)
    beside = write_checkpoint(tmp_path / 'beside', golden_state(), action_horizon=7)
    shutil.copy(GOLDEN_DIR / 'dims.json', beside)
    (beside / 'config.json').write_text('{"action_horizon": 7}')
    assert open_checkpoint(inside).config == open_checkpoint(beside).config
    assert open_checkpoint(inside).config.action_horizon == 7


@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_lerobot_names_load_with_and_without_their_prefix(tmp_path: Path, prefix: str):
    state = {prefix + name: tensor for name, tensor in golden_state().items()}
    state[prefix + 'state_proj.weight'] = torch.ones(3, 3)
    path = write_checkpoint(tmp_path, state, type='pi05', chunk_size=10)
    assert same_weights(path)


def test_embedding_is_found_under_either_name(tmp_path: Path):
    state = golden_state()
    embedding = state.pop(EMBEDDING)
    assert same_weights(write_checkpoint(tmp_path / 'alias', state | {EMBEDDING_ALIAS: embedding}))
    both = state | {EMBEDDING_ALIAS: embedding, EMBEDDING: torch.zeros_like(embedding)}
    assert same_weights(write_checkpoint(tmp_path / 'both', both))


def test_only_the_unused_head_of_the_expert_may_be_absent(tmp_path: Path):
    state = golden_state()
    del state[UNUSED_HEAD]
    assert same_weights(write_checkpoint(tmp_path, state))
    del state[UNUSED_NORM]
    with pytest.raises(CheckpointError, match=f'missing: {UNUSED_NORM}'):
        load_state(open_checkpoint(write_checkpoint(tmp_path, state)))


# ---- weights


def test_model_holds_the_weights_of_the_file_in_the_dtypes_of_the_precision():
    checkpoint = open_checkpoint(GOLDEN_DIR)
    state = load_state(checkpoint)
    model = load_model(checkpoint, 'cpu', 'bfloat16')
    query = model.expert.layers[0].self_attn.q_proj.weight
    assert torch.equal(query, state[Q_PROJ].bfloat16())
    assert torch.equal(model.action_in_proj.weight, state['action_in_proj.weight'])
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not model.training


def test_weights_are_a_copy_of_the_file(tmp_path: Path):
    """What safetensors gives on a CPU is a mapping of the file, which may change under it."""
    path = write_random(tmp_path / 'small', small_config())
    state = load_state(open_checkpoint(path))
    before = {name: tensor.clone() for name, tensor in state.items()}
    weights = path / 'model.safetensors'
    with weights.open('r+b') as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b'\x00' * (weights.stat().st_size // 2))
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_bfloat16_files_load_in_float32(tmp_path: Path):
    state = {name: tensor.bfloat16() for name, tensor in golden_state().items()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, state))
    loaded = load_state(checkpoint, 'cpu', 'float32')
    assert torch.equal(loaded[Q_PROJ], state[Q_PROJ].float())


def test_sha256_is_that_of_the_weights_file():
    expected = hashlib.sha256((GOLDEN_DIR / 'model.safetensors').read_bytes()).hexdigest()
    assert open_checkpoint(GOLDEN_DIR).sha256 == expected


# ---- refusals


def test_every_fault_is_listed_in_one_error(tmp_path: Path):
    state = golden_state()
    del state['time_mlp_in.bias'], state['action_out_proj.weight']
    state['surprise'] = torch.zeros(2)
    state['action_in_proj.bias'] = torch.zeros(65)
    state[Q_PROJ] = torch.zeros(state[Q_PROJ].shape, dtype=torch.int8)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, state))
    with pytest.raises(CheckpointError) as error:
        load_model(checkpoint)
    lines = str(error.value).splitlines()
    assert 'does not fit its dimensions' in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        f"dtype: {Q_PROJ} is I8, readable are ('F32', 'BF16', 'F16')",
        'missing: action_out_proj.weight [32, 64]',
        'missing: time_mlp_in.bias [64]',
        'shape: action_in_proj.bias is [65], expected [64]',
        'unexpected: surprise [2]',
    ]
    with pytest.raises(CheckpointError, match='unexpected: surprise'):
        check_weights(checkpoint)


def test_missing_embedding_names_both_places(tmp_path: Path):
    state = golden_state()
    del state[EMBEDDING]
    with pytest.raises(CheckpointError, match=f'missing: {EMBEDDING} or {EMBEDDING_ALIAS}'):
        load_state(open_checkpoint(write_checkpoint(tmp_path, state)))


def test_the_same_tensor_twice_is_refused(tmp_path: Path):
    state = golden_state()
    state['model.time_mlp_in.bias'] = state['time_mlp_in.bias'].clone()
    with pytest.raises(CheckpointError, match=r'twice: time_mlp_in.bias \(as .* and .*\)'):
        load_state(open_checkpoint(write_checkpoint(tmp_path, state)))


def test_a_pi0_checkpoint_is_recognised(tmp_path: Path):
    state = golden_state() | {'state_proj.weight': torch.zeros(64, 32)}
    with pytest.raises(CheckpointError, match='looks like a π0 checkpoint'):
        load_state(open_checkpoint(write_checkpoint(tmp_path, state)))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, value: float, dtype: torch.dtype
):
    state = {name: tensor.to(dtype) for name, tensor in golden_state().items()}
    for name in (Q_PROJ, 'time_mlp_in.bias'):
        state[name].view(-1)[5] = value
    with pytest.raises(CheckpointError) as error:
        load_state(open_checkpoint(write_checkpoint(tmp_path, state)))
    assert 'holds NaN or infinity in:' in str(error.value)
    assert Q_PROJ in str(error.value) and 'time_mlp_in.bias' in str(error.value)


@pytest.mark.parametrize('kept_bytes', [0, 7, 100, 200_000])
def test_a_truncated_file_is_refused(tmp_path: Path, kept_bytes: int):
    content = (GOLDEN_DIR / 'model.safetensors').read_bytes()
    shutil.copy(GOLDEN_DIR / 'dims.json', tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(content[:kept_bytes])
    with pytest.raises(CheckpointError, match='not a complete safetensors file'):
        load_state(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    'content',
    [b'\xff' * 64, (1 << 62).to_bytes(8, 'little') + b'{}', b'PK\x03\x04' + b'\x00' * 60],
    ids=['noise', 'huge header', 'pickle'],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes):
    shutil.copy(GOLDEN_DIR / 'dims.json', tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(content)
    with pytest.raises(CheckpointError, match='not a complete safetensors file'):
        load_state(open_checkpoint(tmp_path))


def test_a_git_lfs_pointer_is_named(tmp_path: Path):
    shutil.copy(GOLDEN_DIR / 'dims.json', tmp_path)
    (tmp_path / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\n')
    with pytest.raises(CheckpointError, match='git lfs pull'):
        load_state(open_checkpoint(tmp_path))


def test_what_is_no_checkpoint_directory_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match='does not exist; give a local directory'):
        open_checkpoint(tmp_path / 'nothing')
    with pytest.raises(CheckpointError, match='no path that can be opened: .*name too long'):
        open_checkpoint('x' * 300)
    with pytest.raises(CheckpointError, match='is a file; give the directory'):
        open_checkpoint(GOLDEN_DIR / 'model.safetensors')
    with pytest.raises(CheckpointError, match='no model.safetensors in'):
        open_checkpoint(tmp_path)
    (tmp_path / 'pytorch_model.bin').touch()
    with pytest.raises(CheckpointError, match='pytorch_model.bin: convert to safetensors'):
        open_checkpoint(tmp_path)
    (tmp_path / 'model.safetensors.index.json').touch()
    with pytest.raises(CheckpointError, match='split into several files'):
        open_checkpoint(tmp_path)
    (tmp_path / 'params').mkdir()
    with pytest.raises(CheckpointError, match='JAX checkpoint; convert it'):
        open_checkpoint(tmp_path)


OPENPI = {'action_dim': 32, 'action_horizon': 50}


@pytest.mark.parametrize(
    'raw,message',
    [
        (OPENPI | {'paligemma_variant': 'gemma_9b'}, "'gemma_9b'; known: gemma_2b, gemma_300m"),
        (OPENPI | {'action_expert_variant': 3}, 'action_expert_variant is 3; known'),
        ({'action_dim': 32}, 'action_horizon must be a positive integer, it is missing'),
        (OPENPI | {'action_dim': 0}, 'action_dim must be a positive integer, it is 0'),
        (OPENPI | {'action_horizon': True}, 'action_horizon must be .* it is True'),
        ({'type': 'pi0', 'chunk_size': 50}, "type is 'pi0', pi05_ros runs 'pi05'"),
        ({'type': 'pi05'}, 'chunk_size must be a positive integer, it is missing'),
        (
            {'type': 'pi05', 'chunk_size': 50, 'image_resolution': [224, 320]},
            r'image_resolution must be \[px, px\], it is \[224, 320\]',
        ),
        (OPENPI | {'dims': {'vocab': 8}}, "config.json: dims: dimension 'vision' is missing"),
        (OPENPI | {'dims': 5}, 'dims must be an object with dimensions, got 5'),
        ([1, 2], 'config.json: expected a JSON object, found list'),
    ],
)
def test_a_config_that_cannot_be_used_names_file_and_key(
    tmp_path: Path, raw: object, message: str
):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_checkpoint(write_json(tmp_path, raw))


def test_a_config_that_is_no_json_is_refused(tmp_path: Path):
    write_json(tmp_path, {})
    (tmp_path / 'config.json').write_bytes(b'{"action_dim": 32, \xff')
    with pytest.raises(CheckpointError, match='config.json: not valid JSON'):
        open_checkpoint(tmp_path)


def test_weights_without_any_config_are_refused(tmp_path: Path):
    save_file({'a': torch.zeros(1)}, tmp_path / 'model.safetensors')
    with pytest.raises(CheckpointError, match=r'neither config.json nor dims.json'):
        open_checkpoint(tmp_path)

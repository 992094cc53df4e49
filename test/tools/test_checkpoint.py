from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pi05_ros.engine.eager import EagerPipeline
from pi05_ros.engine.pipeline import PipelineShape
from pi05_ros.model.checkpoint import load_model, open_checkpoint
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.names import expected_shapes
from pi05_ros.tools import weight_writer
from pi05_ros.tools.cli import main
from pi05_ros.tools.random_checkpoint import (
    franka_stats,
    make_checkpoint,
    openpi_config,
    train_tokenizer,
)
from pi05_ros.tools.weight_writer import distribution_of, write_random_weights

TASK = 'pick up the black bowl next to the plate and place it on the plate'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('made') / 'tiny'
    assert main(['checkpoint', 'make', '--size', 'tiny', '--out', str(path), '--seed', '3']) == 0
    return path


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / 'copy'))


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob('*') if p.is_file()}


# ---- make


def test_made_checkpoint_is_complete(tiny: Path):
    assert set(files(tiny)) == {
        'config.json',
        'model.safetensors',
        'paligemma_tokenizer.model',
        'assets/franka/norm_stats.json',
    }
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.layout == 'openpi'
    assert checkpoint.config == Pi05Config.tiny()
    stored = load_file(tiny / 'model.safetensors')
    assert {name: tuple(t.shape) for name, t in stored.items()} == expected_shapes(
        Pi05Config.tiny()
    )


def test_seed_determines_every_byte(tiny: Path, tmp_path: Path):
    make_checkpoint('tiny', tmp_path / 'same', seed=3)
    make_checkpoint('tiny', tmp_path / 'other', seed=4)
    assert files(tmp_path / 'same') == files(tiny)
    changed = {
        name for name, content in files(tmp_path / 'other').items() if content != files(tiny)[name]
    }
    assert changed == {'model.safetensors'}


def test_a_directory_in_use_is_left_alone(tiny: Path, capsys: pytest.CaptureFixture[str]):
    before = files(tiny)
    assert main(['checkpoint', 'make', '--size', 'tiny', '--out', str(tiny)]) == 2
    assert 'is not an empty directory; nothing was written' in capsys.readouterr().err
    assert main(['checkpoint', 'make', '--size', 'tiny', '--out', str(tiny / 'config.json')]) == 2
    assert files(tiny) == before


def test_an_empty_directory_is_used(tmp_path: Path):
    make_checkpoint('tiny', tmp_path, seed=0)
    assert (tmp_path / 'model.safetensors').is_file()


def test_a_disk_that_is_too_small_is_named_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000_000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    assert main(['checkpoint', 'make', '--size', 'full', '--out', str(tmp_path / 'full')]) == 2
    assert '1.0 GB free, the weights need 7.2 GB' in capsys.readouterr().err


def test_full_config_is_read_back_as_the_released_model(tmp_path: Path):
    full = Pi05Config.full()
    raw = openpi_config(full, torch.bfloat16, full=True)
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    (tmp_path / 'model.safetensors').touch()
    assert open_checkpoint(tmp_path).config == full
    assert raw['precision'] == 'bfloat16'


def test_neither_pieces_nor_threads_change_the_file_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weight_writer, '_PIECE_ELEMENTS', 1000)
    first, second = tmp_path / 'first', tmp_path / 'second'
    write_random_weights(first, Pi05Config.tiny(), torch.bfloat16, 0)
    monkeypatch.setattr('os.cpu_count', lambda: 5)
    write_random_weights(second, Pi05Config.tiny(), torch.bfloat16, 0)
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, framework='pt') as file:
        assert file.metadata() == {'format': 'pt', 'source': 'random weights, seed 0'}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {'BF16'}  # noqa: SIM118
        norm = file.get_tensor('paligemma_with_expert.gemma_expert.model.norm.dense.bias').float()
    assert norm[:128].abs().max() < 0.2  # scale and shift; the gate lets its branch through
    assert (norm[128:] - 1).abs().max() < 0.2


def test_an_interrupted_write_leaves_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_writer, '_draw', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_random_weights(tmp_path / 'w', Pi05Config.tiny(), torch.float32, 0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_added_to_a_residual_is_smaller_the_deeper_the_stack():
    config = Pi05Config.full()
    shapes = expected_shapes(config)
    layer = 'paligemma_with_expert.paligemma.model.language_model.layers.0.'
    down = distribution_of(
        layer + 'mlp.down_proj.weight', shapes[layer + 'mlp.down_proj.weight'], config
    )
    up = distribution_of(
        layer + 'mlp.up_proj.weight', shapes[layer + 'mlp.up_proj.weight'], config
    )
    assert down.std == pytest.approx(16384**-0.5 / 6)
    assert up.std == pytest.approx(2048**-0.5)


def test_actions_are_sane_and_depend_on_every_input(tiny: Path):
    rng = np.random.default_rng(0)
    pipeline = EagerPipeline(
        load_model(open_checkpoint(tiny), 'cpu', 'float32'),
        PipelineShape(((224, 224),), max_prompt_tokens=20, horizon=10, num_steps=3),
    )
    image = rng.integers(0, 256, (224, 224, 3), np.uint8)
    tokens, noise = rng.integers(0, 512, 20), rng.standard_normal((10, 32), np.float32)
    actions = pipeline.infer([image], tokens, noise).actions
    assert np.abs(actions).max() < 10.0
    assert 0.5 < actions.std() < 3.0
    for other in (
        pipeline.infer([255 - image], tokens, noise),
        pipeline.infer([image], tokens[::-1].copy(), noise),
        pipeline.infer([image], tokens, -noise),
    ):
        assert np.abs(other.actions - actions).max() > 0.01


def test_statistics_have_plausible_ranges_for_the_recorded_arm():
    for feature in franka_stats().values():
        q01, q99, mean, std = (np.array(feature[key]) for key in ('q01', 'q99', 'mean', 'std'))
        assert q01.shape == q99.shape == mean.shape == std.shape == (8,)
        assert (q01 < mean).all() and (mean < q99).all()
        assert (std > 0).all() and (std < q99 - q01).all()


def test_tokenizer_has_paligemmas_special_ids_and_loses_nothing():
    model = train_tokenizer()
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert model == train_tokenizer()
    ids = [getattr(tokenizer, f'{name}_id')() for name in ('pad', 'eos', 'bos', 'unk')]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.vocab_size() <= Pi05Config.tiny().vocab_size
    text = f'Task: {TASK}, State: -1 0 128 255;\nAction:  é 日'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = tokenizer.encode('128 255', out_type=str)
    assert [piece.replace('▁', ' ') for piece in pieces] == list('128 255')


def test_prompt_of_the_recording_fits_the_limit(tiny: Path):
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(tiny / 'paligemma_tokenizer.model')
    )
    text = f'Task: {TASK}, State: {" ".join(["255"] * 8)};\nAction: '
    assert len(tokenizer.encode(text, add_bos=True)) < 100


# ---- inspect


def test_inspect_shows_what_there_is(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['checkpoint', 'inspect', str(tiny)]) == 0
    shown = capsys.readouterr().out
    shapes = expected_shapes(Pi05Config.tiny())
    total = sum(math.prod(shape) for shape in shapes.values())
    for text in (
        'openpi',
        f'{total:,} in {len(shapes)} tensors',
        'F32',
        'asset franka',
        'nothing is missing',
    ):
        assert text in shown
    assert open_checkpoint(tiny).sha256 in shown


def test_inspect_prints_the_same_as_json(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert main(['checkpoint', 'inspect', str(tiny), '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    assert Pi05Config.from_dims(report['dims']) == Pi05Config.tiny()
    assert report['dtypes'] == {'F32': report['parameters']}
    assert report['missing'] == []


def test_inspect_says_what_is_missing_and_what_to_do(
    copy: Path, capsys: pytest.CaptureFixture[str]
):
    (copy / 'paligemma_tokenizer.model').unlink()
    shutil.rmtree(copy / 'assets')
    state = load_file(copy / 'model.safetensors')
    del state['time_mlp_in.bias']
    save_file(state, copy / 'model.safetensors')
    assert main(['checkpoint', 'inspect', str(copy)]) == 1
    shown = capsys.readouterr().out
    assert 'missing: time_mlp_in.bias [64]' in shown
    assert 'no normalisation statistics: copy norm_stats.json of the training run' in shown
    assert 'no tokenizer: looked for' in shown


def test_inspect_of_lerobot_asks_for_its_processor_files(
    copy: Path, capsys: pytest.CaptureFixture[str]
):
    raw = json.loads((copy / 'config.json').read_text()) | {'type': 'pi05', 'chunk_size': 10}
    (copy / 'config.json').write_text(json.dumps(raw))
    assert main(['checkpoint', 'inspect', str(copy)]) == 1
    assert 'policy_preprocessor.json is missing' in capsys.readouterr().out


def test_inspect_of_a_damaged_file_is_status_2(copy: Path, capsys: pytest.CaptureFixture[str]):
    (copy / 'model.safetensors').write_bytes(b'not a checkpoint')
    assert main(['checkpoint', 'inspect', str(copy)]) == 2
    assert 'is not a complete safetensors file' in capsys.readouterr().err

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.tools import parity
from pi05_ros.tools.cli import main
from pi05_ros.tools.golden import GoldenError, read_golden
from pi05_ros.tools.parity import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    cosine_similarity,
    precision_of_name,
    tolerance_of,
)

GOLDEN_DIR = Path(__file__).parents[1] / 'data' / 'golden' / 'pi05_tiny'
CASES = sorted(GOLDEN_DIR.glob('*.npz'))
SHORT = GOLDEN_DIR / 'two_views_37_tokens_float32.npz'

Edit = Callable[[dict[str, np.ndarray]], Any]


def run(golden: Path, *options: str) -> int:
    return main(['parity', '--checkpoint', str(GOLDEN_DIR), '--golden', str(golden), *options])


def edited(tmp_path: Path, edit: Edit) -> Path:
    arrays = dict(np.load(SHORT))
    for name in [name for name in arrays if name.endswith(('_10', '_3'))]:
        del arrays[name]  # one step is enough, and quick
    edit(arrays)
    path = tmp_path / 'edited_float32.npz'
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize('case', CASES, ids=lambda path: path.stem)
def test_every_golden_file_passes(case: Path, capsys: pytest.CaptureFixture[str]):
    precision = 'bfloat16' if 'bfloat16' in case.stem else 'float32'
    status = run(case, '--precision', precision, '--device', 'cpu', '--json')
    report = json.loads(capsys.readouterr().out)
    assert (status, report['passed'], report['precision']) == (0, True, precision)
    assert report['backend'] == {'vision': 'eager', 'prefill': 'eager', 'denoise': 'eager'}
    outputs = {n for n in np.load(case).files if n.startswith(('prefix_', 'v_', 'actions_'))}
    assert set(report['items']) == outputs
    for item, figures in report['items'].items():
        if precision == 'float32':
            assert figures['max_abs_error'] <= 2e-4 and figures['cosine'] >= 0.99999
        elif not item.startswith('prefix_'):
            assert figures['cosine'] >= 0.9995


def test_the_table_names_items_tolerance_and_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(edited(tmp_path, lambda a: a.update(remark=np.zeros(1)))) == 0
    shown = capsys.readouterr().out
    for text in ('2 views, 37 prompt tokens, horizon 10; float32 on', 'v_1', 'cosine ≥ 0.99999'):
        assert text in shown
    assert 'not compared: remark' in shown
    assert 'within tolerance' in shown


@pytest.mark.parametrize(
    'item', ['prefix_embs', 'prefix_keys', 'prefix_values', 'v_1', 'actions_1']
)
def test_one_wrong_value_in_any_item_is_status_1(
    item: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays[item].flat[7] += 1e-3

    assert run(edited(tmp_path, spoil), '--json') == 1
    items = json.loads(capsys.readouterr().out)['items']
    assert [name for name, figures in items.items() if not figures['passed']] == [item]


def test_failure_is_said_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(edited(tmp_path, lambda a: a.update(v_1=-a['v_1']))) == 1
    shown = capsys.readouterr().out
    assert 'FAILED' in shown
    assert 'above tolerance' in shown


def test_other_view_masks_and_prompts_change_the_prefix(tmp_path: Path):
    """Without outputs to compare with, the actions of the file must not match another mask."""

    def second_view_only(arrays: dict[str, np.ndarray]) -> None:
        arrays['view_mask'] = np.array([False, True, False])
        for name in ('prefix_embs', 'prefix_keys', 'prefix_values'):
            del arrays[name]

    assert run(edited(tmp_path, second_view_only)) == 1


def test_heads_of_k_and_v_may_have_an_axis_of_their_own(tmp_path: Path):
    def split(arrays: dict[str, np.ndarray]) -> None:
        arrays['prefix_keys'] = arrays['prefix_keys'][:, None]
        arrays['prefix_values'] = arrays['prefix_values'][:, :, None]

    assert run(edited(tmp_path, split)) == 0


@pytest.mark.parametrize(
    'edit,message',
    [
        (lambda a: a.pop('noise'), 'missing noise; found:'),
        (
            lambda a: a.update(images_u8=a['images_u8'][:, :100]),
            r'images_u8 is \(3, 100, 224, 3\)',
        ),
        (lambda a: a.update(images_u8=a['images_u8'] / 255), 'images_u8 is .* float64, expected'),
        (lambda a: a.update(view_mask=np.ones(2, bool)), r'view_mask is \(2,\) bool, expected'),
        (lambda a: a.update(token_mask=a['token_mask'][:9]), r'token_mask is \(9,\)'),
        (lambda a: a.update(tokens=a['tokens'] + 500), 'tokens exceed the vocabulary of 512'),
        (
            lambda a: a.update(noise=a['noise'][:, :7]),
            r'noise is \(10, 7\) .*expected \(any, 32\)',
        ),
        (lambda a: a.update(noise=a['noise'] * np.nan), 'noise holds NaN or infinity'),
        (lambda a: a.update(v_1=a['v_1'][:, :5]), r'v_1 is \(1, 5, 32\)'),
        (
            lambda a: a.update(v_2=a['v_1']),
            r'v_2 is \(1, 10, 32\) float32, expected \(2, 10, 32\)',
        ),
        (lambda a: a.update(actions_1=a['actions_1'] * np.inf), 'actions_1 holds NaN'),
        (lambda a: a.update(prefix_keys=a['prefix_keys'][:2]), 'prefix_keys is .* expected'),
        (lambda a: a.update(prefix_embs=np.array([{}])), 'cannot be read as .npz'),
        (lambda a: [a.pop('v_1'), a.pop('actions_1')], 'no v_N or actions_N to compare with'),
        (
            lambda a: a.update(
                view_mask=a['view_mask'] & False, token_mask=a['token_mask'] & False
            ),
            'every view and every token is masked',
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, edit: Edit, message: str):
    path = edited(tmp_path, edit)
    with pytest.raises(GoldenError, match=message):
        read_golden(path, open_checkpoint(GOLDEN_DIR).config)
    assert run(path) == 2


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 truncated', b'not an archive'])
def test_a_damaged_file_is_status_2_and_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / 'damaged.npz'
    path.write_bytes(content)
    assert run(path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'pi05-ros parity: {path} cannot be read as .npz')
    assert error.count('\n') == 1
    assert 'pickle' not in error


def test_a_truncated_archive_is_status_2(tmp_path: Path):
    path = tmp_path / 'truncated.npz'
    path.write_bytes(SHORT.read_bytes()[:100_000])
    assert run(path) == 2


def test_a_bare_array_and_a_missing_file_are_refused(tmp_path: Path):
    np.save(tmp_path / 'array.npy', np.zeros(3))
    config = open_checkpoint(GOLDEN_DIR).config
    with pytest.raises(GoldenError, match='cannot be read as .npz: it is no such archive'):
        read_golden(tmp_path / 'array.npy', config)
    with pytest.raises(GoldenError, match='does not exist'):
        read_golden(tmp_path / 'nothing.npz', config)
    with pytest.raises(GoldenError, match='cannot be read as .npz'):
        read_golden(tmp_path, config)


def test_a_backend_that_shows_nothing_cannot_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Opaque:
        stage_backends = {'vision': 'opaque'}

        def close(self) -> None:
            pass

    monkeypatch.setattr(parity, 'build_pipeline', lambda *args, **kwargs: Opaque())
    assert run(SHORT) == 2
    assert 'does not show what it computes' in capsys.readouterr().err


def test_tolerances_are_those_of_the_precision():
    assert tolerance_of('prefix_keys', 'float32') == FLOAT32_TOLERANCE
    assert tolerance_of('actions_10', 'bfloat16') == BFLOAT16_TOLERANCE
    assert tolerance_of('prefix_keys', 'bfloat16').accepts(1e9, -1.0)
    assert not FLOAT32_TOLERANCE.accepts(float('nan'), 1.0)
    assert not BFLOAT16_TOLERANCE.accepts(0.0, float('nan'))


def test_precision_is_taken_from_the_name_of_the_file():
    assert precision_of_name(Path('a_bfloat16.npz')) == 'bfloat16'
    assert precision_of_name(Path('a_float32.npz')) == 'float32'
    assert precision_of_name(Path('bfloat16_case.npz')) == 'float32'


@pytest.mark.parametrize(
    'a,b,expected',
    [([1, 2], [2, 4], 1.0), ([1, 0], [0, 1], 0.0), ([0, 0], [0, 0], 1.0), ([0], [1], 0.0)],
)
def test_cosine_of_known_vectors(a: list[int], b: list[int], expected: float):
    assert cosine_similarity(np.array(a), np.array(b)) == pytest.approx(expected)

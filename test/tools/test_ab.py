from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pi05_ros.tools.ab import Result, Variant, table_of, variant
from pi05_ros.tools.ab_plots import save_stages, save_traces, with_gaps
from pi05_ros.tools.action_log import ActionLog
from pi05_ros.tools.cli import main
from pi05_ros.tools.compare import compare
from pi05_ros.tools.report import TIMING_FIELDS, TimingLog


@pytest.fixture(scope='module')
def out(tmp_path_factory: pytest.TempPathFactory, short_bag: Path, tiny_checkpoint: Path) -> Path:
    path = tmp_path_factory.mktemp('ab') / 'new' / 'out'
    status = main([
        'ab', str(short_bag), '--checkpoint', str(tiny_checkpoint), '--rate-hz', '5',
        '--variant', 'eager:float32:3', '--variant', 'eager:float32:1',
        '--variant', 'auto:float32:3', '--out', str(path),
    ])  # fmt: skip
    assert status == 0
    return path


def test_fewer_steps_change_the_actions_and_another_name_does_not(out: Path):
    variants = json.loads((out / 'ab.json').read_text())['variants']
    assert variants['eager:float32:3']['comparison'] is None
    assert variants['auto:float32:3']['comparison']['identical'] is True
    coarser = variants['eager:float32:1']['comparison']
    assert coarser['identical'] is False
    assert 0.9 < coarser['cosine'] < 1.0
    assert all(d['first_action_error'] > 0 for d in coarser['dimensions'])
    digests = {name: found['actions_sha256'] for name, found in variants.items()}
    assert digests['auto:float32:3'] == digests['eager:float32:3'] != digests['eager:float32:1']


def test_one_table_has_latency_cosine_and_both_errors_of_every_joint(short_bag, out: Path):
    reference, coarser = (ActionLog.load(out / f'actions_eager_float32_{n}.npz') for n in (3, 1))
    timing = TimingLog()
    timing.add(dict.fromkeys(TIMING_FIELDS, 2.0))
    results = [
        Result(variant('eager:float32:3'), reference, timing, None),
        Result(variant('eager:float32:1'), coarser, timing, compare(reference, coarser)),
    ]
    console = Console(width=110, record=True)
    console.print(table_of(results))
    lines = console.export_text().splitlines()
    cells = {' '.join(line.split()[:-2]): line.split()[-2:] for line in lines}
    assert cells['inference P50 ms'] == ['2.00', '2.00']
    assert cells['cosine'] == ['-', f'{results[1].comparison.cosine:.8f}']
    for dimension in results[1].comparison.dimensions:
        name = f'{dimension.name} {dimension.unit}'
        assert cells[f'MAE {name}'] == ['-', f'{dimension.mean_abs_error:.3g}']
        assert cells[f'first action {name}'] == ['-', f'{dimension.first_action_error:.3g}']


def test_no_line_spans_skipped_ticks(out: Path):
    seconds, values = with_gaps(np.array([0, 1, 4, 5]), np.arange(4.0), np.arange(4.0))
    assert (
        np.isnan(seconds).tolist()
        == np.isnan(values).tolist()
        == [False, False, True, False, False]
    )


def test_what_ran_is_told_not_what_was_asked_for(out: Path):
    variants = json.loads((out / 'ab.json').read_text())['variants']
    assert variants['eager:float32:1']['ran'].startswith('eager float32 ')


def test_actions_of_each_variant_are_kept(out: Path):
    log = ActionLog.load(out / 'actions_eager_float32_1.npz')
    variants = json.loads((out / 'ab.json').read_text())['variants']
    assert log.sha256 == variants['eager:float32:1']['actions_sha256']


@pytest.mark.parametrize('name', ['traces.png', 'stages.png'])
def test_pictures_hold_more_than_a_background(out: Path, name: str):
    with Image.open(out / name) as picture:
        assert picture.width > 800
        assert len(np.unique(np.asarray(picture.convert('RGB')).reshape(-1, 3), axis=0)) > 20


def test_pictures_stand_an_action_that_never_moves_and_a_stage_that_was_not_measured(tmp_path):
    still = ActionLog(
        ('grip',), ('1',), np.zeros((1, 2, 1), np.float32), *[np.zeros(1, np.int64)] * 3
    )
    save_traces({'a': still, 'b': still}, tmp_path / 'traces.png')
    timing = TimingLog()
    timing.add(dict.fromkeys(TIMING_FIELDS, float('nan')) | {'total_ms': 2.0})
    save_stages({'a': timing}, tmp_path / 'stages.png')


def test_variant_is_parsed():
    assert variant('cuda:bfloat16:10') == Variant('cuda', 'bfloat16', 10)


@pytest.mark.parametrize('text', ['eager', 'eager:float32', 'eager:float32:0', 'gpu:float32:3'])
def test_other_variants_are_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match='is not BACKEND:PRECISION:STEPS'):
        variant(text)


def test_one_variant_is_refused(short_bag: Path, capsys):
    for variants in (['eager:float32:1'], ['eager:float32:1', 'eager:float32:1']):
        options = [word for name in variants for word in ('--variant', name)]
        assert main(['ab', str(short_bag), *options]) == 2
        assert 'give two or more different variants' in capsys.readouterr().err


def test_variant_that_cannot_run_is_named(short_bag, tiny_checkpoint, capsys):
    options = ['--variant', 'eager:float32:1', '--variant', 'eager:float32:11']
    status = main(['ab', str(short_bag), '--checkpoint', str(tiny_checkpoint), *options])
    assert status == 2
    assert 'variant eager:float32:11: num_steps must be 1 to 10' in capsys.readouterr().err

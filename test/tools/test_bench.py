"""``pi05-ros bench``: floors against published figures, and a whole run on the CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pi05_ros.model.config import Pi05Config
from pi05_ros.tools import measure, roofline
from pi05_ros.tools.cli import main
from pi05_ros.tools.roofline import Ceilings, stage_floors_ms

FULL = Pi05Config.full()


def test_operations_are_those_that_others_counted():
    """Two independent counts for three views and 200 tokens (docs/performance.md)."""
    assert roofline.vision_work(FULL, 3, 2).flops == pytest.approx(660.53e9, rel=1e-4)
    assert roofline.prefill_work(FULL, 968, 2).flops == pytest.approx(3756.15e9, rel=1e-4)
    assert roofline.step_work(FULL, 712, 50, 2).flops == pytest.approx(36.8e9, rel=2e-3)


def test_floors_at_the_h200s_ceilings():
    floors = stage_floors_ms(FULL, 2, 200, 50, 10, 2, Ceilings(4.3e12, 790e12))
    expected = {'vision': 0.557, 'prefill': 3.465, 'denoise': 1.481, 'total': 5.50}
    assert floors == pytest.approx(expected, rel=2e-3)


def test_a_line_through_the_steps_and_its_error():
    line = measure.fit_steps({1: 3.0, 2: 4.0, 3: 5.0})
    assert (line.fixed_ms, line.per_step_ms) == pytest.approx((2.0, 1.0))
    assert line.max_error_percent == pytest.approx(0.0, abs=1e-9)
    assert measure.fit_steps({1: 3.0, 2: 4.0, 3: 8.0}).max_error_percent > 10


@pytest.fixture
def options(tmp_path):
    return [
        'bench', '--size', 'tiny', '--device', 'cpu', '--backend', 'eager', '--precision',
        'float32', '--views', '1', '--prompt-tokens', '5', '--horizon', '4', '--steps', '2',
        '--image-size', '32x24', '--iterations', '2', '--json', str(tmp_path / 'bench.json'),
    ]  # fmt: skip


def test_a_run_on_the_cpu_reports_every_stage(options, tmp_path, capsys):
    assert main([*options, '--plot', str(tmp_path / 'bench.png')]) == 0
    printed = capsys.readouterr().out
    for word in ('1 view, 5 tokens, horizon 4, 2 steps', 'p99', 'floor', 'prompt change',
                 'start-up', 'per step, off by at most'):  # fmt: skip
        assert word in printed
    report = json.loads((tmp_path / 'bench.json').read_text())
    (case,) = report['cases']
    assert set(case['timing']['percentiles_ms']) >= {'vision', 'prefill', 'denoise', 'total'}
    assert case['cosine'] == pytest.approx(1.0)
    assert set(report['builds'][0]['stage_backends'].values()) == {'eager'}
    assert list(report['sweeps'][0]['total_ms']) == ['1', '2', '3', '5', '10']
    assert (tmp_path / 'bench.png').read_bytes().startswith(b'\x89PNG')


def test_parts_can_be_left_out(options, tmp_path, capsys):
    assert main([*options, '--no-oracle', '--no-sweep']) == 0
    report = json.loads((tmp_path / 'bench.json').read_text())
    assert report['sweeps'] == [] and report['cases'][0]['oracle'] is None
    assert 'times the oracle' not in capsys.readouterr().out


def test_a_checkpoint_gives_the_dimensions(options, tiny_checkpoint, tmp_path):
    arguments = ['bench', '--checkpoint', str(tiny_checkpoint), *options[3:]]
    assert main([*arguments, '--no-sweep']) == 0
    report = json.loads((tmp_path / 'bench.json').read_text())
    assert report['subject']['weights'] == str(tiny_checkpoint)


def test_the_cuda_backend_without_a_gpu_is_an_error(options, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    arguments = [*options, '--backend', 'cuda', '--device', 'auto']
    assert main(arguments) == 2
    assert "backend 'cuda' needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize('wrong', ['0', 'x'])
def test_a_bad_count_is_a_usage_error(options, wrong, capsys):
    with pytest.raises(SystemExit):
        main([*options, '--views', wrong])
    assert 'not a positive whole number' in capsys.readouterr().err


@pytest.mark.parametrize('option', ['--json', '--plot'])
def test_a_file_that_cannot_be_written_is_refused_before_the_run(
    options, option, tmp_path, capsys
):
    nowhere = tmp_path / 'nowhere' / 'bench'
    for path, reason in ((nowhere, f'{nowhere.parent} is not a directory'), (tmp_path, 'it is a')):
        with pytest.raises(SystemExit):
            main([*options, option, str(path)])
        found = capsys.readouterr()
        assert f'cannot write {path}: {reason}' in found.err
        assert not found.out


def test_images_lie_where_the_pipeline_has_its_own():
    drawn = measure.draw_inputs([(6, 8), (4, 4)], 100, 5, (2, 3))
    buffers = []

    class Pipeline:
        def image_buffer(self, num_bytes):
            buffers.append(np.zeros(num_bytes + 7, dtype=np.uint8))
            return buffers[-1]

    lent = drawn.lent_by(Pipeline())
    for image, before, buffer in zip(lent.images, drawn.images, buffers, strict=True):
        assert np.shares_memory(image, buffer)
        assert np.array_equal(image, before)
    assert lent.tokens is drawn.tokens

"""``pi05-ros tune`` without a GPU: what it asks of a pipeline; a start finds the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pi05_ros.engine import chips, cuda_pipeline, denoise_tuning
from pi05_ros.engine.autotune import TunedKernel
from pi05_ros.engine.chips import Chip
from pi05_ros.engine.denoise_layers import row_block
from pi05_ros.engine.denoise_tuning import DenoiseTuning, load_denoise_tuning
from pi05_ros.engine.tuning import TunedChoices, load_choices
from pi05_ros.tools import cli, tune

GPU = 'NVIDIA Test 9000'
CHIP = Chip((4, 2), 77)
FOUND = DenoiseTuning(merge_warps=4, pdl=False)


class FakePipeline:
    """Answers with one choice per number of views, and with one tuning of the denoise."""

    calls: list[tuple[str, int]] = []

    def __init__(self, state, config, shape, precision, device) -> None:
        self.config, self.shape, self.views = config, shape, len(shape.view_sizes_px)

    def tune(self):
        self.calls.append(('tune', self.views))
        kernel = TunedKernel(f'vision-{self.views}', 2.0, 1.0, 3)
        return TunedChoices(GPU, kernels={f'vision-{self.views}': {'warps': 8}}), [kernel]

    def infer(self, images, tokens, noise):
        assert noise.shape == (self.shape.horizon, self.config.action_dim)
        self.calls.append(('infer', self.views))

    def tune_denoise(self):
        self.calls.append(('denoise', self.views))
        return FOUND, TunedKernel('denoise step', 700.0, 600.0, 50)

    def close(self):
        self.calls.append(('close', self.views))


@pytest.fixture
def gpu(tmp_path, monkeypatch) -> Path:
    """Return the empty cache of a machine with a GPU that nobody tuned."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: GPU)
    monkeypatch.setattr(tune, 'choose_backend', lambda backend, device: ('cuda', 'cuda'))
    monkeypatch.setattr(tune, 'random_state', lambda config, device: {})
    monkeypatch.setattr(cuda_pipeline, 'CudaPipeline', FakePipeline)
    monkeypatch.setattr(denoise_tuning, 'chip_of', lambda device: CHIP)
    monkeypatch.setattr(FakePipeline, 'calls', [])
    return tmp_path


def load(config):
    rows = row_block(config.action_horizon)
    return load_denoise_tuning(torch.device('cuda'), config.expert, rows)


def test_a_start_finds_what_one_command_tuned(gpu, tiny_checkpoint, capsys):
    config = tune.open_checkpoint(tiny_checkpoint).config
    assert load(config) == DenoiseTuning()
    assert cli.main(['tune', '--checkpoint', str(tiny_checkpoint), '--views', '1', '3']) == 0
    assert FakePipeline.calls == [
        ('tune', 1), ('close', 1), ('tune', 3), ('infer', 3), ('denoise', 3), ('close', 3),
    ]  # fmt: skip
    assert load(config) == FOUND
    found = load_choices(GPU, CHIP)
    assert found.kernels == {'vision-1': {'warps': 8}, 'vision-3': {'warps': 8}}
    shown = capsys.readouterr().out.replace('\n', '')
    assert 'denoise step' in shown and 'vision-3' in shown
    assert all(str(chips.user_path(kind, GPU)) in shown for kind in ('prefix', 'denoise'))


def test_a_folder_of_choice_leaves_the_cache_alone(gpu, tiny_checkpoint, tmp_path):
    folder = tmp_path / 'elsewhere'
    cli.main(['tune', '--checkpoint', str(tiny_checkpoint), '--output', str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        'denoise_nvidia_test_9000.json', 'prefix_nvidia_test_9000.json',
    ]  # fmt: skip
    assert load(tune.open_checkpoint(tiny_checkpoint).config) == DenoiseTuning()


def test_a_denoise_without_choices_is_said_and_nothing_written(
    gpu, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(FakePipeline, 'tune_denoise', lambda self: None)
    folder = tmp_path / 'elsewhere'
    cli.main(['tune', '--checkpoint', str(tiny_checkpoint), '--output', str(folder)])
    assert [path.name for path in folder.iterdir()] == ['prefix_nvidia_test_9000.json']
    assert 'the denoise runs the Hopper kernels' in capsys.readouterr().out.replace('\n', '')

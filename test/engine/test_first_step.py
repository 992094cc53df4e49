"""The first Euler step beside the prefill: the order of what is enqueued, and the same bits."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from plain_pipeline import CPU

from pi05_ros.engine.cuda_pipeline import CudaPipeline
from pi05_ros.engine.denoise import DenoiseStage
from pi05_ros.engine.denoise_tuning import AttentionTiling, DenoiseTuning, GemmTiling
from pi05_ros.engine.first_step import FirstStepBesidePrefill
from pi05_ros.engine.ops import PlainOps
from pi05_ros.engine.pipeline import BackendError, PipelineShape
from pi05_ros.engine.prefill import PrefillStage
from pi05_ros.engine.weights import pack_prefill
from pi05_ros.model.checkpoint import load_state, open_checkpoint
from pi05_ros.model.config import Pi05Config

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='a GPU runs test_cuda_pipeline.py instead'
)

_DEPTH, _TOKENS, _IMAGE_ROWS = 2, 6, 8
# Few, large blocks: the interpreter pays per program.
_TUNING = DenoiseTuning(
    attention=AttentionTiling(rows=32, keys=32, splits=2),
    attention_out=GemmTiling(columns=64, depth=256),
    gate_up=GemmTiling(columns=256, depth=64),
    down=GemmTiling(columns=64, depth=128),
)


class Recorder:
    """Two streams on a CPU: what is enqueued runs at once, and is noted with its stream."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple] = []
        self.now = 'main'
        monkeypatch.setattr(torch.cuda, 'stream', self._on)

    @contextmanager
    def _on(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before


class FakeStream:
    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self._recorder = name, recorder

    def wait_stream(self, other: FakeStream) -> None:
        self._recorder.log.append((self.name, 'waits for', other.name))


@pytest.fixture(scope='module')
def stages(golden_dir):
    """Return a prefill and a denoise over its cache, of two layers."""
    checkpoint = open_checkpoint(golden_dir)
    full = checkpoint.config
    config = replace(
        full,
        vlm=replace(full.vlm, depth=_DEPTH),
        expert=replace(full.expert, depth=_DEPTH),
    )
    lengths = torch.tensor([_TOKENS, _IMAGE_ROWS + _TOKENS], dtype=torch.int32)
    prefill = PrefillStage(
        pack_prefill(load_state(checkpoint), config, torch.float32, CPU),
        config,
        PlainOps(),
        num_image_rows=_IMAGE_ROWS,
        max_prompt_tokens=_TOKENS,
        lengths=lengths,
        tokens=torch.arange(_TOKENS, dtype=torch.int32),
    )
    generator = torch.Generator().manual_seed(5)
    prefill.prefix[:_IMAGE_ROWS].normal_(generator=generator)
    denoise = DenoiseStage(
        load_state(checkpoint),
        config,
        keys=prefill.keys,
        values=prefill.values,
        n_prefix=prefill.num_prefix,
        horizon=3,
        max_steps=2,
        dtype=torch.float32,
        kernels='triton',
    )
    denoise.use_tuning(_TUNING)
    denoise.noise.normal_(generator=generator)
    return prefill, denoise


def note_launches(recorder, monkeypatch, prefill, denoise):
    """Note each filled cache and each first layer, with the stream that it is enqueued on."""
    fill, begin, layer_of = prefill._fill_cache, denoise.launch_begin, denoise.launch_first_layer

    def noted(name, call):
        def run(*args):
            recorder.log.append((recorder.now, name, *args[:1]))
            call(*args)

        return run

    monkeypatch.setattr(prefill, '_fill_cache', noted('cache', fill))
    monkeypatch.setattr(denoise, 'launch_begin', noted('begin', begin))
    monkeypatch.setattr(denoise, 'launch_first_layer', noted('layer', layer_of))


@torch.inference_mode()
def test_a_layer_follows_its_cache_on_the_side_stream_and_the_main_stream_joins(
    stages, monkeypatch
):
    prefill, denoise = stages
    recorder = Recorder(monkeypatch)
    note_launches(recorder, monkeypatch, prefill, denoise)
    main, side = FakeStream('main', recorder), FakeStream('side', recorder)
    FirstStepBesidePrefill(prefill, denoise, main, side).launch(prefill.buckets[-1])
    assert recorder.log == [
        ('side', 'waits for', 'main'),
        ('side', 'begin'),
        ('main', 'cache', 0),
        ('side', 'waits for', 'main'),
        ('side', 'layer', 0),
        ('main', 'cache', 1),
        ('side', 'waits for', 'main'),
        ('side', 'layer', 1),
        ('main', 'waits for', 'side'),
    ]


@torch.inference_mode()
@pytest.mark.parametrize('num_steps', [1, 2])
def test_the_actions_are_the_same_bits_as_one_after_the_other(stages, monkeypatch, num_steps):
    prefill, denoise = stages
    rows = prefill.buckets[-1]
    prefill.launch(rows)
    denoise.launch(num_steps)
    expected = denoise.actions.clone()
    prefill.keys.fill_(float('nan'))
    prefill.values.fill_(float('nan'))
    recorder = Recorder(monkeypatch)
    main, side = FakeStream('main', recorder), FakeStream('side', recorder)
    FirstStepBesidePrefill(prefill, denoise, main, side).launch(rows)
    denoise.actions.fill_(float('nan'))
    denoise.launch_after_first_layers(num_steps)
    assert torch.equal(denoise.actions, expected)


def test_an_unknown_overlap_is_refused():
    shape = PipelineShape(((224, 224),), 8, 10)
    with pytest.raises(BackendError, match="one of .*'yielding'.*, got 'always'"):
        CudaPipeline({}, Pi05Config.tiny(), shape, overlap_first_step='always')

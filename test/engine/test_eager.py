from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pi05_ros.engine.eager import EagerPipeline
from pi05_ros.engine.pipeline import STAGES, BackendError, PipelineShape
from pi05_ros.engine.trace import Traceable
from pi05_ros.model.checkpoint import load_model, open_checkpoint

GOLDEN_DIR = Path(__file__).parents[1] / 'data' / 'golden' / 'pi05_tiny'
SHAPE = PipelineShape(((224, 224), (120, 160)), max_prompt_tokens=40, horizon=10, num_steps=3)


@pytest.fixture(scope='module')
def pipeline() -> EagerPipeline:
    return EagerPipeline(load_model(open_checkpoint(GOLDEN_DIR), 'cpu', 'float32'), SHAPE)


@pytest.fixture
def call() -> dict[str, object]:
    rng = np.random.default_rng(0)
    return {
        'images': [rng.integers(0, 256, (*size, 3), np.uint8) for size in SHAPE.view_sizes_px],
        'tokens': rng.integers(0, 512, 30),
        'noise': rng.standard_normal((10, 32), np.float32),
    }


def golden(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN_DIR / f'{case}.npz'))


@pytest.mark.parametrize('steps', [1, 3, 10])
def test_actions_are_openpis(pipeline: EagerPipeline, steps: int):
    case = golden('two_views_37_tokens_float32')
    built = EagerPipeline(pipeline._model, PipelineShape(((224, 224),) * 2, 37, 10))
    result = built.infer(
        list(case['images_u8'][:2]), case['tokens'][:37], case['noise'], num_steps=steps
    )
    np.testing.assert_allclose(result.actions, case[f'actions_{steps}'], atol=2e-5)


def test_trace_ends_in_the_actions_of_infer(pipeline: EagerPipeline):
    case = golden('two_views_37_tokens_float32')
    views, tokens = case['images_u8'][:2], case['tokens'][:37]
    built = EagerPipeline(pipeline._model, PipelineShape(((224, 224),) * 2, 37, 10))
    trace = built.trace(views, tokens, case['noise'], 3)
    result = built.infer(list(views), tokens, case['noise'], 3)
    assert isinstance(built, Traceable)
    np.testing.assert_array_equal(trace.actions, result.actions)
    np.testing.assert_allclose(trace.keys, case['prefix_keys'], atol=2e-5)
    np.testing.assert_allclose(trace.velocities, case['v_3'], atol=2e-5)


def test_step_count_of_the_shape_is_the_default(pipeline: EagerPipeline, call: dict):
    np.testing.assert_array_equal(
        pipeline.infer(**call).actions, pipeline.infer(**call, num_steps=3).actions
    )


def test_a_call_leaves_nothing_for_the_next(pipeline: EagerPipeline, call: dict):
    """Stale information kills a policy: two different calls must not influence each other."""
    first = pipeline.infer(**call).actions
    other = call | {'tokens': call['tokens'][:5], 'noise': -call['noise']}
    pipeline.infer(**other)
    np.testing.assert_array_equal(pipeline.infer(**call).actions, first)


@pytest.mark.parametrize('threads', [1, 3])
def test_processes_with_any_number_of_threads_give_the_same_bits(
    pipeline: EagerPipeline, call: dict, threads: int
):
    """Replaying a bag must give the actions of the live run, whatever OMP_NUM_THREADS says."""
    program = f"""
import hashlib, numpy as np, torch
torch.set_num_threads({threads})
from pi05_ros.engine.eager import EagerPipeline
from pi05_ros.engine.pipeline import PipelineShape
from pi05_ros.model.checkpoint import load_model, open_checkpoint
rng = np.random.default_rng(0)
images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in {SHAPE.view_sizes_px}]
tokens, noise = rng.integers(0, 512, 30), rng.standard_normal((10, 32), np.float32)
model = load_model(open_checkpoint({str(GOLDEN_DIR)!r}), 'cpu', 'float32')
pipeline = EagerPipeline(model, PipelineShape({SHAPE.view_sizes_px}, 40, 10, 3))
print(pipeline.infer(images, tokens, noise).actions.tobytes().hex())
"""
    run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == pipeline.infer(**call).actions.tobytes().hex()


def test_every_stage_is_timed_and_reports_its_backend(pipeline: EagerPipeline, call: dict):
    times = pipeline.infer(**call).times.as_dict()
    total_ms = times.pop('total_ms')
    assert all(time_ms > 0.0 for time_ms in times.values())
    assert total_ms == pytest.approx(sum(times.values()))
    assert pipeline.stage_backends == dict.fromkeys(STAGES, 'eager')
    assert (pipeline.device, pipeline.precision) == ('cpu', 'float32')


@pytest.mark.parametrize('token', [-1, 512])
def test_a_token_outside_the_vocabulary_is_refused(
    pipeline: EagerPipeline, call: dict, token: int
):
    call['tokens'][3] = token
    with pytest.raises(BackendError, match=f'token {token} is outside the vocabulary of 512'):
        pipeline.infer(**call)


@pytest.mark.parametrize(
    'change,message',
    [
        ({'images': []}, r'images are \(\) \(height, width\)'),
        ({'tokens': np.arange(41)}, r'expected 1 to 40 prompt tokens, got shape \(41,\)'),
        ({'noise': np.zeros((9, 32), np.float32)}, r'noise must be \(10, 32\) float32'),
        ({'num_steps': 11}, 'num_steps 11 is outside 1 to 10'),
    ],
    ids=['no views', 'long prompt', 'horizon', 'steps'],
)
def test_a_call_outside_the_shape_is_refused(
    pipeline: EagerPipeline, call: dict, change: dict, message: str
):
    with pytest.raises(BackendError, match=message):
        pipeline.infer(**(call | change))


def test_thread_count_of_the_process_is_left_as_it_was(pipeline: EagerPipeline, call: dict):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        pipeline.infer(**call)
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_inputs_may_be_read_only_and_stay_as_they_were(pipeline: EagerPipeline, call: dict):
    arrays = [*call['images'], call['tokens'], call['noise']]
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    pipeline.infer(**call)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))

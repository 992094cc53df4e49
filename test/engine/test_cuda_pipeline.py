"""The CUDA pipeline against the oracle, at the released model's dimensions, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pi05_ros.engine.eager import EagerPipeline
from pi05_ros.engine.pipeline import BackendError, PipelineShape
from pi05_ros.engine.selfcheck import SelfCheckError, compare_stages, refuse_below
from pi05_ros.model.checkpoint import load_state, open_checkpoint
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.names import model_name
from pi05_ros.model.pi05 import Pi05Model
from pi05_ros.tools.measure import cosine, draw_inputs
from pi05_ros.tools.random_weights import random_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU'),
]

CONFIG = Pi05Config.full()
CAMERA_PX = (480, 640)
SHAPES = [(1, 50), (2, 50), (3, 50), (2, 10), (2, 15)]
PROMPTS = (5, 40, 121, 200)
STEPS = (1, 3, 10)


def make_oracle(state):
    with torch.device('meta'):
        model = Pi05Model(CONFIG)
    model.load_state_dict({model_name(n): t for n, t in state.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def make_shape(views, horizon):
    return PipelineShape((CAMERA_PX,) * views, CONFIG.max_prompt_tokens, horizon)


def make_inputs(views, horizon, tokens=200, seed=0):
    return draw_inputs(
        (CAMERA_PX,) * views, CONFIG.vocab_size, tokens, (horizon, CONFIG.action_dim), seed
    )


def call(pipeline, inputs, steps=10):
    return pipeline.infer(inputs.images, inputs.tokens, inputs.noise, steps).actions


@pytest.fixture(scope='module')
def state():
    return random_state(CONFIG, 'cuda')


@pytest.fixture(scope='module')
def oracle(state):
    return make_oracle(state)


@pytest.fixture(scope='module')
def exact(state):
    return make_oracle({name: tensor.float() for name, tensor in state.items()})


@pytest.fixture(scope='module')
def build(state):
    """Return a function that builds (and keeps) the pipeline of a shape."""
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

    built = {}

    def get(views, horizon):
        if (views, horizon) not in built:
            shape = make_shape(views, horizon)
            built[views, horizon] = CudaPipeline(dict(state), CONFIG, shape)
        return built[views, horizon]

    yield get
    for pipeline in built.values():
        pipeline.close()


@pytest.mark.parametrize(('views', 'horizon'), SHAPES, ids=lambda value: str(value))
def test_actions_agree_with_the_oracle(build, oracle, exact, views, horizon):
    """Cosine 0.9999 against the bfloat16 oracle and 0.999 against float32."""
    pipeline, shape = build(views, horizon), make_shape(views, horizon)
    eager, exact_eager = EagerPipeline(oracle, shape), EagerPipeline(exact, shape)
    hopper = torch.cuda.get_device_capability()[0] == 9
    kernels = 'cuda-hopper' if hopper else 'cuda'
    assert pipeline.stage_backends == dict.fromkeys(('vision', 'prefill', 'denoise'), kernels)
    before = pipeline.calls
    worst = {}
    for tokens in PROMPTS:
        for steps in STEPS:
            inputs = make_inputs(views, horizon, tokens, seed=tokens)
            actions = call(pipeline, inputs, steps)
            assert np.isfinite(actions).all()
            worst[tokens, steps] = (
                cosine(actions, call(eager, inputs, steps)),
                cosine(actions, call(exact_eager, inputs, steps)),
            )
    assert pipeline.calls == before + len(worst)
    lowest = np.array(list(worst.values())).min(axis=0)
    print(f'\n{views} views, horizon {horizon}: lowest cosine {lowest[0]:.6f} to the oracle, '
          f'{lowest[1]:.6f} to float32')  # fmt: skip
    assert lowest[0] >= 0.9999 and lowest[1] >= 0.999, worst


def test_every_stage_agrees_with_the_oracle(build, oracle):
    inputs = make_inputs(2, 50, 60)
    checks = compare_stages(build(2, 50), oracle, inputs.images, inputs.tokens, inputs.noise)
    print('\n' + '\n'.join(str(check) for check in checks))
    refuse_below(checks, 0.999)


def test_a_wrong_weight_fails_the_self_check(state, oracle):
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

    wrong = dict(state)
    name = next(n for n in wrong if n.endswith('language_model.layers.3.self_attn.k_proj.weight'))
    wrong[name] = wrong[name].flip(0).contiguous()
    pipeline = CudaPipeline(wrong, CONFIG, replace(make_shape(1, 10), num_steps=1, max_steps=1))
    inputs = make_inputs(1, 10, 20)
    checks = compare_stages(pipeline, oracle, inputs.images, inputs.tokens, inputs.noise)
    pipeline.close()
    with pytest.raises(SelfCheckError, match='prefill below the cosine'):
        refuse_below(checks, 0.999)


@pytest.mark.parametrize('horizon', [50, 15, 10])
def test_actions_are_bit_identical_from_call_to_call(build, horizon):
    pipeline, inputs = build(2, horizon), make_inputs(2, horizon)
    first = call(pipeline, inputs)
    call(pipeline, make_inputs(2, horizon, 9, seed=5), 3)
    for _ in range(200):  # a race showed in one of three hundred
        assert np.array_equal(call(pipeline, inputs), first)


def test_calls_in_turn_change_no_bit_of_each_other(build):
    """Calls with one input hide whatever is left of the call before: it is the same."""
    pipeline, prompts, turns = build(2, 50), (9, 40, 200), 50
    cases = [make_inputs(2, 50, tokens, seed=tokens) for tokens in prompts]
    expected = [call(pipeline, inputs, 1) for inputs in cases]
    other = []
    for turn in range(turns):
        for tokens, inputs, actions in zip(prompts, cases, expected, strict=True):
            error = np.abs(call(pipeline, inputs, 1) - actions).max()
            if error:
                other.append(f'turn {turn}, {tokens} tokens: {error:.1e}')
    assert not other, f'{len(other)} of {turns * len(cases)} calls differ: {other[:5]}'


@pytest.mark.parametrize('tokens', [5, 9, 40, 121, 199])
def test_no_bit_tells_what_the_prefill_held_before(build, tokens):
    """Rows beyond the prompt are computed with whatever the calls before left there."""
    pipeline, inputs = build(2, 50), make_inputs(2, 50, tokens, seed=tokens)
    stage, expected = pipeline.prefill, call(pipeline, inputs, 1)
    held = (stage.prefix, stage.x, stage.q, stage.attended, stage.hidden, stage.keys, stage.values)
    for seed in range(5):
        generator = torch.Generator('cuda').manual_seed(seed)
        with torch.inference_mode():  # as they were made
            for buffer in held:
                buffer.normal_(generator=generator)
        torch.cuda.synchronize()
        assert np.array_equal(call(pipeline, inputs, 1), expected)


def test_a_rehearsal_changes_no_bit_and_the_host_is_lent_out_once_per_call(build):
    pipeline, inputs, other = build(2, 50), make_inputs(2, 50), make_inputs(2, 50, 9, seed=5)
    expected, lent = call(pipeline, inputs), []
    pipeline.rehearse(other.images, other.tokens, other.noise, 3)
    found = pipeline.infer(
        inputs.images, inputs.tokens, inputs.noise, 10, lambda: lent.append(pipeline.calls)
    )
    assert np.array_equal(found.actions, expected)
    assert lent == [pipeline.calls - 1]


def test_two_pipelines_give_the_same_bits(build, state):
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

    inputs, other = make_inputs(2, 50), CudaPipeline(dict(state), CONFIG, make_shape(2, 50))
    assert np.array_equal(call(other, inputs), call(build(2, 50), inputs))
    other.close()


def test_the_graphs_compute_what_their_kernels_do(build):
    pipeline, inputs = build(2, 50), make_inputs(2, 50, 70)
    expected = call(pipeline, inputs, 3)
    with torch.inference_mode(), torch.cuda.stream(pipeline._stream):
        pipeline._inputs.send_images(inputs.images)
        pipeline._inputs.send_rest(inputs.tokens, inputs.noise, 512)
        pipeline.launch_prefix(pipeline.prefill.bucket(70))
        pipeline.denoise.launch(3)
    torch.cuda.synchronize()
    assert np.array_equal(pipeline.denoise.actions.cpu().numpy(), expected)


def test_nothing_synchronises_in_a_call(build):
    pipeline, inputs = build(2, 50), make_inputs(2, 50)
    call(pipeline, inputs)
    torch.cuda.set_sync_debug_mode('error')
    try:
        call(pipeline, inputs)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_a_call_allocates_no_device_memory(build):
    pipeline, inputs = build(2, 50), make_inputs(2, 50)
    call(pipeline, inputs)
    before = torch.cuda.memory_stats()['allocation.all.allocated']
    for tokens in (200, 33, 77):
        call(pipeline, inputs.with_tokens(tokens))
    assert torch.cuda.memory_stats()['allocation.all.allocated'] == before


def in_lent_memory(pipeline, images):
    """Return the images as they lie in messages in page-locked memory, at no round address."""
    found = []
    for image in images:
        memory = pipeline.image_buffer(image.nbytes + 100)
        assert torch.from_numpy(memory).is_pinned()
        memory[61 : 61 + image.nbytes] = image.ravel()
        payload = memoryview(memory)[: 61 + image.nbytes].toreadonly()
        found.append(np.ndarray(image.shape, np.uint8, buffer=payload, offset=61))
    return found


@pytest.mark.parametrize('lent', [(0,), (1,), (0, 1)], ids=str)
def test_images_in_page_locked_memory_give_the_same_bits_without_a_copy(build, lent):
    pipeline, inputs = build(2, 50), make_inputs(2, 50)
    expected = call(pipeline, inputs)
    call(pipeline, make_inputs(2, 50, seed=7))
    before = pipeline._inputs._staged_images.copy()
    pinned = in_lent_memory(pipeline, inputs.images)
    images = [pinned[i] if i in lent else image for i, image in enumerate(inputs.images)]
    assert np.array_equal(call(pipeline, replace(inputs, images=images)), expected)
    after = pipeline._inputs._staged_images
    size = inputs.images[0].nbytes
    for view in range(2):
        part = slice(view * size, (view + 1) * size)
        assert np.array_equal(after[part], before[part]) == (view in lent)
    assert np.array_equal(call(pipeline, inputs), expected)


def test_a_message_that_changes_after_the_call_changes_nothing(build):
    pipeline, inputs = build(2, 50), make_inputs(2, 50)
    expected = call(pipeline, inputs)
    memory = [pipeline.image_buffer(image.nbytes) for image in inputs.images]
    for buffer, image in zip(memory, inputs.images, strict=True):
        buffer[:] = image.ravel()
    pinned = [buffer.reshape(*CAMERA_PX, 3) for buffer in memory]
    for _ in range(5):
        assert np.array_equal(call(pipeline, replace(inputs, images=pinned)), expected)
        for buffer, image in zip(memory, inputs.images, strict=True):
            buffer[:] = 0
            buffer[:] = image.ravel()


def test_nothing_synchronises_in_a_call_with_page_locked_images(build):
    pipeline, inputs = build(2, 50), make_inputs(2, 50)
    pinned = replace(inputs, images=in_lent_memory(pipeline, inputs.images))
    call(pipeline, pinned)
    torch.cuda.set_sync_debug_mode('error')
    try:
        call(pipeline, pinned)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_padded_rows_do_not_change_actions(build):
    """The same prompt through a longer captured prefill than it needs."""
    pipeline, inputs = build(2, 50), make_inputs(2, 50, 20)
    expected = call(pipeline, inputs, 3)
    with torch.inference_mode(), torch.cuda.stream(pipeline._stream):
        pipeline._inputs.send_images(inputs.images)
        pipeline._inputs.send_rest(inputs.tokens, inputs.noise, 512)
        pipeline.launch_prefix(pipeline.prefill.buckets[-1])
        pipeline.denoise.launch(3)
    torch.cuda.synchronize()
    found = pipeline.denoise.actions.cpu().numpy()
    assert cosine(found, expected) > 0.9999


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('case', ['two_views_37_tokens', 'three_views_200_tokens'])
def test_golden_data_of_the_tiny_model(golden_dir, case, precision):
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

    checkpoint = open_checkpoint(golden_dir)
    golden = np.load(golden_dir / f'{case}_{precision}.npz')
    views = golden['images_u8'][golden['view_mask']]
    tokens = golden['tokens'][golden['token_mask']]
    px = checkpoint.config.vision.image_px
    shape = PipelineShape(((px, px),) * len(views), 200, golden['noise'].shape[0])
    weights = load_state(checkpoint, 'cuda', precision)
    pipeline = CudaPipeline(weights, checkpoint.config, shape, precision)
    trace = pipeline.trace(views, tokens, golden['noise'], 10)
    pipeline.close()
    least = 0.99999 if precision == 'float32' else 0.9995
    for name, found in (
        ('prefix_embs', trace.prefix_embs),
        ('prefix_keys', trace.keys),
        ('prefix_values', trace.values),
        ('v_10', trace.velocities),
        ('actions_10', trace.actions),
    ):
        assert cosine(found, golden[name]) >= least, name


def test_tuning_times_every_linear_layer_of_both_stages(golden_dir):
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

    checkpoint = open_checkpoint(golden_dir)
    shape = PipelineShape(((224, 224),), 8, 10, 1, 1)
    weights = load_state(checkpoint, 'cuda', 'bfloat16')
    pipeline = CudaPipeline(weights, checkpoint.config, shape)
    choices, results = pipeline.tune()
    pipeline.close()
    assert {result.key.split('-')[0] for result in results} >= {'vision_attention', '264x128'}
    assert all(result.best_us <= result.default_us for result in results)
    assert choices.cublaslt_version


def test_tuning_of_the_denoise_leaves_the_stage_with_what_it_returns(golden_dir):
    from pi05_ros.engine.cuda_pipeline import CudaPipeline

    checkpoint = open_checkpoint(golden_dir)
    shape = PipelineShape(((224, 224),), 8, 10, 3, 3)
    weights = load_state(checkpoint, 'cuda', 'bfloat16')
    pipeline = CudaPipeline(weights, checkpoint.config, shape)
    config = checkpoint.config
    inputs = draw_inputs(((224, 224),), config.vocab_size, 8, (10, config.action_dim))
    call(pipeline, inputs, 3)
    found, step = pipeline.tune_denoise(seconds=20.0)
    assert found == pipeline.denoise.tuning
    assert step.tried and step.best_us > 0
    pipeline.close()


def test_a_call_leaves_the_callers_stream_current(build):
    pipeline, inputs = build(2, 50), make_inputs(2, 50)
    expected, own = call(pipeline, inputs), torch.cuda.Stream()
    with torch.cuda.stream(own):
        for _ in range(2):
            assert np.array_equal(call(pipeline, inputs), expected)
            assert torch.cuda.current_stream() == own
            with pytest.raises(BackendError):
                call(pipeline, inputs, 11)
            assert torch.cuda.current_stream() == own
            pipeline.rehearse(inputs.images, inputs.tokens, inputs.noise)
            assert torch.cuda.current_stream() == own
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_calls_outside_the_shape_are_refused(build):
    pipeline, inputs, other = build(2, 50), make_inputs(2, 50), make_inputs(2, 50, seed=8)
    expected = call(pipeline, inputs)
    with pytest.raises(BackendError, match='images are .*, the pipeline was built for'):
        call(pipeline, replace(inputs, images=[image[1:] for image in other.images]))
    for change, match in (
        ({'tokens': np.array([257152])}, 'token 257152 is outside the vocabulary'),
        ({'tokens': np.zeros(201, np.int64)}, 'expected 1 to 200 prompt tokens'),
        ({'noise': other.noise.astype(np.float64)}, 'noise must be .* float32'),
    ):
        with pytest.raises(BackendError, match=match):
            call(pipeline, replace(other, **change))
        assert pipeline._stream.query(), 'a refused call leaves nothing behind on the device'
        assert np.array_equal(call(pipeline, inputs), expected)
    with pytest.raises(BackendError, match='num_steps 11 is outside 1 to 10'):
        call(pipeline, other, 11)
    assert np.array_equal(call(pipeline, inputs), expected)

"""The self-check finds the stage that has a fault, and its refusal carries the figures."""

from __future__ import annotations

import numpy as np
import pytest
from plain_pipeline import PlainPipeline, draw_images

from pi05_ros.engine.pipeline import PipelineShape
from pi05_ros.engine.selfcheck import SelfCheckError, StageCheck, compare_stages, refuse_below
from pi05_ros.model.checkpoint import load_model, load_state, open_checkpoint
from pi05_ros.policy.loading import PolicyOptions, load_policy
from pi05_ros.policy.types import Observation

SIZES = ((64, 80),)


@pytest.fixture(scope='module')
def checkpoint(golden_dir):
    return open_checkpoint(golden_dir)


def run_check(checkpoint, change=lambda state: None):
    config, oracle = checkpoint.config, load_model(checkpoint, 'cpu', 'float32')
    state = load_state(checkpoint)
    change(state)
    shape = PipelineShape(SIZES, 30, config.action_horizon, num_steps=2)
    pipeline = PlainPipeline(state, config, shape, oracle)
    noise = np.random.default_rng(0).standard_normal((config.action_horizon, config.action_dim))
    return compare_stages(
        pipeline, oracle, draw_images(SIZES), np.arange(9), noise.astype(np.float32)
    )


def test_the_right_pipeline_passes(checkpoint):
    checks = run_check(checkpoint)
    assert [check.stage for check in checks] == ['vision', 'prefill', 'denoise']
    assert all(check.cosine > 0.999999 for check in checks)
    refuse_below(checks, 0.999)


@pytest.mark.parametrize(
    ('part', 'stage'),
    [('vision_model.encoder.layers.1.mlp.fc1.weight', 'vision'),
     ('language_model.layers.1.self_attn.k_proj.weight', 'prefill')],
    ids=['vision', 'prefill'],
)  # fmt: skip
def test_the_stage_with_a_fault_is_named(checkpoint, part, stage):
    def damage(state):
        name = next(name for name in state if name.endswith(part))
        state[name] = state[name].flip(0).contiguous()

    checks = run_check(checkpoint, damage)
    with pytest.raises(SelfCheckError, match=f'self-check: {stage} below the cosine of 0.999 '):
        refuse_below(checks, 0.999)


def test_nan_is_refused():
    with pytest.raises(SelfCheckError, match='denoise cosine nan'):
        refuse_below([StageCheck('denoise', float('nan'), 1.0)], 0.9)


def test_the_policy_checks_its_fast_stages_on_an_observation(tiny_checkpoint):
    sizes = {'base': (64, 80), 'wrist': (48, 48)}
    images = dict(zip(sizes, draw_images(tuple(sizes.values())), strict=True))
    seen = Observation(images, np.zeros(8), 'pick up the cup', {'base': 1, 'wrist': 1})
    policy = load_policy(
        PolicyOptions(
            tiny_checkpoint, 'franka', sizes, backend='eager', precision='float32', device='cpu'
        )
    )
    assert policy.self_check(seen, 0.999) == ()

    checkpoint, shape = policy.checkpoint, policy.pipeline.shape
    state, oracle = load_state(checkpoint), load_model(checkpoint, 'cpu', 'float32')
    fast = PlainPipeline(state, checkpoint.config, shape, oracle)
    fast.stage_backends = {'vision': 'plain', 'prefill': 'plain', 'denoise': 'plain'}
    policy.pipeline = fast
    checks = policy.self_check(seen, 0.999)
    assert [check.stage for check in checks] == ['vision', 'prefill', 'denoise']
    with pytest.raises(SelfCheckError, match='below the cosine of 1.1 against the oracle'):
        policy.self_check(seen, 1.1)

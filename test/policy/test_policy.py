"""The policy around a fake model: what reaches the model, what leaves for the robot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from policy_files import FakePipeline, fake_policy

from pi05_ros.control.reasons import Reason
from pi05_ros.policy.errors import PolicyError, PolicyReason, PromptError
from pi05_ros.policy.noise import noise
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.robot import load_robot
from pi05_ros.policy.stats import NormStats
from pi05_ros.policy.transforms import Normalizer
from pi05_ros.policy.types import Observation

PROMPT = 'put both moka pots on the stove'


def observation(policy: Policy, **changes: Any) -> Observation:
    """Return a complete observation whose images are told apart by their value."""
    names = policy.robot.camera_names
    sizes = policy.pipeline.shape.view_sizes_px
    images = {
        name: np.full((*size, 3), i + 1, np.uint8)
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    fields = {
        'images': images,
        'state': np.linspace(-0.5, 0.5, policy.robot.state_dim),
        'prompt': PROMPT,
        'stamps_ns': {'base': 1_000, 'wrist': 900, 'joint_states': 1_100},
    }
    return Observation(**(fields | changes))


def last_call(policy: Policy) -> Any:
    assert isinstance(policy.pipeline, FakePipeline)
    return policy.pipeline.calls[-1]


@pytest.fixture
def policy(tokenizer_path: Path) -> Policy:
    return fake_policy(tokenizer_path)


def test_model_gets_the_real_views_in_its_own_order(tokenizer_path: Path):
    policy = fake_policy(tokenizer_path, 'aloha')
    seen = observation(policy)
    shuffled = dict(reversed(list(seen.images.items()))) | {'cam_low': seen.images['cam_high']}
    policy.act(observation(policy, images=shuffled), tick=0, seed=0)
    assert [int(image[0, 0, 0]) for image in last_call(policy).images] == [1, 2, 3]


def test_absent_view_is_dropped_not_filled(policy: Policy):
    policy.act(observation(policy), tick=0, seed=0)
    assert len(last_call(policy).images) == 2


def test_model_gets_the_image_that_the_camera_gave(policy: Policy):
    seen = observation(policy)
    policy.act(seen, tick=0, seed=0)
    assert last_call(policy).images[1] is seen.images['wrist']


def test_normalised_state_is_in_the_prompt(tokenizer_path: Path):
    spec = load_robot('franka')
    halves = np.full(8, 0.5)
    norm = Normalizer('quantile', np.full(8, -0.25), halves, halves)  # -0.25..0.25 to -1..1
    stats = NormStats(norm, norm, (), 'openpi')
    policy = fake_policy(tokenizer_path, spec, stats=stats)
    state = np.array([-0.25, 0.0, 0.25, -0.3, 0.0, 0.0, 0.0, 0.0])
    policy.act(observation(policy, state=state), tick=0, seed=0)
    pieces = policy.tokenizer.encode(PROMPT, np.array([-1.0, 0.0, 1.0, -1.2, 0, 0, 0, 0]))
    np.testing.assert_array_equal(last_call(policy).tokens, pieces)


def test_libero_model_is_not_told_the_state(tokenizer_path: Path):
    policy = fake_policy(tokenizer_path, 'libero')
    for state in (np.zeros(8), np.ones(8)):
        policy.act(observation(policy, state=state), tick=0, seed=0)
        np.testing.assert_array_equal(
            last_call(policy).tokens, policy.tokenizer.encode(PROMPT, None)
        )


def test_noise_is_that_of_seed_and_tick(policy: Policy):
    policy.act(observation(policy), tick=41, seed=7)
    np.testing.assert_array_equal(last_call(policy).noise, noise(7, 41, 4, 32))


@pytest.mark.parametrize('tick, seed', [(41, 7), (42, 7), (41, 8)])
def test_noise_drawn_beforehand_is_used_for_its_seed_and_tick_alone(
    policy: Policy, tick: int, seed: int
):
    policy.prepare(tick=41, seed=7)
    policy.act(observation(policy), tick=tick, seed=seed)
    np.testing.assert_array_equal(last_call(policy).noise, noise(seed, tick, 4, 32))


def test_a_prepared_call_draws_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    policy.prepare(tick=41, seed=7)
    monkeypatch.delattr('pi05_ros.policy.policy.noise')
    policy.act(observation(policy), tick=41, seed=7)
    np.testing.assert_array_equal(last_call(policy).noise, noise(7, 41, 4, 32))


def test_a_rehearsed_call_runs_no_model_and_keeps_the_prepared_noise(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
):
    policy.prepare(tick=41, seed=7)
    monkeypatch.delattr('pi05_ros.policy.policy.noise')
    policy.rehearse(observation(policy), tick=41, seed=7)
    assert isinstance(policy.pipeline, FakePipeline)
    assert policy.pipeline.calls == []
    policy.act(observation(policy), tick=41, seed=7)
    np.testing.assert_array_equal(last_call(policy).noise, noise(7, 41, 4, 32))


def test_noise_that_a_rehearsal_had_to_draw_is_used(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
):
    policy.prepare(tick=41, seed=7)
    policy.rehearse(observation(policy), tick=43, seed=7)  # two ticks were missed
    monkeypatch.delattr('pi05_ros.policy.policy.noise')
    policy.act(observation(policy), tick=43, seed=7)
    np.testing.assert_array_equal(last_call(policy).noise, noise(7, 43, 4, 32))


def test_a_rehearsal_refuses_what_the_call_would_refuse(policy: Policy):
    with pytest.raises(PolicyError, match='no image of camera'):
        policy.rehearse(observation(policy, images={}), tick=0, seed=0)


def test_the_caller_is_given_the_time_in_which_the_device_computes(policy: Policy):
    during: list[int] = []
    policy.while_computing = lambda: during.append(last_call(policy).tokens.size)
    policy.act(observation(policy), tick=0, seed=0)
    assert during == [last_call(policy).tokens.size]


def test_a_rehearsed_answer_that_overflows_refuses_nothing(policy: Policy):
    plain = policy.act(observation(policy), tick=0, seed=0).actions
    huge = Normalizer('zscore', *(np.full(32, value) for value in (0.0, 1.0, 1e39)))
    policy.stats = replace(policy.stats, actions=huge)
    # Zero times the deviation stays zero; the noise of the rehearsal becomes infinite.
    acted = policy.act(observation(policy), tick=0, seed=0).actions
    assert np.isfinite(acted).all()
    assert acted.shape == plain.shape


def test_number_of_steps_is_passed_on_and_reported(policy: Policy):
    assert policy.act(observation(policy), tick=0, seed=0).num_steps == 10
    assert last_call(policy).num_steps is None
    assert policy.act(observation(policy), tick=0, seed=0, num_steps=3).num_steps == 3
    assert last_call(policy).num_steps == 3


def test_actions_are_unnormalised_then_made_absolute_then_cut(tokenizer_path: Path):
    model = np.zeros((4, 32), dtype=np.float32)
    model[:, 0], model[:, 7], model[:, 8] = 0.5, -1.0, 99.0
    width = np.full(8, 2.0)
    norm = Normalizer('quantile', np.full(8, -1.5), width, width)
    stats = NormStats(norm, norm, (), 'openpi')
    policy = fake_policy(tokenizer_path, actions=model, stats=stats)
    chunk = policy.act(observation(policy, state=np.full(8, 10.0)), tick=0, seed=0)
    # (0.5 + 1) / 2 * 2 - 1.5 = 0, plus the state 10; the gripper is no delta: -1.5
    assert chunk.actions.shape == (4, 8)
    assert chunk.actions.dtype == np.float32
    np.testing.assert_allclose(chunk.actions[:, 0], 10.0)
    np.testing.assert_allclose(chunk.actions[:, 7], -1.5)


def test_chunk_says_where_it_came_from(policy: Policy):
    chunk = policy.act(observation(policy), tick=3, seed=-5)
    assert chunk.names == policy.robot.action_names
    assert chunk.stamp_ns == 900
    assert chunk.stamps_ns == {'base': 1_000, 'wrist': 900, 'joint_states': 1_100}
    assert (chunk.tick, chunk.seed, chunk.prompt) == (3, -5, PROMPT)
    assert chunk.step_s == pytest.approx(0.05)


def refusal(policy: Policy, **changes: Any) -> PolicyError:
    """Return the error of one call and assert that the model was not called."""
    with pytest.raises(PolicyError) as caught:
        policy.act(observation(policy, **changes), tick=0, seed=0)
    assert isinstance(policy.pipeline, FakePipeline)
    assert not policy.pipeline.calls
    return caught.value


def test_missing_camera_is_named(policy: Policy):
    images = {'base': np.zeros((8, 10, 3), np.uint8)}
    error = refusal(policy, images=images)
    assert error.reason == 'missing_input'
    assert str(error) == 'no image of camera wrist; have: base'


def test_changed_image_size_is_named(policy: Policy):
    images = {name: np.zeros((9, 10, 3), np.uint8) for name in ('base', 'wrist')}
    error = refusal(policy, images=images)
    assert error.reason == 'bad_image_size'
    assert 'camera base gives (9, 10) (height, width), the policy was loaded for (8, 10)' in str(
        error
    )


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_state_that_is_not_finite_names_its_joint(policy: Policy, value: float):
    state = np.zeros(8)
    state[7] = value
    error = refusal(policy, state=state)
    assert error.reason == 'joint_not_finite'
    assert f'panda_finger_joint1.position is {value}' in str(error)


def test_state_that_overflows_when_normalised_is_refused(tokenizer_path: Path):
    """A dimension that never moved in training is divided by openpi's epsilon."""
    narrow = np.full(8, 1e-6)
    norm = Normalizer('quantile', np.zeros(8), narrow, narrow)
    policy = fake_policy(tokenizer_path, stats=NormStats(norm, norm, (), 'openpi'))
    state = np.zeros(8)
    state[6] = 1e305
    error = refusal(policy, state=state)
    assert error.reason == 'joint_not_finite'
    assert 'panda_joint7.position is 1e+305, which gives inf' in str(error)


def test_state_of_another_size_is_refused(policy: Policy):
    error = refusal(policy, state=np.zeros(7))
    assert error.reason == 'joint_missing'
    assert 'the state has shape (7,), robot franka needs (8,): panda_joint1.position' in str(error)


def test_prompt_over_the_limit_moves_nothing(policy: Policy):
    error = refusal(policy, prompt='bowl ' * 300)
    assert isinstance(error, PromptError)
    assert error.reason == 'prompt_too_long'


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize(
    'column, name', [(0, 'panda_joint1'), (7, 'panda_finger_joint1'), (20, 'padding dimension 20')]
)
def test_action_that_is_not_finite_refuses_the_whole_chunk(
    tokenizer_path: Path, value: float, column: int, name: str
):
    actions = np.zeros((4, 32), dtype=np.float32)
    actions[2, column] = value
    policy = fake_policy(tokenizer_path, actions=actions)
    with pytest.raises(PolicyError, match=f'the action {name} is {value} in row 2') as caught:
        policy.act(observation(policy), tick=0, seed=0)
    assert caught.value.reason == 'action_not_finite'


def test_action_that_overflows_float32_is_refused(policy: Policy):
    """The state is float64; added to an action it must still fit what is published."""
    state = np.zeros(8)
    state[0] = 1e200
    with pytest.raises(PolicyError, match='the action panda_joint1 is inf in row 0'):
        policy.act(observation(policy, state=state), tick=0, seed=0)


def test_every_reason_is_known_to_the_control_tick():
    """A reason that is not would be counted as a failed inference."""
    assert set(get_args(PolicyReason)) <= {reason.value for reason in Reason}


def test_info_says_what_runs(policy: Policy):
    info = policy.info.as_dict()
    assert info['robot'] == 'franka'
    assert info['normalization'] == 'state zscore, actions zscore (openpi)'
    assert info['vision_backend'] == 'fake'
    assert info['checkpoint_sha256'] == 'ab' * 32
    assert info['tokenizer_is_paligemma'] == 'false'
    assert all(isinstance(value, str) for value in info.values())


def test_close_frees_the_pipeline(policy: Policy):
    policy.close()
    assert isinstance(policy.pipeline, FakePipeline)
    assert policy.pipeline.closed

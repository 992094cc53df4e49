"""Loading: a complete checkpoint acts, an incomplete one says what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from policy_files import feature_stats, lerobot_steps, write_lerobot, write_norm_stats
from safetensors.numpy import load_file, save_file

from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.errors import CheckpointError
from pi05_ros.policy.errors import NormError, RobotError, TokenizerError
from pi05_ros.policy.loading import PolicyOptions, check_fit, load_policy
from pi05_ros.policy.noise import noise
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.robot import load_robot
from pi05_ros.policy.types import Observation
from pi05_ros.resources import robot_dir
from pi05_ros.tools.random_checkpoint import make_checkpoint

SIZES = {'base': (256, 256), 'wrist': (120, 160)}
STATE = np.array([0.0, -0.2, 0.0, -2.4, 0.0, 2.2, 0.8, 0.03])
PROMPT = 'pick up the black bowl next to the plate and place it on the plate'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('checkpoints') / 'tiny'
    make_checkpoint('tiny', path, seed=0)
    return path


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / 'copy'))


def options(checkpoint: Path, robot: str = 'franka') -> PolicyOptions:
    return PolicyOptions(
        checkpoint, robot, SIZES, backend='eager', precision='float32', device='cpu', num_steps=3
    )


@pytest.fixture(scope='module')
def policy(tiny: Path) -> Iterator[Policy]:
    loaded = load_policy(options(tiny))
    yield loaded
    loaded.close()


def observation(state: np.ndarray = STATE, prompt: str = PROMPT) -> Observation:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in SIZES.items()}
    return Observation(images, state, prompt, {'base': 5, 'wrist': 7, 'joint_states': 9})


def test_chunk_is_the_pipelines_answer_in_robot_units(policy: Policy):
    seen = observation()
    chunk = policy.act(seen, tick=12, seed=3)
    assert policy.stats.state is not None
    tokens = policy.tokenizer.encode(PROMPT, policy.stats.state.normalize(STATE))
    images = [seen.images['base'], seen.images['wrist']]
    raw = policy.pipeline.infer(images, tokens, noise(3, 12, 10, 32), 3).actions.astype(np.float64)
    q01 = np.array([-0.005] * 7 + [0.0])
    q99 = np.array([0.005] * 7 + [0.04])
    expected = (raw[:, :8] + 1) / 2 * (q99 - q01 + 1e-6) + q01
    expected[:, :7] += STATE[:7]
    np.testing.assert_allclose(chunk.actions, expected, rtol=1e-6, atol=1e-7)
    assert chunk.names[0] == 'panda_joint1'
    assert chunk.times.total_ms > 0


def test_same_seed_and_tick_give_the_same_bits(policy: Policy):
    first = policy.act(observation(), tick=4, seed=1)
    policy.act(observation(prompt='open the drawer'), tick=5, seed=1)
    again = policy.act(observation(), tick=4, seed=1)
    assert first.actions.tobytes() == again.actions.tobytes()


def test_tick_seed_state_and_prompt_all_reach_the_actions(policy: Policy):
    reference = policy.act(observation(), tick=4, seed=1).actions
    moved = STATE.copy()
    moved[7] = 0.01  # not a delta: it reaches the actions through the prompt only
    others = [
        policy.act(observation(), tick=5, seed=1),
        policy.act(observation(), tick=4, seed=2),
        policy.act(observation(moved), tick=4, seed=1),
        policy.act(observation(prompt='open the drawer'), tick=4, seed=1),
    ]
    for other in others:
        assert not np.array_equal(other.actions[:, 7], reference[:, 7])


def test_info_says_what_was_loaded(policy: Policy, tiny: Path):
    info = policy.info.as_dict()
    assert info['checkpoint'] == str(tiny)
    assert info['stats_files'] == str(tiny / 'assets/franka/norm_stats.json')
    assert info['normalization'] == 'state quantile, actions quantile (openpi)'
    assert info['tokenizer'] == str(tiny / 'paligemma_tokenizer.model')
    for stage in ('vision', 'prefill', 'denoise'):
        assert info[f'{stage}_backend'] == 'eager'
    assert (info['precision'], info['device']) == ('float32', 'cpu')
    assert (info['horizon'], info['num_steps']) == ('10', '3')


def test_horizon_of_the_options_wins_over_the_robots_over_the_checkpoints(tiny: Path):
    assert load_policy(options(tiny)).pipeline.shape.horizon == 10
    assert load_policy(replace(options(tiny), horizon=4)).pipeline.shape.horizon == 4


@pytest.mark.parametrize('change', [{'horizon': 0}, {'num_steps': 0}, {'max_steps': 2}])
def test_impossible_numbers_are_refused(tiny: Path, change: dict[str, int]):
    with pytest.raises(BackendError, match=f'{next(iter(change))}'):
        load_policy(replace(options(tiny), **change))


def test_robot_horizon_wins_over_the_checkpoints(tiny: Path, tmp_path: Path):
    content = yaml.safe_load((robot_dir() / 'franka.yaml').read_text()) | {'action_horizon': 6}
    path = tmp_path / 'mine.yaml'
    path.write_text(yaml.safe_dump(content))
    assert load_policy(options(tiny, str(path))).pipeline.shape.horizon == 6


def test_more_steps_than_the_policy_was_loaded_for_are_refused(policy: Policy, tiny: Path):
    with pytest.raises(BackendError, match='num_steps 4'):
        policy.act(observation(), tick=0, seed=0, num_steps=4)
    wider = load_policy(replace(options(tiny), max_steps=4))
    assert wider.act(observation(), tick=0, seed=0, num_steps=4).num_steps == 4


def test_libero_loads_with_statistics_of_its_own(copy: Path):
    write_norm_stats(
        copy / 'assets/physical-intelligence/libero', feature_stats(8), feature_stats(7)
    )
    policy = load_policy(options(copy, 'libero'))
    chunk = policy.act(observation(np.zeros(8)), tick=0, seed=0)
    assert chunk.actions.shape == (10, 7)
    other = policy.act(observation(np.full(8, 0.5)), tick=0, seed=0)
    np.testing.assert_array_equal(chunk.actions, other.actions)  # the state is not in the prompt


@pytest.mark.parametrize('mode', ['QUANTILES', 'MEAN_STD'])
def test_lerobot_checkpoint_acts(copy: Path, mode: str):
    weights = load_file(copy / 'model.safetensors')
    save_file({f'model.{name}': t for name, t in weights.items()}, copy / 'model.safetensors')
    config = json.loads((copy / 'config.json').read_text())
    lerobot = {'type': 'pi05', 'chunk_size': 10, 'max_action_dim': 32, 'dims': config['dims']}
    (copy / 'config.json').write_text(json.dumps(lerobot))
    shutil.rmtree(copy / 'assets')
    write_lerobot(copy, lerobot_steps(mode), feature_stats(8), feature_stats(7))
    policy = load_policy(options(copy, 'libero_lerobot'))
    assert policy.info.layout == 'lerobot'
    assert policy.stats.actions.mode == ('quantile' if mode == 'QUANTILES' else 'zscore')
    assert policy.act(observation(np.zeros(8)), tick=0, seed=0).actions.shape == (10, 7)


def test_unknown_robot_is_refused(tiny: Path):
    with pytest.raises(RobotError, match="unknown robot 'panda'"):
        load_policy(options(tiny, 'panda'))


def test_missing_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match='/nowhere'):
        load_policy(options(Path('/nowhere')))


def test_missing_statistics_are_refused(copy: Path):
    shutil.rmtree(copy / 'assets')
    with pytest.raises(NormError, match="no normalisation statistics for asset 'franka'"):
        load_policy(options(copy))


def test_missing_tokenizer_is_refused(copy: Path):
    (copy / 'paligemma_tokenizer.model').unlink()
    with pytest.raises(TokenizerError, match='no tokenizer: looked for'):
        load_policy(options(copy))


def test_golden_directory_cannot_drive_a_robot():
    golden = Path(__file__).parents[1] / 'data/golden/pi05_tiny'
    with pytest.raises(NormError, match='a golden directory has no normalisation statistics'):
        load_policy(options(golden))


@pytest.mark.parametrize(
    'sizes, given', [({'base': (8, 8)}, 'base'), ({}, 'none'), (SIZES | {'x': (8, 8)}, 'base, wr')]
)
def test_camera_sizes_must_be_those_of_the_robots_cameras(
    tiny: Path, sizes: dict[str, tuple[int, int]], given: str
):
    message = f'has the cameras base, wrist, but image sizes are given for: {given}'
    with pytest.raises(RobotError, match=message):
        load_policy(replace(options(tiny), camera_sizes_px=sizes))


def test_robot_that_the_model_has_no_room_for_is_refused():
    small = replace(Pi05Config.tiny(), action_dim=12)
    with pytest.raises(RobotError, match='aloha has 14 state dimensions, the checkpoint has room'):
        check_fit(load_robot('aloha'), small)
    with pytest.raises(RobotError, match='aloha has 3 cameras, the checkpoint has room for 2'):
        check_fit(load_robot('aloha'), replace(Pi05Config.tiny(), max_views=2))


def test_policy_package_needs_no_ros():
    """Import borders: ros -> control -> policy -> model | engine."""
    code = (
        'import sys, pi05_ros.policy.loading\n'
        'bad = [m for m in sys.modules if m.split(".")[0] in ("rclpy", "sensor_msgs", "std_msgs")'
        ' or m.startswith(("pi05_ros.control", "pi05_ros.ros", "pi05_ros.tools"))]\n'
        'assert not bad, bad'
    )
    subprocess.run([sys.executable, '-c', code], check=True)

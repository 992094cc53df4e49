"""lerobot's processor files: steps are read, not assumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from policy_files import feature_stats, lerobot_steps, write_lerobot
from safetensors.numpy import save_file

from pi05_ros.policy.errors import NormError, RobotError
from pi05_ros.policy.lerobot import Processors, read_processors
from pi05_ros.policy.robot import load_robot

Steps = tuple[dict[str, Any], dict[str, Any]]
NORMALIZER, UNNORMALIZER = 3, 0  # places of the steps in lerobot_steps


def write(root: Path, steps: Steps) -> Path:
    return write_lerobot(root, steps, feature_stats(8), feature_stats(7))


@pytest.mark.parametrize('index', [2, 3, 5])
def test_file_name_comes_from_the_json_not_from_an_index(tmp_path: Path, index: int):
    write(tmp_path, lerobot_steps('QUANTILES', index))
    state = read_processors(tmp_path).state
    assert state.path.name == f'policy_preprocessor_step_{index}_normalizer_processor.safetensors'
    assert set(state.values) == {'mean', 'std', 'q01', 'q99'}


def test_state_and_actions_may_have_different_modes(tmp_path: Path):
    steps = lerobot_steps('QUANTILES')
    steps[1]['steps'][UNNORMALIZER]['config'] = {'norm_map': {'ACTION': 'MEAN_STD'}, 'eps': 1e-8}
    write(tmp_path, steps)
    processors = read_processors(tmp_path)
    assert (processors.state.mode, processors.actions.mode) == ('quantile', 'zscore')


def edit(steps: Steps, which: int, index: int, **changes: Any) -> None:
    steps[which]['steps'][index] |= changes


def norm_map(**modes: str) -> dict[str, Any]:
    return {'config': {'norm_map': {'STATE': 'QUANTILES', 'ACTION': 'QUANTILES'} | modes}}


UNUSABLE: dict[str, tuple[Callable[[Steps], Any], str]] = {
    'not_normalised': (
        lambda s: edit(s, 0, NORMALIZER, **norm_map(STATE='IDENTITY')),
        "norm_map has 'IDENTITY' for STATE; supported: .*MEAN_STD.*QUANTILES",
    ),
    'other_mode': (
        lambda s: edit(s, 1, UNNORMALIZER, **norm_map(ACTION='MIN_MAX')),
        "norm_map has 'MIN_MAX' for ACTION",
    ),
    'no_modes': (lambda s: edit(s, 0, NORMALIZER, config={}), 'norm_map has None for STATE'),
    'images_normalised': (
        lambda s: edit(s, 0, NORMALIZER, **norm_map(VISUAL='MEAN_STD')),
        "images are normalised by 'MEAN_STD'",
    ),
    'state_left_out': (
        lambda s: s[0]['steps'][NORMALIZER]['config'].update(normalize_observation_keys=['x']),
        'leaves observation.state unnormalised',
    ),
    'eps_as_text': (
        lambda s: s[0]['steps'][NORMALIZER]['config'].update(eps='1e-8'),
        "eps must be a number from 0 to 1, found '1e-8'",
    ),
    'no_statistics': (
        lambda s: s[0]['steps'][NORMALIZER].pop('state_file'),
        r'names no statistics \(state_file\); this checkpoint has none',
    ),
    'file_elsewhere': (
        lambda s: edit(s, 0, NORMALIZER, state_file='../stats.safetensors'),
        "'../stats.safetensors' is no name of a safetensors file",
    ),
    'pickle': (
        lambda s: edit(s, 0, NORMALIZER, state_file='stats.pt'),
        "'stats.pt' is no name of a safetensors file",
    ),
    'no_step': (lambda s: s[1]['steps'].pop(UNNORMALIZER), "no step 'unnormalizer_processor'"),
    'step_twice': (
        lambda s: s[0]['steps'].append({'registry_name': 'to_batch_processor'}),
        "step 'to_batch_processor' is given twice",
    ),
    'unknown_step': (
        lambda s: s[0]['steps'].append({'registry_name': 'image_crop_resize_processor'}),
        "step 'image_crop_resize_processor' is not supported; known: ",
    ),
    'step_without_name': (lambda s: s[0]['steps'].append({}), 'step None is not supported'),
    'steps_are_no_list': (lambda s: s[0].update(steps={}), "expected the key 'steps'"),
    'config_is_no_object': (
        lambda s: edit(s, 0, NORMALIZER, config=[]),
        "config of step 'normalizer_processor' is not an object",
    ),
}


@pytest.mark.parametrize('spoil, message', UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_processors_are_refused(
    tmp_path: Path, spoil: Callable[[Steps], Any], message: str
):
    steps = lerobot_steps('QUANTILES')
    spoil(steps)
    write(tmp_path, steps)
    with pytest.raises(NormError, match=message):
        read_processors(tmp_path)


@pytest.mark.parametrize('name', ['policy_preprocessor.json', 'policy_postprocessor.json'])
def test_missing_processor_file_is_named(tmp_path: Path, name: str):
    write(tmp_path, lerobot_steps('QUANTILES'))
    (tmp_path / name).unlink()
    with pytest.raises(NormError, match=f'{name} is missing; a lerobot checkpoint keeps'):
        read_processors(tmp_path)


def stats_file(root: Path) -> Path:
    return root / 'policy_preprocessor_step_3_normalizer_processor.safetensors'


def test_missing_statistics_file_is_named(tmp_path: Path):
    write(tmp_path, lerobot_steps('QUANTILES'))
    stats_file(tmp_path).unlink()
    with pytest.raises(NormError, match='names policy_preprocessor_step_3.*, which is missing in'):
        read_processors(tmp_path)


@pytest.mark.parametrize('raw', [b'', b'\xff' * 8, b'\x08\0\0\0\0\0\0\0{"a":1}'])
def test_damaged_statistics_file_is_refused(tmp_path: Path, raw: bytes):
    write(tmp_path, lerobot_steps('QUANTILES'))
    stats_file(tmp_path).write_bytes(raw)
    with pytest.raises(NormError, match='not a readable safetensors file'):
        read_processors(tmp_path)


def test_statistics_without_the_state_are_refused(tmp_path: Path):
    write(tmp_path, lerobot_steps('QUANTILES'))
    save_file({}, stats_file(tmp_path))
    with pytest.raises(NormError, match='no statistics of observation.state'):
        read_processors(tmp_path)


def test_state_in_the_prompt_must_agree_with_the_robot_file(tmp_path: Path):
    """lerobot's LIBERO checkpoints put the state into the prompt, openpi's do not."""
    write(tmp_path, lerobot_steps('QUANTILES'))
    processors = read_processors(tmp_path)
    processors.check_robot(load_robot('libero_lerobot'))
    with pytest.raises(RobotError, match='discrete_state is False, .*set discrete_state: true'):
        processors.check_robot(load_robot('libero'))


def relative(tmp_path: Path, **config: Any) -> Processors:
    steps = lerobot_steps('QUANTILES')
    steps[0]['steps'][2]['config'] = config
    write(tmp_path, steps)
    return read_processors(tmp_path)


def test_excluded_joints_stay_absolute(tmp_path: Path):
    """A name is excluded where it contains one of the words, in any case."""
    names = ['joint_1.pos', 'Left_Gripper.pos', 'joint_2.pos']
    processors = relative(tmp_path, enabled=True, exclude_joints=['gripper'], action_names=names)
    assert processors.delta_mask(4) == (True, False, True, True)


def test_without_names_every_action_is_relative(tmp_path: Path):
    processors = relative(tmp_path, enabled=True, exclude_joints=['gripper'], action_names=None)
    assert processors.delta_mask(3) == (True, True, True)


def test_deltas_of_the_robot_file_must_agree_with_the_checkpoint(tmp_path: Path):
    processors = relative(tmp_path, enabled=False)
    with pytest.raises(RobotError, match='panda_joint1 has delta_to_state True, but .* has False'):
        processors.check_robot(load_robot('franka'))
    names = list(load_robot('franka').action_names)
    agreeing = relative(tmp_path, enabled=True, exclude_joints=['finger'], action_names=names)
    agreeing.check_robot(load_robot('franka'))

"""Robot files: the shipped ones are openpi's robots, and every mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.policy.errors import RobotError
from pi05_ros.policy.robot import ActionDim, RobotSpec, load_robot, robot_names
from pi05_ros.policy.strict_yaml import MAX_BYTES
from pi05_ros.resources import robot_dir

PANDA = tuple(f'panda_joint{i}' for i in range(1, 8))


def franka() -> dict[str, Any]:
    return yaml.safe_load((robot_dir() / 'franka.yaml').read_text())


def load(tmp_path: Path, content: Any) -> RobotSpec:
    path = tmp_path / 'robot.yaml'
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_robot(str(path))


@pytest.mark.parametrize('name', robot_names())
def test_shipped_robot_loads_under_its_own_name(name: str):
    assert load_robot(name).name == ('my_arm' if name == 'template' else name)


def test_libero_is_openpis_pi05_libero():
    robot = load_robot('libero')
    assert robot.asset_id == 'physical-intelligence/libero'
    assert robot.action_horizon == 10
    assert not robot.discrete_state
    assert robot.action_dim == 7
    assert robot.action_kinds == (
        *['eef_delta_position'] * 3, *['eef_delta_rotation'] * 3, 'gripper_command',
    )  # fmt: skip
    assert not any(robot.delta_mask)
    assert robot.state_dim == 8
    assert robot.needs_eef_pose
    assert robot.state_joints == ('panda_finger_joint1', 'panda_finger_joint2')


def test_droid_is_openpis_pi05_droid():
    robot = load_robot('droid')
    assert (robot.asset_id, robot.action_horizon, robot.discrete_state) == ('droid', 15, True)
    assert robot.action_kinds == (*['joint_velocity'] * 7, 'gripper_position')
    assert robot.state_dim == 8
    assert not any(robot.delta_mask)
    assert list(robot.cameras.by_slot()) == ['base_0_rgb', 'left_wrist_0_rgb']


def test_aloha_is_openpis_pi05_aloha():
    robot = load_robot('aloha')
    assert (robot.asset_id, robot.action_horizon, robot.transform) == ('trossen', 50, 'aloha')
    assert robot.delta_mask == (True,) * 6 + (False,) + (True,) * 6 + (False,)
    assert robot.camera_names == ('cam_high', 'cam_left_wrist', 'cam_right_wrist')
    assert (robot.state_dim, robot.action_dim) == (14, 14)


def test_franka_fits_the_shipped_bag():
    robot = load_robot('franka')
    assert robot.state_joints == (*PANDA, 'panda_finger_joint1')
    assert robot.action_joints == robot.state_joints
    assert robot.camera_names == ('base', 'wrist')
    assert robot.needs_joint_states
    assert not robot.needs_eef_pose
    assert robot.step_s == pytest.approx(0.05)


def test_views_keep_the_models_order_however_the_file_orders_them(tmp_path: Path):
    content = franka()
    content['cameras'] = {'right_wrist_0_rgb': 'right', 'base_0_rgb': 'scene'}
    assert load(tmp_path, content).camera_names == ('scene', 'right')


def test_unknown_robot_lists_the_shipped_ones():
    with pytest.raises(RobotError, match="unknown robot 'frank'; shipped robots: aloha, droid"):
        load_robot('frank')


def test_missing_file_is_named():
    with pytest.raises(RobotError, match='robot file /nowhere/arm.yaml does not exist'):
        load_robot('/nowhere/arm.yaml')


def test_robot_name_cannot_leave_the_robot_directory():
    with pytest.raises(RobotError, match='does not exist'):
        load_robot('../robots/nothing')


MISTAKES = {
    'unknown_key': ({'speed': 1}, r'speed: unknown key; allowed: action_horizon, action_rate_hz'),
    'unknown_view': ({'cameras': {'base': 'base'}}, r'cameras.base: unknown key; allowed: base_0'),
    'no_camera': ({'cameras': {}}, 'no camera is given'),
    'camera_twice': (
        {'cameras': {'base_0_rgb': 'a', 'left_wrist_0_rgb': 'a'}},
        'same camera feeds two views',
    ),
    'camera_is_no_topic_name': ({'cameras': {'base_0_rgb': 'my cam'}}, "found 'my cam'"),
    'zero_rate': ({'action_rate_hz': 0.0}, 'action_rate_hz: found 0.0; .*greater than 0'),
    'negative_rate': ({'action_rate_hz': -5}, 'action_rate_hz: found -5'),
    'nan_rate': ({'action_rate_hz': float('nan')}, 'action_rate_hz: found nan'),
    'rate_as_text': ({'action_rate_hz': '20'}, "action_rate_hz: found '20'; .*valid number"),
    'horizon_zero': ({'action_horizon': 0}, 'action_horizon: found 0'),
    'flag_as_number': ({'discrete_state': 1}, 'discrete_state: found 1'),
    'asset_outside': ({'asset_id': '../../etc'}, "asset_id: found '../../etc'"),
    'no_actions': ({'actions': []}, 'actions: found'),
    'state_without_dims': ({'state': []}, 'discrete_state puts the state into the prompt'),
    'aloha_dims': ({'transform': 'aloha'}, 'aloha needs 14 state and 14 action .* got 8 and 8'),
    'unknown_mode': ({'normalization': 'minmax'}, "normalization: found 'minmax'"),
}


@pytest.mark.parametrize('change, message', MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(RobotError, match=message):
        load(tmp_path, franka() | change)


def test_missing_key_is_named(tmp_path: Path):
    content = franka()
    del content['discrete_state']
    with pytest.raises(RobotError, match='discrete_state: missing'):
        load(tmp_path, content)


DIM_MISTAKES = {
    'joint_and_eef': ('state', {'eef': 'position_x'}, "either 'joint' .* or 'eef'"),
    'unknown_unit': ('state', {'unit': 'deg'}, "state.0.unit: found 'deg'; input should be"),
    'unknown_field': ('state', {'field': 'torque'}, "state.0.field: found 'torque'"),
    'scale_zero': ('actions', {'scale': 0}, 'scale is 0'),
    'scale_differs': ('actions', {'scale': 2.0}, 'unit, scale or offset differ'),
    'other_joint': (
        'actions',
        {'joint': 'panda_joint3'},
        r'delta to state dimension 0, which is panda_joint1.position \[rad\]; '
        'expected panda_joint3.position',
    ),
    'velocity_delta': (
        'actions',
        {'kind': 'joint_velocity', 'unit': 'rad/s'},
        'joint_velocity cannot be a delta',
    ),
    'unit_of_kind': ('actions', {'unit': 'rad/s'}, "joint_position has unit 'rad/s'"),
    'no_joint': ('actions', {'joint': None}, "joint_position needs 'joint'"),
    'name_twice': ('actions', {'name': 'panda_joint2'}, 'actions: given twice: panda_joint2'),
    'misspelt': ('actions', {'delta': True}, 'actions.0.delta: unknown key; allowed: delta_to'),
}


@pytest.mark.parametrize('where, change, message', DIM_MISTAKES.values(), ids=DIM_MISTAKES.keys())
def test_mistake_in_a_dimension_is_named(
    tmp_path: Path, where: str, change: dict[str, Any], message: str
):
    content = franka()
    content[where][0] |= change
    with pytest.raises(RobotError, match=message):
        load(tmp_path, content)


def test_every_mistake_is_listed_at_once(tmp_path: Path):
    with pytest.raises(RobotError) as caught:
        load(tmp_path, franka() | {'speed': 1, 'action_rate_hz': 0.0})
    assert 'speed' in str(caught.value)
    assert 'action_rate_hz' in str(caught.value)


def test_robot_cannot_be_changed_after_loading():
    with pytest.raises(ValueError, match='frozen'):
        load_robot('franka').name = 'other'


NOT_PLAIN = {
    'empty': ('', 'found NoneType'),
    'list': ('- 1', 'found list'),
    'alias': ('a: &x [1]\nb: *x', 'anchor or alias'),
    'tag': ('a: !!python/object:os.system {}', 'tag .* is not allowed'),
    'key_twice': ('name: a\nname: b', "line 2: key 'name' is given twice"),
    'nested_too_deep': ('[' * 5000, 'brackets nested more than 32 deep'),
    'huge_number': ('a: ' + '9' * 5000, 'digits'),
    'no_date': ('a: 2020-99-99', 'month'),
    'syntax': ('a: [', 'expected'),
    'too_large': ('#' * (MAX_BYTES + 1), f'larger than {MAX_BYTES} bytes'),
}


@pytest.mark.parametrize('text, message', NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_file_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(RobotError, match=message):
        load(tmp_path, text)


def test_file_that_is_not_text_is_refused(tmp_path: Path):
    path = tmp_path / 'robot.yaml'
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(RobotError, match="codec can't decode"):
        load_robot(str(path))


_YAML_PIECES = st.sampled_from(
    ['name: ', 'state:', '- ', '{', '}', '[', ']', 'joint: a', '\n', '  ', '&a ', '*a', '!!int ',
     '? ', '<<: ', '1e999', '.nan', '2001-1-1', '0o9', '1:2:3', '"', "'", '|', '%', '\t', '=']
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(_YAML_PIECES).map(''.join)))
def test_any_text_loads_or_is_a_robot_error(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.getbasetemp() / 'fuzzed.yaml'
    path.write_bytes(text.encode('utf-8', 'surrogatepass'))
    with pytest.raises(RobotError, match='fuzzed.yaml'):
        load_robot(str(path))


@given(st.binary())
def test_any_bytes_are_a_robot_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes):
    path = tmp_path_factory.getbasetemp() / 'fuzzed.yaml'
    path.write_bytes(raw)
    with pytest.raises(RobotError, match='fuzzed.yaml'):
        load_robot(str(path))


@pytest.mark.parametrize('path', sorted(robot_dir().glob('*.yaml')), ids=lambda path: path.stem)
def test_shipped_file_says_what_it_is_and_where_its_keys_are_explained(path: Path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith('# ')
    assert any('template.yaml' in line for line in lines) or path.stem == 'template'
    assert max(len(line) for line in lines) <= 100


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'min': 1.0, 'max': -1.0}, 'min 1 is not below max -1'),
        ({'max_rate': 0.0}, 'max_rate'),
        ({'max_jump': float('nan')}, 'max_jump'),
        ({'min': float('inf')}, 'min'),
    ],
)
def test_impossible_limits_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    content = franka()
    content['actions'][0] |= change
    with pytest.raises(RobotError, match=message):
        load(tmp_path, content)


def test_jump_limit_needs_a_measured_joint(tmp_path: Path):
    content = franka()
    content['actions'][7] |= {'joint': 'other_finger', 'max_jump': 0.01}
    with pytest.raises(RobotError, match='the state has no other_finger.position'):
        load(tmp_path, content)


def test_joint_positions_have_limits_of_jump_and_rate_unless_said_otherwise():
    dim = ActionDim(name='a', kind='joint_position', joint='a', unit='rad')
    assert (dim.jump_limit, dim.rate_limit) == (0.5, 3.0)
    off = ActionDim(name='a', kind='joint_position', joint='a', unit='rad', max_jump=float('inf'))
    assert off.jump_limit == float('inf')
    gripper = ActionDim(name='g', kind='gripper_position', joint='g', unit='m')
    assert (gripper.jump_limit, gripper.rate_limit) == (float('inf'), float('inf'))

"""The table of parameters: types, ranges, unknown names, and the file that ships with it."""

from __future__ import annotations

import math

import pytest
import yaml

from pi05_ros.control.parameter_file import read_parameter_file, settings_from_yaml
from pi05_ros.control.parameter_table import PARAMETERS, parameter_specs
from pi05_ros.control.parameters import NodeSettings, ParameterError, coerce, settings_from_values
from pi05_ros.policy.errors import RobotError
from pi05_ros.resources import config_dir

CAMERAS = ('base', 'wrist')


def settings(**values: object) -> NodeSettings:
    return settings_from_values(
        {name.replace('__', '.'): v for name, v in values.items()}, CAMERAS
    )


def test_defaults_are_complete_and_dry():
    chosen = settings()
    assert chosen.dry_run
    assert chosen.rate_hz == 20.0
    assert chosen.period_ns == 50_000_000
    assert chosen.camera('wrist').transport == 'raw'


@pytest.mark.parametrize('spec', PARAMETERS, ids=lambda spec: spec.name)
def test_every_default_is_allowed_and_described(spec):
    assert coerce(spec, spec.default) == spec.default
    assert spec.description.endswith('.')


@pytest.mark.parametrize(
    ('values', 'match'),
    [
        ({'rate_hz': 0.0}, r'rate_hz must be 0.1 to 1000; got 0.0'),
        ({'rate_hz': -5.0}, r'rate_hz must be 0.1 to 1000; got -5.0'),
        ({'rate_hz': math.nan}, 'rate_hz must be .* got nan'),
        ({'rate_hz': 'fast'}, r"rate_hz must be a number; got 'fast' \(str\)"),
        ({'num_steps': 11}, 'num_steps must be 1 to 10; got 11'),
        ({'num_steps': 3.0}, r'num_steps must be a whole number; got 3.0 \(float\)'),
        ({'num_steps': True}, r'got True \(bool\)'),
        ({'dry_run': 'false'}, r"dry_run must be true or false; got 'false'"),
        ({'backend': 'fastest'}, "backend must be one of auto, eager, cuda, tensorrt; got 'fast"),
        ({'stamp_source': 'now'}, 'stamp_source must be one of header, receive'),
        ({'prompt': 5}, 'prompt must be a string; got 5'),
        ({'rate': 10.0}, 'unknown parameter rate; did you mean rate_hz?'),
        ({'cameras__left__transport': 'raw'}, 'unknown parameter cameras.left.transport'),
        ({'cameras__base__transport': 'h264'}, 'cameras.base.transport must be one of raw, comp'),
    ],
)
def test_wrong_values_are_refused_with_the_reason(values, match):
    with pytest.raises(ParameterError, match=match):
        settings(**values)


def test_every_problem_is_listed_at_once():
    with pytest.raises(ParameterError) as caught:
        settings(rate_hz=0.0, seed=-1, promt='x')
    message = str(caught.value)
    assert 'rate_hz' in message
    assert 'seed must be' in message
    assert 'did you mean prompt?' in message


def test_a_whole_number_is_a_double_but_not_the_other_way_round():
    assert settings(rate_hz=10).rate_hz == 10.0
    with pytest.raises(ParameterError, match='must be a whole number'):
        settings(seed=1.0)


def test_what_rclpy_itself_declares_is_left_alone():
    values = {'use_sim_time': True, 'qos_overrides./clock.subscription.depth': 1}
    assert settings_from_values(values, CAMERAS) == settings()


def test_shipped_file_lists_every_parameter_with_its_default():
    table = parameter_specs(CAMERAS)
    shipped = read_parameter_file(config_dir() / 'policy.yaml')
    assert shipped == {name: spec.default for name, spec in table.items()}
    assert settings_from_yaml(config_dir() / 'policy.yaml') == settings()


def test_shipped_file_has_a_comment_on_every_parameter():
    for line in (config_dir() / 'policy.yaml').read_text().splitlines():
        name = line.strip().split(':')[0]
        if any(name == spec.name for spec in PARAMETERS):
            assert '#' in line, f'no comment beside {name}'


def write(tmp_path, document: object):
    path = tmp_path / 'params.yaml'
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def test_more_specific_sections_win(tmp_path):
    document = {
        '/left/pi05_policy': {'ros__parameters': {'seed': 4}},
        '/**': {'ros__parameters': {'seed': 1, 'num_steps': 2, 'rate_hz': 5}},
        'pi05_policy': {'ros__parameters': {'seed': 3}},
        'other_node': {'ros__parameters': {'seed': 99}},
    }
    path = write(tmp_path, document)
    assert settings_from_yaml(path).seed == 3
    assert settings_from_yaml(path, '/left/pi05_policy').seed == 4
    assert settings_from_yaml(path, '/right/pi05_policy').rate_hz == 5.0


def test_namespaced_sections_and_nested_names_are_read(tmp_path):
    inner = {'ros__parameters': {'cameras': {'wrist': {'transport': 'compressed'}}}}
    path = write(tmp_path, {'left': {'pi05_policy': inner}})
    chosen = settings_from_yaml(path, '/left/pi05_policy')
    assert chosen.camera('wrist').transport == 'compressed'
    assert chosen.camera('base').transport == 'raw'
    assert settings_from_yaml(path).camera('wrist').transport == 'raw'


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, {'/**': {'ros__parameters': {'seed': 1}}})
    assert settings_from_yaml(path, overrides={'seed': 2}).seed == 2


def test_errors_name_the_file(tmp_path):
    path = write(tmp_path, {'/**': {'ros__parameters': {'sed': 1}}})
    with pytest.raises(ParameterError, match=r'params.yaml: unknown parameter sed; .* seed'):
        settings_from_yaml(path)


@pytest.mark.parametrize('text', ['', '- a\n- b\n', 'a: [', '\x00'])
def test_what_is_no_parameter_file_is_refused(tmp_path, text):
    with pytest.raises(ParameterError, match='params.yaml'):
        settings_from_yaml(write(tmp_path, text))


def test_missing_file_and_unknown_robot_are_named(tmp_path):
    with pytest.raises(ParameterError, match='none.yaml'):
        settings_from_yaml(tmp_path / 'none.yaml')
    with pytest.raises(RobotError, match="unknown robot 'r2d2'"):
        settings_from_yaml(write(tmp_path, {'/**': {'ros__parameters': {'robot': 'r2d2'}}}))

"""Parameters as ROS sees them: described, checked, refused with the reason, dumped."""

from __future__ import annotations

import pytest
import rclpy
import yaml
from helpers import Bench, bench
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.parameter_client import AsyncParameterClient

from pi05_ros.control.parameter_file import settings_from_yaml
from pi05_ros.control.parameter_table import parameter_specs
from pi05_ros.control.parameters import NodeSettings, ParameterError
from pi05_ros.policy_node import PolicyNode
from pi05_ros.ros.parameters import NodeParameters

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

TABLE = parameter_specs(('base', 'wrist'))


class Holder:
    """A plain node with the parameters of the policy node."""

    def __init__(self, *arguments: str) -> None:
        self.node = Node(
            'holder',
            automatically_declare_parameters_from_overrides=True,
            cli_args=['--ros-args', *arguments],
        )
        self.changes: list[NodeSettings] = []
        self.is_active = False
        self.parameters = NodeParameters(self.node, self.changes.append, lambda: self.is_active)

    def set(self, name: str, value: object) -> tuple[bool, str]:
        (result,) = self.node.set_parameters([Parameter(name, value=value)])
        return result.successful, result.reason


def test_defaults_are_those_of_the_table():
    holder = Holder()
    assert holder.parameters.settings().rate_hz == 20.0
    for name, spec in TABLE.items():
        assert holder.node.get_parameter(name).value == spec.default


def test_every_parameter_is_described():
    holder = Holder()
    for name, spec in TABLE.items():
        described = holder.node.describe_parameter(name)
        assert described.description == spec.description
        assert described.read_only == spec.read_only
        assert described.additional_constraints == spec.constraints
        ranges = [*described.floating_point_range, *described.integer_range]
        assert [(r.from_value, r.to_value) for r in ranges] == (
            [] if spec.minimum is None else [(spec.minimum, spec.maximum)]
        )


def test_overrides_are_taken():
    holder = Holder('-p', 'rate_hz:=7.5', '-p', 'cameras.wrist.transport:=compressed')
    settings = holder.parameters.settings()
    assert settings.rate_hz == 7.5
    assert settings.camera('wrist').transport == 'compressed'
    assert settings.camera('base').transport == 'raw'


def test_a_whole_number_is_taken_for_a_double():
    assert Holder('-p', 'rate_hz:=7').parameters.settings().rate_hz == 7.0


@pytest.mark.parametrize(
    ('override', 'match'),
    [
        ('rate_hz:=0.0', 'rate_hz must be 0.1 to 1000; got 0.0'),
        ('rate_hz:=-1.0', 'rate_hz must be 0.1 to 1000; got -1.0'),
        ('rate_hz:=fast', "rate_hz must be a number; got 'fast'"),
        ('rate:=10.0', r'unknown parameter rate; did you mean rate_hz\?'),
        ('cameras.left.transport:=raw', 'unknown parameter cameras.left.transport'),
        ('backend:=fast', 'backend must be one of auto, eager, cuda, tensorrt'),
        ('robot:=r2d2', "unknown robot 'r2d2'"),
        ('prompt:=5', 'prompt must be a string; got 5'),
    ],
)
def test_wrong_overrides_are_refused_when_settings_are_asked_for(override, match):
    holder = Holder('-p', override)
    with pytest.raises(ParameterError, match=match):
        holder.parameters.settings()


def test_cameras_of_a_robot_that_does_not_exist_are_not_reported_as_well():
    holder = Holder('-p', 'robot:=r2d2', '-p', 'cameras.base.transport:=raw')
    with pytest.raises(ParameterError) as caught:
        holder.parameters.settings()
    assert 'r2d2' in str(caught.value)
    assert 'cameras' not in str(caught.value)


def test_cameras_are_those_of_the_robot():
    holder = Holder('-p', 'robot:=droid', '-p', 'cameras.exterior.transport:=compressed')
    assert holder.parameters.settings().camera('exterior').transport == 'compressed'


def test_changes_while_running_are_checked_and_handed_on():
    holder = Holder()
    assert holder.set('prompt', 'open the drawer') == (True, '')
    assert holder.set('max_skew_ms', 12.0) == (True, '')
    assert [change.prompt for change in holder.changes] == ['open the drawer'] * 2
    assert holder.changes[-1].max_skew_ms == 12.0


def test_the_rate_changes_only_while_the_node_is_not_active():
    holder = Holder()
    assert holder.set('rate_hz', 30.0) == (True, '')
    holder.is_active = True
    done, why = holder.set('rate_hz', 40.0)
    assert not done
    assert why == 'rate_hz can be set only while the node is not active; deactivate it'
    assert holder.set('max_skew_ms', 12.0) == (True, '')
    assert holder.parameters.settings().rate_hz == 30.0


@pytest.mark.parametrize(
    ('name', 'value', 'reason'),
    [
        ('seed', 3, 'read-only'),
        ('rate_hz', 0.0, 'rate_hz out of range Min: 0.1, Max: 1000.0'),
        ('checkpoint', '/elsewhere', 'read-only'),
        ('dry_run', False, 'read-only'),
        ('num_steps', 0, 'num_steps out of range. Min: 1, Max: 10'),
        ('num_steps', 2.5, 'Wrong parameter type'),
        ('max_skew_ms', -1.0, 'max_skew_ms out of range Min: 0.0, Max: 60000.0'),
        ('max_skew_ms', float('nan'), 'out of range'),
    ],
)
def test_changes_that_are_not_allowed_leave_everything_as_it_was(name, value, reason):
    holder = Holder()
    before = holder.parameters.settings()
    done, why = holder.set(name, value)
    assert not done
    assert reason in why
    assert holder.parameters.settings() == before
    assert holder.changes == []


def test_setting_a_wrong_override_right_makes_the_node_usable():
    holder = Holder('-p', 'num_steps:=99')
    with pytest.raises(ParameterError, match='num_steps'):
        holder.parameters.settings()
    assert holder.set('num_steps', 3)[0]
    assert holder.parameters.settings().num_steps == 3


def dump(b: Bench) -> str:
    """Return what ``ros2 param dump`` writes: asked of the services, nested, as YAML."""
    client = AsyncParameterClient(b.observer.node, 'pi05_policy')
    b.until(client.services_are_ready)
    listed = client.list_parameters()
    b.until(listed.done)
    names = listed.result().result.names
    got = client.get_parameters(names)
    b.until(got.done)
    tree: dict = {}
    for name, value in zip(names, got.result().values, strict=True):
        *groups, last = name.split('.')
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[last] = parameter_value_to_python(value)
    return yaml.dump({'/pi05_policy': {'ros__parameters': tree}}, default_flow_style=False)


@pytest.mark.parametrize('prompt', ['put the bowl: on #1, "now"', '2024', 'true', '', "ça\n'"])
def test_what_param_dump_writes_of_the_node_loads_again_unchanged(prompt, tmp_path):
    """rclpy's own parameters are in it, too; a task must not become a number."""
    given = {
        'prompt': prompt, 'rate_hz': 12.0, 'execute_horizon': 3, 'limits_source': 'both',
        'cameras.wrist.transport': 'compressed', 'dry_run': False,
    }  # fmt: skip
    path = tmp_path / 'dump.yaml'
    with bench(parameters=given) as b:
        b.node.set_parameters([Parameter('max_skew_ms', value=12.5)])  # changed while it runs
        before = b.node._node_parameters.settings()
        path.write_text(dump(b), encoding='utf-8')
    assert before.max_skew_ms == 12.5
    node = PolicyNode(cli_args=['--ros-args', '--params-file', str(path)])
    try:
        assert node._node_parameters.settings() == before
    finally:
        node.close()
    assert settings_from_yaml(path) == before


def test_node_with_an_unknown_parameter_lives_but_refuses_to_configure():
    with bench(parameters={'promt': 'typo'}) as b:
        assert not b.configure()
        assert b.node.last_error == ('configure: unknown parameter promt; did you mean prompt?')
        assert rclpy.ok()


def test_change_while_active_reaches_the_next_tick():
    with bench() as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        b.node.set_parameters([Parameter('num_steps', value=3)])
        b.until(lambda: b.observer.chunks[-1].num_steps == 3)
        b.until(lambda: b.observer.values('Model').get('num_steps') == '3')

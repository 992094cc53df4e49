"""The SROS 2 policy allows what the real node does, and nothing that does not exist."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree

import pytest
import rclpy
from helpers import SmallPolicy, bench
from rclpy.node import Node
from rclpy.parameter import Parameter

from pi05_ros.control.parameter_file import NODE_NAME
from pi05_ros.control.parameter_table import PARAMETERS
from pi05_ros.control.parameters import settings_from_values
from pi05_ros.control.topics import description_topic, input_topics
from pi05_ros.policy.robot import load_robot, robot_names
from pi05_ros.policy_node import PolicyNode
from pi05_ros.ros.take_check import TRIAL_TOPIC

POLICY = Path(__file__).parents[2] / 'config' / 'sros2' / 'policy.xml'
KINDS = ('publish', 'subscribe', 'reply', 'request')
INTERFACES = next(spec.choices for spec in PARAMETERS if spec.name == 'action_interface')
# What every rclpy node publishes.
OF_EVERY_NODE = {'/parameter_events', '/rosout'}

Rules = dict[str, set[str]]


def rules(enclave: str) -> Rules:
    """Return kind -> full names that the policy allows to an enclave."""
    allowed: Rules = {kind: set() for kind in KINDS}
    root = ElementTree.parse(POLICY).getroot()
    profiles = root.findall(f"./enclaves/enclave[@path='{enclave}']/profiles/profile")
    assert len(profiles) == 1
    for section, kind in itertools.product(profiles[0], KINDS):
        if section.get(kind) == 'ALLOW':
            names = [(item.text or '').strip() for item in section]
            allowed[kind].update(full_name(name, profiles[0].get('node')) for name in names)
    return allowed


def full_name(name: str, node: str | None) -> str:
    return name.replace('~', f'/{node}') if name.startswith('~') else '/' + name.lstrip('/')


def graph(node: Node) -> Rules:
    """Return kind -> full names that the node has."""

    def names(found: Iterable[tuple[str, list[str]]]) -> set[str]:
        return {name for name, _ in found}

    this = NODE_NAME, '/'
    estop = f'_{NODE_NAME}_estop', '/'
    return {
        'publish': names(node.get_publisher_names_and_types_by_node(*this)),
        'subscribe': names(node.get_subscriber_names_and_types_by_node(*this)),
        'reply': names(node.get_service_names_and_types_by_node(*this))
        | names(node.get_service_names_and_types_by_node(*estop)),
        'request': names(node.get_client_names_and_types_by_node(*this)),
    }


def all_inputs() -> set[str]:
    """Return the input topics of every shipped robot, raw and compressed."""
    found = set()
    for robot in map(load_robot, robot_names()):
        for transport in ('raw', 'compressed'):
            chosen = {f'cameras.{name}.transport': transport for name in robot.camera_names}
            settings = settings_from_values(chosen, robot.camera_names)
            found |= {'/' + topic.topic for topic in input_topics(robot, settings)}
    return found


@pytest.fixture(scope='module')
def used() -> Rules:
    """What the configured node has, over all outputs; with the clock of a simulation, too."""
    rclpy.init()
    total: Rules = {kind: set() for kind in KINDS}
    outputs = [(True, 'action_chunk'), *((False, interface) for interface in INTERFACES)]
    for dry_run, interface in outputs:
        parameters = {'dry_run': dry_run, 'action_interface': interface}
        policy = SmallPolicy(load_robot('franka'))
        with bench(policy, parameters) as running:
            assert running.configure(), running.node.last_error
            total = {kind: total[kind] | names for kind, names in graph(running.node).items()}
        del running
        gc.collect()  # the node stays in the graph until then, and the next has its name
    simulated = PolicyNode(parameter_overrides=[Parameter('use_sim_time', value=True)])
    total = {kind: total[kind] | names for kind, names in graph(simulated).items()}
    simulated.close()
    rclpy.try_shutdown()
    # Only for a moment while it configures: the trial of the direct take, and the description.
    trial = f'/{NODE_NAME}/{TRIAL_TOPIC}0'
    total['publish'].add(trial)
    total['subscribe'] |= {trial, f'/{description_topic().topic}', *all_inputs()}
    return total


@pytest.mark.parametrize('kind', KINDS)
def test_all_that_the_node_does_is_allowed(used, kind):
    allowed = rules('/pi05_policy')[kind]
    forbidden = {name for name in used[kind] if not any(fnmatchcase(name, a) for a in allowed)}
    assert forbidden == set()


@pytest.mark.parametrize('kind', KINDS)
def test_nothing_is_allowed_that_the_node_does_not_do(used, kind):
    allowed = rules('/pi05_policy')[kind]
    idle = {pattern for pattern in allowed if not any(fnmatchcase(n, pattern) for n in used[kind])}
    assert idle == set()


def test_the_operator_meets_only_what_the_node_offers(used):
    operator = rules('/pi05_operator')
    assert operator['request'] <= used['reply']
    assert operator['subscribe'] <= used['publish']
    assert operator['publish'] - OF_EVERY_NODE == {'/task_prompt'}
    assert operator['reply'] == set()


def test_no_comment_stands_where_sros2_expects_an_enclave():
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    enclaves = ElementTree.parse(POLICY, parser).getroot().find('enclaves')
    assert enclaves is not None
    assert [child.tag for child in enclaves] == ['enclave', 'enclave']


def test_only_the_node_may_command_the_robot():
    commands = {'/joint_trajectory', '/commands', '/joint_commands'}
    assert commands <= rules('/pi05_policy')['publish']
    assert not commands & rules('/pi05_operator')['publish']

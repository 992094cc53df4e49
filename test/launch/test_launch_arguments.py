"""What the launch files offer, checked on every machine: without launch and launch_ros."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pi05_ros.control.parameter_file import NODE_NAME
from pi05_ros.control.parameter_table import PARAMETERS
from pi05_ros.control.parameters import is_ros_own
from pi05_ros.launch_arguments import (
    ARGUMENTS,
    DEMO_ARGUMENTS,
    check_params_file,
    node_parameters,
)
from pi05_ros.model.errors import Pi05Error

ROOT = Path(__file__).parents[2]
LAUNCH_FILES = sorted((ROOT / 'launch').glob('*.py'))
DEFAULTS = {argument.name: argument.default for argument in ARGUMENTS}


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / 'launch' / name).read_text(encoding='utf-8'))


def calls(module: ast.Module, function: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == function
    ]


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {k.arg: k.value for k in call.keywords if k.arg}


@pytest.mark.parametrize('path', LAUNCH_FILES, ids=lambda path: path.name)
def test_a_launch_file_is_one(path):
    functions = [n.name for n in tree(path.name).body if isinstance(n, ast.FunctionDef)]
    assert path.name.endswith('.launch.py')
    assert 'generate_launch_description' in functions


def test_what_is_started_is_installed():
    cmake = (ROOT / 'CMakeLists.txt').read_text(encoding='utf-8')
    executables = set(re.findall(r'executables/([\w-]+) @ONLY', cmake))
    (node,) = calls(tree('policy.launch.py'), 'LifecycleNode')
    (tool,) = calls(tree('demo.launch.py'), 'ExecutableInPackage')
    for call in (node, tool):
        assert ast.literal_eval(keywords(call)['package']) == 'pi05_ros'
        assert ast.literal_eval(keywords(call)['executable']) in executables


def test_the_node_has_its_documented_name():
    (node,) = calls(tree('policy.launch.py'), 'LifecycleNode')
    assert ast.literal_eval(keywords(node)['name']) == NODE_NAME


def test_the_aggregator_is_started_when_asked_for_only_with_the_shipped_analyzers():
    module = tree('policy.launch.py')
    (node,) = calls(module, 'Node')
    values = keywords(node)
    assert ast.literal_eval(values['package']) == 'diagnostic_aggregator'
    assert ast.literal_eval(values['executable']) == 'aggregator_node'
    # The analyzers are those of the node /analyzers, which is the aggregator's own name.
    assert 'name' not in values and ast.literal_eval(values['namespace']) == '/'
    (file,) = (n.value for n in ast.walk(values['parameters']) if isinstance(n, ast.Constant))
    assert (ROOT / 'config' / file).is_file()
    (use,) = calls(module, '_aggregator')
    (choice,) = (n for n in ast.walk(module) if isinstance(n, ast.IfExp) and use in ast.walk(n))
    assert ast.unparse(choice.test) == "values['diagnostics_aggregator'] == 'true'"
    assert use in ast.walk(choice.body)
    assert DEFAULTS['diagnostics_aggregator'] == 'false'


def test_every_package_whose_program_is_started_is_a_dependency():
    manifest = ElementTree.parse(ROOT / 'package.xml').getroot()
    declared = {element.text for element in manifest.findall('exec_depend')}
    for path in LAUNCH_FILES:
        for function in ('Node', 'LifecycleNode', 'ExecutableInPackage'):
            for call in calls(tree(path.name), function):
                package = ast.literal_eval(keywords(call)['package'])
                assert package in declared | {manifest.findtext('name')}


def test_every_overridden_parameter_exists():
    known = {spec.name for spec in PARAMETERS}
    names = [argument.parameter for argument in ARGUMENTS if argument.parameter]
    assert [n for n in names if n not in known and not is_ros_own(n)] == []


@pytest.mark.parametrize('arguments', [ARGUMENTS, DEMO_ARGUMENTS], ids=['policy', 'demo'])
def test_arguments_are_unique_described_and_have_an_allowed_default(arguments):
    assert len({argument.name for argument in arguments}) == len(arguments)
    for argument in arguments:
        assert argument.description.endswith('.')
        assert not argument.choices or argument.default in argument.choices


def test_the_demo_hands_on_only_arguments_that_exist_and_never_moves_a_robot():
    (include,) = calls(tree('demo.launch.py'), 'IncludeLaunchDescription')
    items = keywords(include)['launch_arguments']
    assert isinstance(items, ast.Call) and isinstance(items.func, ast.Attribute)
    passed = items.func.value
    assert isinstance(passed, ast.Dict)
    values = {ast.literal_eval(k): v for k, v in zip(passed.keys, passed.values, strict=True)}
    assert set(values) <= set(DEFAULTS)
    assert ast.literal_eval(values['dry_run']) == 'true'


def test_the_default_parameter_file_is_shipped():
    assert Path(DEFAULTS['params_file']) == ROOT / 'config' / 'policy.yaml'
    assert Path(DEFAULTS['params_file']).is_file()


def test_an_empty_argument_keeps_the_value_of_the_parameter_file():
    assert node_parameters(DEFAULTS) == {}


def test_an_argument_becomes_a_parameter_of_its_type():
    values = {**DEFAULTS, 'checkpoint': '2024', 'dry_run': 'false', 'use_sim_time': 'true'}
    assert node_parameters(values) == {
        'checkpoint': '2024',
        'dry_run': False,
        'use_sim_time': True,
    }


@pytest.mark.parametrize('word', ['True', '0', 'no', ' false'])
def test_a_boolean_is_spelt_one_way(word):
    """A robot must not move because 'False' was not understood as false."""
    with pytest.raises(Pi05Error, match=f'dry_run:={word}: expected true or false'):
        node_parameters({**DEFAULTS, 'dry_run': word})


@pytest.mark.parametrize(
    ('section', 'node_name'),
    [
        ('/**', '/pi05_policy'),
        ('pi05_policy', '/pi05_policy'),
        ('/left/pi05_policy', '/left/pi05_policy'),
    ],
)
def test_a_parameter_file_for_the_node_is_taken(tmp_path, section, node_name):
    path = tmp_path / 'params.yaml'
    path.write_text(f'{section}:\n  ros__parameters:\n    rate_hz: 5.0\n')
    check_params_file(str(path), node_name)


def test_a_parameter_file_that_would_be_passed_over_is_refused(tmp_path):
    missing = tmp_path / 'missing.yaml'
    with pytest.raises(Pi05Error, match=r'missing\.yaml: not a readable parameter file'):
        check_params_file(str(missing), '/pi05_policy')
    other = tmp_path / 'other.yaml'
    other.write_text('/left/pi05_policy:\n  ros__parameters:\n    rate_hz: 5.0\n')
    with pytest.raises(Pi05Error, match=r'other\.yaml: no section for /right/pi05_policy;'):
        check_params_file(str(other), '/right/pi05_policy')

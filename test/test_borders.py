"""Imports point down only: ros -> control -> policy -> (model | engine); tools may use all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'pi05_ros'
# Modules of the package itself that know no ROS and may be used from everywhere.
BASE = {'resources', '__version__'}
ALLOWED = {
    'model': {'model'},
    'engine': {'engine', 'model'} | BASE,
    'policy': {'policy', 'engine', 'model'} | BASE,
    'control': {'control', 'policy', 'engine', 'model'} | BASE,
    'ros': {'ros', 'control', 'policy', 'engine', 'model', 'msg'} | BASE,
}
ROS_PACKAGES = {'rclpy', 'launch', 'launch_ros', 'cv_bridge', 'ament_index_python'}


def sources(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob('*.py'))


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, wherever in it."""
    package = ['pi05_ros', *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            if module == 'pi05_ros':
                yield from (f'pi05_ros.{alias.name}' for alias in node.names)
            else:
                yield module


@pytest.mark.parametrize('part', ALLOWED)
def test_a_part_uses_only_itself_and_what_lies_below(part):
    wrong = [
        f'{path.relative_to(PACKAGE)} imports {name}'
        for path in sources(part)
        for name in imported(path)
        if name.startswith('pi05_ros.') and name.split('.')[1] not in ALLOWED[part]
    ]
    assert wrong == []


@pytest.mark.parametrize('part', ['model', 'engine', 'policy', 'control'])
def test_what_lies_below_ros_knows_neither_rclpy_nor_message_types(part):
    wrong = [
        f'{path.relative_to(PACKAGE)} imports {name}'
        for path in sources(part)
        for name in imported(path)
        if name.split('.')[0] in ROS_PACKAGES or '_msgs' in name.split('.')[0]
    ]
    assert wrong == []


def test_every_part_is_checked():
    parts = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
    assert parts - {'tools'} == set(ALLOWED)

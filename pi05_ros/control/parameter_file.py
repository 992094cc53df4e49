"""Read a ROS 2 parameter file the way that ``--params-file`` does, without rclpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pi05_ros.policy.robot import load_robot
from pi05_ros.policy.strict_yaml import YamlError, read_parameter_yaml

from .parameter_table import PARAMETERS
from .parameters import NodeSettings, ParameterError, settings_from_values

NODE_NAME = 'pi05_policy'
DEFAULT_ROBOT = next(str(spec.default) for spec in PARAMETERS if spec.name == 'robot')


def settings_from_yaml(
    path: str | Path,
    node_name: str = NODE_NAME,
    overrides: Mapping[str, Any] | None = None,
) -> NodeSettings:
    """Return the settings that a node of this name would start with.

    Args:
        node_name: with or without namespace, e.g. ``pi05_policy`` or ``/left/pi05_policy``.
        overrides: full parameter name -> value; they win over the file.
    Raises:
        ParameterError: the file is missing, is not a parameter file, or a parameter is wrong.
        RobotError: the robot that it names cannot be used.
    """
    values = {**read_parameter_file(path, node_name), **(overrides or {})}
    robot = values.get('robot', DEFAULT_ROBOT)
    if not isinstance(robot, str):
        raise ParameterError(f'{path}: robot must be a string, got {robot!r}')
    try:
        return settings_from_values(values, load_robot(robot).camera_names)
    except ParameterError as error:
        raise ParameterError(f'{path}: {error}') from None


def read_parameter_file(path: str | Path, node_name: str = NODE_NAME) -> dict[str, Any]:
    """Return full parameter name -> value for one node; more specific sections win.

    Raises:
        ParameterError: the file cannot be read or is not a ROS 2 parameter file.
    """
    path = Path(path)
    try:
        document = read_parameter_yaml(path)
    except YamlError as error:
        raise ParameterError(f'{path}: not a readable parameter file: {error}') from error
    if not isinstance(document, dict):
        raise ParameterError(
            f'{path}: expected "<node>: ros__parameters:", found {document!r:.80}'
        )
    values: dict[str, Any] = {}
    matches = _sections(document, '')
    for _, section in sorted(matches_for(matches, node_name), key=lambda item: item[0]):
        values.update(_flatten(section, ''))
    return values


def matches_for(
    sections: Sequence[tuple[str, Mapping[str, Any]]], node_name: str
) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the sections that apply to the node, each with how specific its name is."""
    full = '/' + node_name.strip('/')
    base = full.rsplit('/', 1)[1]
    rank = {'/**': 0, '/*': 1, f'/**/{base}': 2, f'/*/{base}': 2}
    if full == f'/{base}':
        rank[full] = 3
    else:
        rank.update({f'/{base}': 3, full: 4})
    return [(rank[name], section) for name, section in sections if name in rank]


def _sections(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Find every ``ros__parameters`` below a (namespaced) node name."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for key, child in tree.items():
        if not isinstance(child, dict):
            continue
        if key == 'ros__parameters':
            found.append((prefix or '/', child))
        else:
            found.extend(_sections(child, f'{prefix}/{str(key).strip("/")}'))
    return found


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f'{prefix}{key}.'))
        else:
            flat[f'{prefix}{key}'] = value
    return flat

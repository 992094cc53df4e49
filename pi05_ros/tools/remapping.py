"""Topic remapping and parameter overrides as ``--ros-args`` has them, without rclpy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pi05_ros.control.parameter_file import NODE_NAME

_NAME = re.compile(r'^/?[A-Za-z_]\w*(/[A-Za-z_]\w*)*$')


@dataclass(frozen=True)
class Remapping:
    """What ``-r FROM:=TO`` rules make of the node's relative topic names.

    Args:
        rules: (from, to) in the order given; the first that matches counts. ``__ns`` and
            ``__node`` set the namespace and the name of the node.
    """

    rules: Sequence[tuple[str, str]] = field(default_factory=tuple)

    @property
    def namespace(self) -> str:
        """Namespace of the node with its leading slash."""
        return '/' + next((to for of, to in self.rules if of == '__ns'), '').strip('/')

    @property
    def node_name(self) -> str:
        """Full name of the node, which is looked up in a parameter file."""
        name = next((to for of, to in self.rules if of == '__node'), NODE_NAME)
        return self.expand(name)

    def expand(self, name: str) -> str:
        """Return the absolute form of a name."""
        return name if name.startswith('/') else f'{self.namespace.rstrip("/")}/{name}'

    def resolve(self, topic: str) -> str:
        """Return the absolute topic name that the node would use for a relative one."""
        full = self.expand(topic)
        for of, to in self.rules:
            if not of.startswith('__') and self.expand(of) == full:
                return self.expand(to)
        return full


def remap_rule(text: str) -> tuple[str, str]:
    """Parse ``FROM:=TO`` of the command line."""
    of, separator, to = text.partition(':=')
    if not separator or not _NAME.match(of) or not _NAME.match(to):
        raise argparse.ArgumentTypeError(f'{text!r} is not FROM:=TO with two ROS names')
    return of, to


def parameter_override(text: str) -> tuple[str, Any]:
    """Parse ``NAME:=VALUE`` of the command line; the value is YAML, as in ``ros2 run``."""
    name, separator, value = text.partition(':=')
    if not separator or not name:
        raise argparse.ArgumentTypeError(f'{text!r} is not NAME:=VALUE')
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f'{text!r}: the value is not YAML: {error}') from error

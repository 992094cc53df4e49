"""Reading of small YAML files that a person wrote: plain data, or an error with its place.

``yaml.safe_load`` builds no Python objects, but it keeps the last of two equal keys, and an alias
lets a file of some bytes stand for gigabytes. A robot file needs neither, so both are errors here.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 65_536  # the largest shipped robot file has a tenth of this
MAX_PARAMETER_BYTES = 262_144  # parameters of all nodes of a robot in one file
MAX_FLOW_LEVELS = 32  # of brackets; the scanner's time grows with their square
_INT64 = range(-(2**63), 2**63)
_MERGE_TAG = 'tag:yaml.org,2002:merge'


class YamlError(Exception):
    """The file cannot be read as plain YAML; the message says why and where."""


class _BoundedLoader(yaml.SafeLoader):
    """A safe loader whose result is no larger than the text: no aliases, no endless numbers."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            line = event.start_mark.line + 1
            raise YamlError(f'line {line}: anchor or alias {event.anchor!r} is not allowed')
        return super().compose_node(parent, index)

    # The name is the scanner's.
    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= MAX_FLOW_LEVELS:
            raise YamlError(
                f'line {self.line + 1}: brackets nested more than {MAX_FLOW_LEVELS} deep'
            )
        super().fetch_flow_collection_start(TokenClass)

    def construct_yaml_int(self, node: Any) -> int:
        number = super().construct_yaml_int(node)
        if number not in _INT64:
            line = node.start_mark.line + 1
            raise YamlError(f'line {line}: a whole number of more than 64 bits')
        return number


_BoundedLoader.add_constructor('tag:yaml.org,2002:int', _BoundedLoader.construct_yaml_int)


class _PlainLoader(_BoundedLoader):
    """A loader that refuses anchors, aliases, tags, merges and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        anchor, tag = getattr(event, 'anchor', None), getattr(event, 'tag', None)
        if anchor is not None or tag is not None:
            what = f'anchor or alias {anchor!r}' if anchor is not None else f'tag {tag!r}'
            raise YamlError(f'line {event.start_mark.line + 1}: {what} is not allowed')
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(f'line {line}: a key must be a plain word')
            if key_node.tag == _MERGE_TAG:
                raise YamlError(f'line {line}: a merge (<<) is not allowed')
            if key_node.value in seen:
                raise YamlError(f'line {line}: key {key_node.value!r} is given twice')
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_plain_yaml(path: Path) -> Any:
    """Return the content of one YAML file as dicts, lists and scalars.

    Raises:
        YamlError: the file cannot be opened, is too large, is not UTF-8 or not plain YAML.
    """
    return _read(path, _PlainLoader, MAX_BYTES)


def read_parameter_yaml(path: Path) -> Any:
    """Return the content of a ROS 2 parameter file; as in ROS, an alias is an error.

    Raises:
        YamlError: the file cannot be opened, is too large, is not UTF-8 or not such YAML.
    """
    return _read(path, _BoundedLoader, MAX_PARAMETER_BYTES)


def _read(path: Path, loader: type[_BoundedLoader], max_bytes: int) -> Any:
    try:
        with path.open('rb') as stream:
            raw = stream.read(max_bytes + 1)
    except OSError as error:
        raise YamlError(error.strerror or str(error)) from error
    if len(raw) > max_bytes:
        raise YamlError(f'larger than {max_bytes} bytes')
    try:
        # A SafeLoader makes no object of a tag.
        parser = loader(raw.decode('utf-8'))
        try:
            return parser.get_single_data()
        finally:
            parser.dispose()
    # What looks like a number or a date is not always one.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise YamlError(' '.join(str(error).split())) from error

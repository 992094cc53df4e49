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


class YamlError(Exception):
    """The file cannot be read as plain YAML; the message says why and where."""


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses anchors, aliases, tags and repeated keys."""

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
            if key_node.value in seen:
                raise YamlError(f'line {line}: key {key_node.value!r} is given twice')
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_plain_yaml(path: Path) -> Any:
    """Return the content of one YAML file as dicts, lists and scalars.

    Raises:
        YamlError: the file cannot be opened, is too large, is not UTF-8 or not plain YAML.
    """
    try:
        with path.open('rb') as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise YamlError(error.strerror or str(error)) from error
    if len(raw) > MAX_BYTES:
        raise YamlError(f'larger than {MAX_BYTES} bytes')
    try:
        # The loader is a SafeLoader: no tag, so no object, can be made.
        return yaml.load(raw.decode('utf-8'), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise YamlError(' '.join(str(error).split())) from error

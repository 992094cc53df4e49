from __future__ import annotations

import argparse

import pytest

from pi05_ros.tools.remapping import Remapping, parameter_override, remap_rule


@pytest.mark.parametrize(
    ('rules', 'expected'),
    [
        ((), '/camera/base/image_raw'),
        ((('camera/base/image_raw', 'front'),), '/front'),
        ((('/camera/base/image_raw', '/a/front'),), '/a/front'),
        ((('camera/base', 'front'),), '/camera/base/image_raw'),
        ((('__ns', '/left'),), '/left/camera/base/image_raw'),
        ((('__ns', 'left'), ('camera/base/image_raw', 'front')), '/left/front'),
        ((('__ns', '/left'), ('/camera/base/image_raw', '/x')), '/left/camera/base/image_raw'),
        ((('camera/base/image_raw', 'a'), ('camera/base/image_raw', 'b')), '/a'),
    ],
)
def test_topics_resolve_as_in_ros(rules, expected: str):
    assert Remapping(rules).resolve('camera/base/image_raw') == expected


def test_node_name_has_its_namespace():
    assert Remapping().node_name == '/pi05_policy'
    assert Remapping((('__ns', '/left'), ('__node', 'arm'))).node_name == '/left/arm'


@pytest.mark.parametrize('text', ['a', 'a:=', ':=b', 'a:=b c', 'a//b:=c', '1a:=b'])
def test_rule_without_two_names_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match='is not FROM:=TO'):
        remap_rule(text)


def test_override_has_the_type_that_yaml_gives_it():
    assert parameter_override('rate_hz:=30') == ('rate_hz', 30)
    assert parameter_override('dry_run:=false') == ('dry_run', False)


@pytest.mark.parametrize('text', ['rate_hz', ':=3', 'prompt:=[1'])
def test_override_without_name_or_value_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match='is not'):
        parameter_override(text)

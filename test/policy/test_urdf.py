"""A robot description gives its joints' limits, or says in one line why it cannot."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_files import urdf

from pi05_ros.policy.errors import UrdfError
from pi05_ros.policy.urdf import MAX_CHARACTERS, UrdfJoint, parse_urdf

REVOLUTE = '<joint name="j" type="revolute"><limit lower="-1" upper="2" velocity="3"/></joint>'
TYPES = ('revolute', 'prismatic', 'continuous', 'fixed', 'floating', 'planar')


def test_each_type_of_joint_has_the_limits_of_its_type():
    text = """<?xml version="1.0" encoding="utf-8"?>
    <robot name="r" xmlns:xacro="http://wiki.ros.org/xacro">
      <!-- of 3 kinds -->
      <joint name="turn" type="revolute">
        <axis xyz="0 0 1"/><limit lower="-1.5" upper="2e0" effort="9" velocity="0.5"/>
        <safety_controller soft_lower_limit="-1"/>
      </joint>
      <joint name="slide" type="prismatic"><limit upper="0.04" effort="9" velocity="1"/></joint>
      <joint name="wheel" type="continuous"><limit effort="1" velocity="7"/></joint>
      <joint name="free" type="continuous"/>
      <joint name="rigid" type="fixed"/>
      <joint name="copy" type="revolute">
        <limit lower="0" upper="1"/><mimic joint="turn" multiplier="-1"/>
      </joint>
    </robot>"""
    assert parse_urdf(text) == {
        'turn': UrdfJoint('turn', 'revolute', 'rad', -1.5, 2.0, 0.5),
        'slide': UrdfJoint('slide', 'prismatic', 'm', 0.0, 0.04, 1.0),
        'wheel': UrdfJoint('wheel', 'continuous', 'rad', -math.inf, math.inf, 7.0),
        'free': UrdfJoint('free', 'continuous', 'rad'),
        'rigid': UrdfJoint('rigid', 'fixed'),
        'copy': UrdfJoint('copy', 'revolute', 'rad', 0.0, 1.0, math.inf, mimics='turn'),
    }


def test_references_to_joints_are_not_joints():
    """<ros2_control> and <transmission> name joints, too, with other limits or none."""
    inner = (
        '<ros2_control name="c" type="system"><joint name="j">'
        '<command_interface name="position"><param name="min">-9</param></command_interface>'
        '</joint></ros2_control><transmission name="t"><joint name="j"/></transmission>'
    )
    assert parse_urdf(urdf(REVOLUTE + inner))['j'].lower == -1.0


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'it is not XML'),
        ('<robot>', 'it is not XML'),
        ('<sdf/>', 'it is <sdf>, expected <robot>'),
        (urdf('<joint type="fixed"/>'), "a joint has name '' and type 'fixed'; it needs both"),
        (urdf('<joint name="j"/>'), "a joint has name 'j' and type ''"),
        (urdf('<joint name="j" type="revolute"/>'), 'joint j is revolute and has no <limit>'),
        (urdf(REVOLUTE * 2), 'joint j is given twice'),
        (urdf(REVOLUTE.replace('-1', '${-pi}')), r"joint j: lower is '\$\{-pi\}', expected a num"),
        (urdf(REVOLUTE.replace('3', 'nan')), "joint j: velocity is 'nan', expected a number"),
        (' ' * (MAX_CHARACTERS + 1), f'{MAX_CHARACTERS + 1} characters; at most'),
    ],
)
def test_what_is_no_usable_description_is_refused_with_the_reason(text, message):
    with pytest.raises(UrdfError, match=message):
        parse_urdf(text)


@pytest.mark.parametrize(
    'declaration',
    [
        '<!DOCTYPE robot [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>',
        '<!DOCTYPE robot SYSTEM "file:///etc/passwd">',
        '<!doctype robot>',
        '<! ENTITY a "b">',
    ],
)
def test_entities_and_document_types_are_refused_before_anything_is_expanded(declaration):
    with pytest.raises(UrdfError, match='declares a DOCTYPE or an ENTITY'):
        parse_urdf(f'<?xml version="1.0"?>{declaration}<robot name="r">{REVOLUTE}</robot>')


def test_an_entity_that_nothing_declares_is_no_xml():
    with pytest.raises(UrdfError, match='undefined entity'):
        parse_urdf('<robot name="r">&a;</robot>')


_PIECES = st.sampled_from(
    ['<robot name="r">', '</robot>', '<joint name="j" ', 'type="revolute">', '</joint>', '<limit ',
     'lower="-1" ', 'upper="2" ', 'velocity="1e999"', '/>', '<mimic joint="j"/>', '<!--', '-->',
     '<![CDATA[', ']]>', '<?xml version="1.0" encoding="utf-16"?>', '&amp;', '&#0;', '"', '\0']
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(_PIECES).map(''.join)))
def test_any_text_is_a_description_or_a_urdf_error(text):
    try:
        joints = parse_urdf(text)
    except UrdfError as error:
        assert str(error)
        return
    assert all(name and joint.kind for name, joint in joints.items())


@given(
    st.sampled_from(TYPES),
    st.lists(st.sampled_from(['lower', 'upper', 'velocity', 'effort']), unique=True),
    st.floats(allow_nan=False),
)
def test_limits_are_read_to_the_last_bit_and_never_nan(kind, given_limits, value):
    limits = ' '.join(f'{name}="{value!r}"' for name in given_limits)
    joint = parse_urdf(urdf(f'<joint name="j" type="{kind}"><limit {limits}/></joint>'))['j']
    positions = {'lower', 'upper'} if kind in ('revolute', 'prismatic') else set()
    known = (positions | {'velocity'}) if joint.unit else set()
    for name in ('lower', 'upper', 'velocity'):
        found = getattr(joint, name)
        if name in given_limits and name in known:
            assert found == value
        else:
            assert found == (0.0 if name in positions else getattr(UrdfJoint('j', kind), name))

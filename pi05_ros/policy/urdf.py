"""Joint limits from a robot description (URDF), as robot_state_publisher sends it.

Read are type, limits and mimic of each ``<joint>`` directly below ``<robot>``; the joints within
``<transmission>`` and ``<ros2_control>`` are references to them. A description comes from another
process, so it is bounded in size and may declare no entities, which could grow without bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from .errors import UrdfError

MAX_CHARACTERS = 2_000_000  # a mobile manipulator with two arms and hands has about 200 000
_UNITS = {'revolute': 'rad', 'continuous': 'rad', 'prismatic': 'm'}
# Without such a declaration, XML knows only the five entities of single characters.
_DECLARATION = re.compile(r'<!\s*(?:DOCTYPE|ENTITY)', re.IGNORECASE)


@dataclass(frozen=True)
class UrdfJoint:
    """One joint that moves along one axis, or one that does not (``unit`` is empty then).

    Args:
        kind: the URDF's type, e.g. ``revolute``.
        unit: rad or m; velocities are per second.
        lower, upper: infinite for a continuous joint.
        velocity: largest speed; infinite where none is given.
        mimics: the joint that it follows; empty for one that moves by itself.
    """

    name: str
    kind: str
    unit: str = ''
    lower: float = -math.inf
    upper: float = math.inf
    velocity: float = math.inf
    mimics: str = ''


def parse_urdf(text: str) -> dict[str, UrdfJoint]:
    """Return joint name -> joint.

    Raises:
        UrdfError: not a robot description, or a joint's limits are missing or impossible.
    """
    if len(text) > MAX_CHARACTERS:
        raise UrdfError(f'it has {len(text)} characters; at most {MAX_CHARACTERS} are read')
    if _DECLARATION.search(text):
        raise UrdfError('it declares a DOCTYPE or an ENTITY, which a robot description needs not')
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise UrdfError(f'it is not XML: {error}') from error
    if root.tag != 'robot':
        raise UrdfError(f'it is <{root.tag}>, expected <robot>')
    joints: dict[str, UrdfJoint] = {}
    for element in root.findall('joint'):
        joint = _joint(element)
        if joint.name in joints:
            raise UrdfError(f'joint {joint.name} is given twice')
        joints[joint.name] = joint
    return joints


def _joint(element: ElementTree.Element) -> UrdfJoint:
    name, kind = element.get('name', ''), element.get('type', '')
    if not name or not kind:
        raise UrdfError(f'a joint has name {name!r} and type {kind!r}; it needs both')
    mimic = element.find('mimic')
    mimics = '' if mimic is None else mimic.get('joint', '')
    if kind not in _UNITS:
        return UrdfJoint(name, kind, mimics=mimics)
    limit = element.find('limit')
    if limit is None:
        if kind != 'continuous':
            raise UrdfError(f'joint {name} is {kind} and has no <limit>')
        return UrdfJoint(name, kind, _UNITS[kind], mimics=mimics)
    velocity = _number(name, limit.attrib, 'velocity', math.inf)
    lower, upper = -math.inf, math.inf
    if kind != 'continuous':
        # The format says that a limit which is left out is 0.
        lower = _number(name, limit.attrib, 'lower', 0.0)
        upper = _number(name, limit.attrib, 'upper', 0.0)
    return UrdfJoint(name, kind, _UNITS[kind], lower, upper, velocity, mimics)


def _number(joint: str, attributes: Mapping[str, str], name: str, default: float) -> float:
    text = attributes.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UrdfError(f'joint {joint}: {name} is {text!r:.40}, expected a number')
    return value

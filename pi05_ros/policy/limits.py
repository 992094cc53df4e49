"""Which limit counts where the robot file and the robot description both give one.

The result is a robot file again, so that whatever guards the actions knows of one source only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UrdfError
from .robot import ActionDim, RobotSpec
from .urdf import UrdfJoint

ROBOT_FILE, URDF, BOTH = 'robot_file', 'urdf', 'both'
LIMIT_SOURCES = (ROBOT_FILE, URDF, BOTH)
# Where one limit of one action comes from, beside the sources above.
DEFAULT, NONE = 'default', 'none'
_INSTEAD = f'or set limits_source: {ROBOT_FILE}'


@dataclass(frozen=True)
class _Bound:
    """One limit: infinite where there is none."""

    value: float
    source: str

    @property
    def is_given(self) -> bool:
        return math.isfinite(self.value)


@dataclass(frozen=True)
class _Bounds:
    """The limits of one action dimension that a robot description can know."""

    low: _Bound
    high: _Bound
    rate: _Bound


def limit_robot(robot: RobotSpec, source: str, joints: Mapping[str, UrdfJoint]) -> RobotSpec:
    """Return the robot with the limits that count.

    ``robot_file`` returns it as it is. ``urdf`` replaces each limit of the file that the
    description gives, too; ``both`` takes the tighter one. Of a joint position these are min, max
    and max_rate; of a gripper position min and max; of a joint velocity min and max. Actions in
    no unit of a joint (deltas of the end effector, shares of a range) keep those of the file.

    Args:
        joints: of the description, see :func:`pi05_ros.policy.urdf.parse_urdf`.
    Raises:
        UrdfError: a joint of the actions is not there, is of another kind than its action, or its
            limits are impossible; names all of them.
    """
    if source == ROBOT_FILE:
        return robot
    dims, faults = [], []
    for dim in robot.actions:
        try:
            dims.append(_limit(dim, source, joints))
        except UrdfError as fault:
            faults.append(str(fault))
    if faults:
        raise UrdfError(
            f'the robot description does not fit robot {robot.name}: {"; ".join(faults)}; '
            f'correct one of them, {_INSTEAD}'
        )
    return robot.model_copy(update={'actions': tuple(dims)})


def limit_origins(robot: RobotSpec, source: str, joints: Mapping[str, UrdfJoint]) -> str:
    """Say where the limits of :func:`limit_robot` come from, by kind of limit and source.

    Returns: e.g. ``min robot_file; max robot_file; rate urdf (joint1), none (gripper)``; names
        the actions where not all have the same source.
    """
    chosen = {dim.name: _bounds(dim, source, joints) for dim in robot.actions}
    parts = []
    for kind, field in (('min', 'low'), ('max', 'high'), ('rate', 'rate')):
        names: dict[str, list[str]] = {}
        for name, bounds in chosen.items():
            names.setdefault(getattr(bounds, field).source, []).append(name)
        sources = [
            origin if len(names) == 1 else f'{origin} ({", ".join(of_origin)})'
            for origin, of_origin in names.items()
        ]
        parts.append(f'{kind} {", ".join(sources)}')
    return '; '.join(parts)


def _limit(dim: ActionDim, source: str, joints: Mapping[str, UrdfJoint]) -> ActionDim:
    bounds = _bounds(dim, source, joints)
    if bounds == _of_file(dim):
        return dim
    if bounds.low.value >= bounds.high.value:
        raise UrdfError(
            f'{dim.name}: min {bounds.low.value:g} {dim.unit} ({bounds.low.source}) is not below '
            f'max {bounds.high.value:g} {dim.unit} ({bounds.high.source})'
        )
    return dim.model_copy(
        update={
            'min': bounds.low.value if bounds.low.is_given else None,
            'max': bounds.high.value if bounds.high.is_given else None,
            'max_rate': bounds.rate.value,
        }
    )


def _bounds(dim: ActionDim, source: str, joints: Mapping[str, UrdfJoint]) -> _Bounds:
    file = _of_file(dim)
    if source == ROBOT_FILE or dim.joint is None or _joint_unit(dim) == '1':
        return file
    urdf = _of_joint(dim, _find(dim, joints))
    return _Bounds(
        low=_choose(source, file.low, urdf.low, 1.0),
        high=_choose(source, file.high, urdf.high, -1.0),
        rate=_choose(source, file.rate, urdf.rate, -1.0),
    )


def _choose(source: str, file: _Bound, urdf: _Bound, inwards: float) -> _Bound:
    """Take the tighter one, or that of the description; ``inwards`` is 1 for a lower limit."""
    if not urdf.is_given:
        return file
    if source == URDF or not file.is_given:
        return urdf
    return urdf if (urdf.value - file.value) * inwards > 0.0 else file


def _of_file(dim: ActionDim) -> _Bounds:
    low = _Bound(-math.inf, NONE) if dim.min is None else _Bound(dim.min, ROBOT_FILE)
    high = _Bound(math.inf, NONE) if dim.max is None else _Bound(dim.max, ROBOT_FILE)
    rate = _Bound(dim.rate_limit, DEFAULT if dim.max_rate is None else ROBOT_FILE)
    return _Bounds(low, high, rate if rate.is_given else _Bound(math.inf, NONE))


def _of_joint(dim: ActionDim, joint: UrdfJoint) -> _Bounds:
    lower, upper, velocity = (_Bound(v, URDF) for v in (joint.lower, joint.upper, joint.velocity))
    unlimited = _Bound(math.inf, NONE)
    # A gripper opens and shuts at once; what limits its speed is the gripper itself.
    if dim.kind == 'gripper_position':
        velocity = unlimited
    if velocity.value <= 0.0:
        raise UrdfError(f'joint {joint.name} has velocity {joint.velocity:g}, so nothing may move')
    if dim.kind == 'joint_velocity':
        return _Bounds(_Bound(-velocity.value, URDF), velocity, unlimited)
    if lower.value >= upper.value:
        raise UrdfError(
            f'joint {joint.name} has lower {joint.lower:g}, not below upper {joint.upper:g}'
        )
    return _Bounds(lower, upper, velocity)


def _find(dim: ActionDim, joints: Mapping[str, UrdfJoint]) -> UrdfJoint:
    assert dim.joint is not None
    joint = joints.get(dim.joint)
    if joint is None:
        close = difflib.get_close_matches(dim.joint, joints, n=1)
        hint = f'did you mean {close[0]}?' if close else f'it has {", ".join(joints) or "none"}'
        raise UrdfError(f'joint {dim.joint} is not in it, {hint}')
    if joint.mimics:
        raise UrdfError(f'joint {joint.name} mimics {joint.mimics} and cannot be driven itself')
    if joint.unit != _joint_unit(dim):
        found = f'{joint.kind}, in {joint.unit}' if joint.unit else joint.kind
        raise UrdfError(f'joint {joint.name} is {found}, but action {dim.name} is in {dim.unit}')
    return joint


def _joint_unit(dim: ActionDim) -> str:
    """Return the unit of the position of an action's joint; '1' if the action has no unit."""
    return dim.unit.removesuffix('/s')

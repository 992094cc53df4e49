"""The state vector: joints by name, components of the end effector's pose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pi05_ros.policy.robot import StateDim

from .cdr import JointStateMessage, PoseMessage
from .reasons import InputFault, Reason

_AXES = 'xyzw'
# A quaternion further from unit length than this is not a rounded one but a wrong one.
_UNIT_TOLERANCE = 1e-2


class JointIndex:
    """Finds the wanted joints in a JointState by name; the search is kept until names change."""

    def __init__(self, state: Sequence[StateDim]) -> None:
        self._wanted = [
            (index, dim.joint, dim.field) for index, dim in enumerate(state) if dim.joint
        ]
        self._names: tuple[str, ...] | None = None  # of the message that was searched last
        self._source: dict[str, int] = {}

    def fill(self, state: np.ndarray, message: JointStateMessage) -> None:
        """Write every joint value into its place of ``state`` (S,) float64.

        Raises:
            InputFault: names the joints that are missing, lack the wanted field, or are not
                finite; the field and the names have different lengths.
        """
        self._look_up(message.names)
        not_finite: list[str] = []
        for index, joint, field in self._wanted:
            values: np.ndarray = getattr(message, field)
            if len(values) != len(message.names):
                raise InputFault(
                    Reason.JOINT_MISSING if not len(values) else Reason.MALFORMED_MESSAGE,
                    f'{len(message.names)} names and {len(values)} values of '
                    f'{field}; {joint}.{field} is needed',
                )
            value = float(values[self._source[joint]])
            if not math.isfinite(value):
                not_finite.append(f'{joint}.{field} = {value}')
            state[index] = value
        if not_finite:
            raise InputFault(Reason.JOINT_NOT_FINITE, f'not finite: {", ".join(not_finite)}')

    def _look_up(self, names: tuple[str, ...]) -> None:
        if names == self._names:
            return
        source = {name: index for index, name in enumerate(names)}
        wanted = dict.fromkeys(joint for _, joint, _ in self._wanted)
        missing = [joint for joint in wanted if joint not in source]
        if missing:
            raise InputFault(
                Reason.JOINT_MISSING,
                f'lacks {", ".join(missing)}; it has {_shorten(names)}',
            )
        twice = [joint for joint in wanted if names.count(joint) > 1]
        if twice:
            raise InputFault(Reason.MALFORMED_MESSAGE, f'given twice: {", ".join(twice)}')
        self._names, self._source = names, source


def eef_component(component: str, pose: PoseMessage) -> float:
    """Return one component of the robot file's ``eef`` state, in metres, radians or 1.

    ``axis_angle_*`` is the unit axis times the angle in [0, 2*pi], as robosuite's
    ``quat2axisangle`` makes it.

    Raises:
        InputFault: a component is not finite, or the quaternion has no unit length.
    """
    kind, axis = component.rsplit('_', 1)
    index = _AXES.index(axis)
    _check_pose(pose)
    if kind == 'position':
        return float(pose.position[index])
    if kind == 'quaternion':
        return float(pose.orientation[index])
    w = min(1.0, max(-1.0, float(pose.orientation[3])))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return 0.0  # no rotation: the axis is undefined and its angle is zero
    return float(pose.orientation[index]) * 2.0 * math.acos(w) / sine


def _check_pose(pose: PoseMessage) -> None:
    values = np.concatenate([pose.position, pose.orientation])
    length = math.hypot(*pose.orientation)
    if not np.isfinite(values).all():
        raise InputFault(Reason.JOINT_NOT_FINITE, f'not finite: {values.tolist()}')
    if abs(length - 1.0) > _UNIT_TOLERANCE:
        raise InputFault(
            Reason.MALFORMED_MESSAGE, f'quaternion has length {length:.4g}, expected 1'
        )


def _shorten(names: tuple[str, ...], limit: int = 12) -> str:
    shown = ', '.join(names[:limit]) or 'no names'
    return shown if len(names) <= limit else f'{shown} and {len(names) - limit} more'

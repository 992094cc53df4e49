"""The values of the parameters, checked against their table: one frozen :class:`NodeSettings`.

The node reads them from ROS, replay from the same YAML file (``parameter_file.py``).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pi05_ros.model.errors import Pi05Error

from .parameter_table import CAMERA_PARAMETERS, PARAMETERS, ParameterSpec, Value, parameter_specs


class ParameterError(Pi05Error):
    """A parameter is unknown, of the wrong type, or outside of its range."""


@dataclass(frozen=True)
class CameraSettings:
    """How one camera's images arrive, and how old they may be (0: as those of all cameras)."""

    transport: str = 'raw'
    reliability: str = 'best_effort'
    max_age_ms: float = 0.0


@dataclass(frozen=True)
class NodeSettings:
    """All parameters, checked; use :meth:`camera` for what concerns one camera."""

    checkpoint: str
    robot: str
    asset_id: str
    tokenizer: str
    backend: str
    precision: str
    device: str
    self_check_min_cosine: float
    num_steps: int
    horizon: int
    prompt: str
    seed: int
    rate_hz: float
    stamp_source: str
    max_image_age_ms: float
    max_joint_age_ms: float
    max_skew_ms: float
    max_future_ms: float
    input_timeout_s: float
    limits_source: str
    action_interface: str
    execute_horizon: int
    dry_run: bool
    watchdog_periods: int
    watchdog_action: str
    cameras: Mapping[str, CameraSettings] = field(default_factory=dict)

    @property
    def watchdog_timeout_s(self) -> float:
        """How long no action may come while the node is active."""
        return self.watchdog_periods / self.rate_hz

    @property
    def period_ns(self) -> int:
        """Time between two ticks."""
        return round(1e9 / self.rate_hz)

    def camera(self, name: str) -> CameraSettings:
        """Return the settings of a camera of the robot file."""
        return self.cameras.get(name, CameraSettings())

    def age_limit(self, name: str) -> tuple[str, float]:
        """Return the parameter that says how old an input may be, and its value in ms.

        Args:
            name: a camera of the robot file, or a joint state or pose.
        """
        if name not in self.cameras:
            return 'max_joint_age_ms', self.max_joint_age_ms
        own_ms = self.cameras[name].max_age_ms
        if own_ms:
            return f'cameras.{name}.max_age_ms', own_ms
        return 'max_image_age_ms', self.max_image_age_ms


MAX_PROBLEMS = 20  # listed at once

ROS_OWN_PARAMETERS = ('use_sim_time', 'start_type_description_service')
ROS_OWN_PREFIXES = ('qos_overrides.',)

_IN_WORDS = {
    'string': 'a string',
    'int': 'a whole number',
    'double': 'a number',
    'bool': 'true or false',
}
_TYPES = {'string': str, 'int': int, 'double': float, 'bool': bool}


def is_ros_own(name: str) -> bool:
    """Tell whether rclpy, not this package, owns the parameter."""
    return name in ROS_OWN_PARAMETERS or name.startswith(ROS_OWN_PREFIXES)


def coerce(spec: ParameterSpec, value: Any) -> Value:
    """Return the value in the type of its parameter, checked.

    Raises:
        ParameterError: wrong type, out of range, not one of the choices.
    """
    if spec.kind == 'double' and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    found = type(value)  # not isinstance: a bool is no int here
    if found is not _TYPES[spec.kind]:
        wanted = _IN_WORDS[spec.kind]
        raise ParameterError(f'{spec.name} must be {wanted}; got {value!r} ({found.__name__})')
    if spec.choices and value not in spec.choices:
        allowed = ', '.join(spec.choices)
        raise ParameterError(f'{spec.name} must be one of {allowed}; got {value!r}')
    # "not inside" instead of "outside" also refuses NaN.
    if spec.minimum is not None and not spec.minimum <= value <= (spec.maximum or math.inf):
        raise ParameterError(f'{spec.name} must be {spec.constraints}; got {value!r}')
    return value


def unknown_parameter(name: str, known: Mapping[str, ParameterSpec]) -> ParameterError:
    """Say that a parameter does not exist, and which one was probably meant."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {close[0]}?' if close else f'known: {", ".join(sorted(known))}'
    return ParameterError(f'unknown parameter {name}; {hint}')


def settings_from_values(
    values: Mapping[str, Any], cameras: tuple[str, ...] | list[str]
) -> NodeSettings:
    """Check a plain mapping of full parameter names and fill in the defaults.

    Args:
        cameras: camera names of the robot file; ``cameras.<camera>.*`` of others is unknown.
    Raises:
        ParameterError: lists every parameter that is wrong.
    """
    table = parameter_specs(cameras)
    chosen: dict[str, Value] = {name: spec.default for name, spec in table.items()}
    problems: list[str] = []
    for name, value in values.items():
        if is_ros_own(name):
            continue
        if len(problems) == MAX_PROBLEMS:  # looking for what was meant takes its time
            break
        if name not in table:
            problems.append(str(unknown_parameter(name, table)))
            continue
        try:
            chosen[name] = coerce(table[name], value)
        except ParameterError as error:
            problems.append(str(error))
    if problems:
        raise ParameterError('; '.join(problems))
    per_camera: dict[str, CameraSettings] = {}
    for camera in cameras:
        of_camera: dict[str, Any] = {
            spec.name: chosen[f'cameras.{camera}.{spec.name}'] for spec in CAMERA_PARAMETERS
        }
        per_camera[camera] = CameraSettings(**of_camera)
    plain: dict[str, Any] = {spec.name: chosen[spec.name] for spec in PARAMETERS}
    return NodeSettings(**plain, cameras=per_camera)

"""Every parameter of the node, once: name, type, default, range, meaning.

The node declares this table to ROS; replay reads the same YAML file with
:func:`settings_from_yaml`. Both get one frozen :class:`NodeSettings`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.limits import LIMIT_SOURCES

Value = str | int | float | bool


class ParameterError(Pi05Error):
    """A parameter is unknown, of the wrong type, or outside of its range."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Args:
        kind: ``string``, ``int``, ``double`` or ``bool``. A double also takes a whole number.
        minimum, maximum: inclusive, for numbers.
        choices: the allowed values of a string; empty means any.
        read_only: it is read when the node starts; False means that it may change at any time.
    """

    name: str
    kind: str
    default: Value
    description: str
    read_only: bool = True
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def constraints(self) -> str:
        """Say in words what is allowed; empty where every value of the type is."""
        if self.choices:
            return 'one of: ' + ', '.join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f'{self.minimum:g} to {self.maximum:g}'
        return ''


@dataclass(frozen=True)
class CameraSettings:
    """How one camera's images arrive."""

    transport: str = 'raw'
    reliability: str = 'best_effort'


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


MAX_STEPS = 10

PARAMETERS: tuple[ParameterSpec, ...] = (
    ParameterSpec('checkpoint', 'string', '', 'Checkpoint directory (openpi or lerobot layout).'),
    ParameterSpec(
        'robot', 'string', 'franka', 'Robot file: the name of a shipped one, or a path to a YAML.'
    ),
    ParameterSpec(
        'asset_id',
        'string',
        '',
        'Directory under assets/ with the normalisation statistics; empty takes the robot file.',
    ),
    ParameterSpec(
        'tokenizer',
        'string',
        '',
        'Path of paligemma_tokenizer.model; empty looks in the checkpoint directory.',
    ),
    ParameterSpec(
        'backend',
        'string',
        'auto',
        'What runs the model. auto takes the fastest one that works here and says which.',
        choices=('auto', 'eager', 'cuda', 'tensorrt'),
    ),
    ParameterSpec(
        'precision',
        'string',
        'auto',
        'Precision of weights and activations. auto: bfloat16 on a GPU, float32 on the CPU.',
        choices=('auto', 'bfloat16', 'float32'),
    ),
    ParameterSpec(
        'device', 'string', 'auto', 'auto (a GPU where there is one), cpu, cuda, or cuda:N.'
    ),
    ParameterSpec(
        'self_check_min_cosine',
        'double',
        0.999,
        'Configure refuses a backend with a stage whose cosine to the oracle is below, on the '
        'first real observation.',
        minimum=0.0,
        maximum=1.0,
    ),
    ParameterSpec(
        'num_steps',
        'int',
        10,
        'Euler steps of the denoiser; fewer is faster and coarser.',
        read_only=False,
        minimum=1,
        maximum=MAX_STEPS,
    ),
    ParameterSpec(
        'horizon',
        'int',
        0,
        'Rows of an action chunk; 0 takes the robot file, else the checkpoint.',
        minimum=0,
        maximum=1000,
    ),
    ParameterSpec(
        'prompt',
        'string',
        '',
        'The task in words. A later message on task_prompt replaces it, and the other way round.',
        read_only=False,
    ),
    ParameterSpec(
        'seed',
        'int',
        0,
        'Seed of the noise; with the tick number it determines the noise of each action.',
        minimum=0,
        maximum=2**62,
    ),
    ParameterSpec(
        'rate_hz', 'double', 20.0, 'Control ticks per second.', minimum=0.1, maximum=1000.0
    ),
    ParameterSpec(
        'stamp_source',
        'string',
        'header',
        'Age of an input counts from its header stamp, or from when it was received.',
        choices=('header', 'receive'),
    ),
    ParameterSpec(
        'max_image_age_ms',
        'double',
        100.0,
        'Oldest image to act on, in ms.',
        read_only=False,
        minimum=1.0,
        maximum=60_000.0,
    ),
    ParameterSpec(
        'max_joint_age_ms',
        'double',
        100.0,
        'Oldest joint state (or pose) to act on, in ms.',
        read_only=False,
        minimum=1.0,
        maximum=60_000.0,
    ),
    ParameterSpec(
        'max_skew_ms',
        'double',
        50.0,
        'Largest time between the images of two cameras, in ms.',
        read_only=False,
        minimum=0.0,
        maximum=60_000.0,
    ),
    ParameterSpec(
        'max_future_ms',
        'double',
        50.0,
        'Tolerated lead of a stamp over the clock of this node, in ms.',
        read_only=False,
        minimum=0.0,
        maximum=60_000.0,
    ),
    ParameterSpec(
        'input_timeout_s',
        'double',
        15.0,
        'How long configure waits for a first message of every input, in s.',
        minimum=0.1,
        maximum=600.0,
    ),
    ParameterSpec(
        'limits_source',
        'string',
        'robot_file',
        'Whose joint limits count. urdf: robot_description, where it has one. both: the tighter.',
        choices=LIMIT_SOURCES,
    ),
    ParameterSpec(
        'action_interface',
        'string',
        'action_chunk',
        'action_chunk: rows as pi05_ros/ActionChunk on ~/action_chunk. '
        'joint_trajectory: rows on joint_trajectory. '
        'forward_command, joint_state: the first row on commands, joint_commands.',
        choices=('action_chunk', 'joint_trajectory', 'forward_command', 'joint_state'),
    ),
    ParameterSpec(
        'execute_horizon',
        'int',
        0,
        'Rows of a chunk that are sent, from the first on; 0: all that the interface carries.',
        minimum=0,
        maximum=1000,
    ),
    ParameterSpec(
        'dry_run',
        'bool',
        True,
        'Send no command: chunks go to ~/dry_run/action_chunk only.',
    ),
    ParameterSpec(
        'watchdog_periods',
        'int',
        5,
        'Ticks without an action, by the steady clock, after which the watchdog acts.',
        minimum=1,
        maximum=1000,
    ),
    ParameterSpec(
        'watchdog_action',
        'string',
        'hold',
        'hold: command the measured position once. stop: only stop publishing.',
        choices=('hold', 'stop'),
    ),
)

# Declared once per camera of the robot file, as cameras.<camera>.<name>.
CAMERA_PARAMETERS: tuple[ParameterSpec, ...] = (
    ParameterSpec(
        'transport',
        'string',
        'raw',
        'raw: sensor_msgs/Image on camera/<camera>/image_raw. '
        'compressed: sensor_msgs/CompressedImage on camera/<camera>/image_raw/compressed.',
        choices=('raw', 'compressed'),
    ),
    ParameterSpec(
        'reliability',
        'string',
        'best_effort',
        'Reliability asked of the camera. best_effort also matches a reliable publisher.',
        choices=('best_effort', 'reliable'),
    ),
)

# Parameters that rclpy itself declares or reads.
ROS_OWN_PARAMETERS = ('use_sim_time', 'start_type_description_service')
ROS_OWN_PREFIXES = ('qos_overrides.',)

_IN_WORDS = {
    'string': 'a string',
    'int': 'a whole number',
    'double': 'a number',
    'bool': 'true or false',
}
_TYPES = {'string': str, 'int': int, 'double': float, 'bool': bool}


def parameter_specs(cameras: tuple[str, ...] | list[str]) -> dict[str, ParameterSpec]:
    """Return the whole table by full name, for a robot with these cameras."""
    table = {spec.name: spec for spec in PARAMETERS}
    for camera in cameras:
        for spec in CAMERA_PARAMETERS:
            name = f'cameras.{camera}.{spec.name}'
            table[name] = replace(spec, name=name)
    return table


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
        of_camera = {
            spec.name: str(chosen[f'cameras.{camera}.{spec.name}']) for spec in CAMERA_PARAMETERS
        }
        per_camera[camera] = CameraSettings(**of_camera)
    plain: dict[str, Any] = {spec.name: chosen[spec.name] for spec in PARAMETERS}
    return NodeSettings(**plain, cameras=per_camera)

"""The table of all parameters of the node: name, type, default, range, and what each is for.

A parameter is declared here and nowhere else. The node, the parameter file, replay, the README and
the descriptors of ``ros2 param describe`` are made of this table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pi05_ros.policy.limits import LIMIT_SOURCES

Value = str | int | float | bool

# When a parameter may be set.
AT_START, INACTIVE, ANY_TIME = 'at start', 'while not active', 'any time'

MAX_STEPS = 10


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Args:
        kind: ``string``, ``int``, ``double`` or ``bool``. A double also takes a whole number.
        minimum, maximum: inclusive, for numbers.
        choices: the allowed values of a string; empty means any.
        settable: one of :data:`AT_START`, :data:`INACTIVE` and :data:`ANY_TIME`.
    """

    name: str
    kind: str
    default: Value
    description: str
    settable: str = AT_START
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def read_only(self) -> bool:
        """Tell whether it is read when the node starts, and never again."""
        return self.settable == AT_START

    @property
    def constraints(self) -> str:
        """Say in words what is allowed; empty where every value of the type is."""
        if self.choices:
            return 'one of: ' + ', '.join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f'{self.minimum:g} to {self.maximum:g}'
        return ''


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
        settable=ANY_TIME,
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
        settable=ANY_TIME,
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
        'rate_hz',
        'double',
        20.0,
        'Control ticks per second.',
        settable=INACTIVE,
        minimum=0.1,
        maximum=1000.0,
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
        settable=ANY_TIME,
        minimum=1.0,
        maximum=60_000.0,
    ),
    ParameterSpec(
        'max_joint_age_ms',
        'double',
        100.0,
        'Oldest joint state (or pose) to act on, in ms.',
        settable=ANY_TIME,
        minimum=1.0,
        maximum=60_000.0,
    ),
    ParameterSpec(
        'max_skew_ms',
        'double',
        50.0,
        'Largest time between the images of two cameras, in ms.',
        settable=ANY_TIME,
        minimum=0.0,
        maximum=60_000.0,
    ),
    ParameterSpec(
        'max_future_ms',
        'double',
        50.0,
        'Tolerated lead of a stamp over the clock of this node, in ms.',
        settable=ANY_TIME,
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
    ParameterSpec(
        'max_age_ms',
        'double',
        0.0,
        'Oldest image of this camera to act on, in ms; 0: max_image_age_ms.',
        settable=ANY_TIME,
        minimum=0.0,
        maximum=60_000.0,
    ),
)

# Parameters that rclpy itself declares or reads.


def parameter_specs(cameras: tuple[str, ...] | list[str]) -> dict[str, ParameterSpec]:
    """Return the whole table by full name, for a robot with these cameras."""
    table = {spec.name: spec for spec in PARAMETERS}
    for camera in cameras:
        for spec in CAMERA_PARAMETERS:
            name = f'cameras.{camera}.{spec.name}'
            table[name] = replace(spec, name=name)
    return table

"""The arguments of the launch files: only what changes from one start to the next.

Without launch or rclpy, so that tests and documentation can read it on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pi05_ros.control.parameter_file import read_parameter_file
from pi05_ros.model.errors import Pi05Error
from pi05_ros.resources import config_dir, demo_bag
from pi05_ros.transport import DEFAULT_PROFILE

_BOOLEANS = {'true': True, 'false': False}


@dataclass(frozen=True)
class LaunchArgument:
    """One launch argument.

    Args:
        parameter: the parameter of the node that it overrides; '' for none. Left empty on the
            command line, the argument leaves that parameter as the parameter file has it.
        choices: allowed values; empty means any.
    """

    name: str
    default: str
    description: str
    parameter: str = ''
    choices: tuple[str, ...] = ()


_LOG_LEVEL = LaunchArgument(
    'log_level',
    'info',
    "Level of the node's own messages.",
    choices=('debug', 'info', 'warn', 'error', 'fatal'),
)
_FASTDDS_PROFILE = LaunchArgument(
    'fastdds_profile',
    DEFAULT_PROFILE,
    'Fast DDS transports: large_images, large_data (faster, but every other process must use it '
    'too), default (untouched), or the path of an XML profile. Camera drivers need one as well.',
)

# Of policy.launch.py
ARGUMENTS: tuple[LaunchArgument, ...] = (
    LaunchArgument(
        'params_file',
        str(config_dir() / 'policy.yaml'),
        'Parameter file of the node (YAML). The other arguments override it.',
    ),
    LaunchArgument(
        'checkpoint',
        '',
        'Checkpoint directory. Empty: as in the parameter file.',
        parameter='checkpoint',
    ),
    LaunchArgument(
        'robot',
        '',
        'Robot file: name of a shipped one, or path. Empty: as in the parameter file.',
        parameter='robot',
    ),
    LaunchArgument(
        'dry_run',
        '',
        'true: publish no command; false: drive the robot. Empty: as in the parameter file.',
        parameter='dry_run',
        choices=('', 'true', 'false'),
    ),
    LaunchArgument(
        'use_sim_time',
        '',
        'true: take the time from /clock. Empty: as in the parameter file.',
        parameter='use_sim_time',
        choices=('', 'true', 'false'),
    ),
    LaunchArgument('namespace', '', 'Namespace of the node and of its relative topics.'),
    LaunchArgument(
        'autostart',
        'true',
        'true: configure and activate the node. false: leave it unconfigured.',
        choices=('true', 'false'),
    ),
    LaunchArgument(
        'diagnostics_aggregator',
        'false',
        'true: also start the aggregator that rqt_robot_monitor listens to (one for all robots).',
        choices=('true', 'false'),
    ),
    _LOG_LEVEL,
    _FASTDDS_PROFILE,
)


# Of demo.launch.py
DEMO_ARGUMENTS: tuple[LaunchArgument, ...] = (
    LaunchArgument('bag', str(demo_bag()), 'Recording to play: bag directory, .mcap or .db3.'),
    LaunchArgument('checkpoint', '', 'Checkpoint directory. Empty: make a tiny, random one.'),
    _LOG_LEVEL,
    _FASTDDS_PROFILE,
)


def node_parameters(values: Mapping[str, str]) -> dict[str, str | bool]:
    """Parameters of the node that the launch arguments override.

    Args:
        values: argument name -> value, as launch has them.
    Returns: parameter name -> value of its type; without the arguments that are empty.
    Raises:
        Pi05Error: neither true nor false where one of them is needed.
    """
    overrides: dict[str, str | bool] = {}
    for argument in ARGUMENTS:
        value = values[argument.name]
        if not argument.parameter or not value:
            continue
        if 'true' not in argument.choices:
            overrides[argument.parameter] = value
        elif value in _BOOLEANS:
            overrides[argument.parameter] = _BOOLEANS[value]
        else:
            raise Pi05Error(f'{argument.name}:={value}: expected true or false')
    return overrides


def check_params_file(path: str, node_name: str) -> None:
    """Refuse a parameter file that would be passed over.

    launch only warns of one that is missing, and ROS is silent on one without a section for the
    node: both would start with the defaults, the limits included.

    Args:
        node_name: with its namespace.
    Raises:
        Pi05Error: the file cannot be read, or no section of it is for the node.
    """
    if not read_parameter_file(path, node_name):
        raise Pi05Error(
            f'{path}: no section for {node_name}; expected "/**:" or "{node_name}:", and '
            f'"ros__parameters:" below it'
        )

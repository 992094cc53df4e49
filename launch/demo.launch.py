"""Play a recording as live cameras and joints, and run the policy node on it, until Ctrl-C.

Without a checkpoint it makes a tiny one with random weights: the actions mean nothing then.
`ros2 topic echo /pi05_policy/timing`, rqt_plot and rqt_runtime_monitor show what the node does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    Shutdown,
)
from launch.event_handlers import OnProcessExit
from launch.events.process import ProcessExited
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.substitutions import ExecutableInPackage

from pi05_ros.launch_arguments import DEMO_ARGUMENTS
from pi05_ros.resources import share_dir
from pi05_ros.transport import profile_environment

# Removed when the launch process ends.
_SCRATCH = tempfile.TemporaryDirectory(prefix='pi05_ros_demo_')


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments; what to start depends on their values."""
    declared = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default,
            description=argument.description,
            choices=list(argument.choices) or None,
        )
        for argument in DEMO_ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_start)])


def _start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    values = {a.name: context.launch_configurations[a.name] for a in DEMO_ARGUMENTS}
    player = _tool(
        'play', values['bag'], '--loop', env=profile_environment(values['fastdds_profile'])
    )
    if values['checkpoint']:
        return [player, _policy(values['checkpoint'])]
    checkpoint = str(Path(_SCRATCH.name, 'tiny_checkpoint'))
    make = _tool('checkpoint', 'make', '--size', 'tiny', '--out', checkpoint)

    def go_on(event: ProcessExited, _: LaunchContext) -> list[LaunchDescriptionEntity]:
        if event.returncode != 0:
            return [Shutdown(reason='the tiny checkpoint could not be made')]
        return [player, _policy(checkpoint)]

    return [
        LogInfo(msg='No checkpoint given: making a tiny one; its actions mean nothing.'),
        RegisterEventHandler(OnProcessExit(target_action=make, on_exit=go_on)),
        make,
    ]


def _tool(*arguments: str, env: dict[str, str] | None = None) -> ExecuteProcess:
    executable = ExecutableInPackage(package='pi05_ros', executable='pi05-ros')
    return ExecuteProcess(cmd=[executable, *arguments], additional_env=env, output='screen')


def _policy(checkpoint: str) -> IncludeLaunchDescription:
    return IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(share_dir() / 'launch' / 'policy.launch.py')),
        launch_arguments={
            'checkpoint': checkpoint,
            # Never a robot: whatever the parameter file says.
            'dry_run': 'true',
            'log_level': LaunchConfiguration('log_level'),
            'fastdds_profile': LaunchConfiguration('fastdds_profile'),
        }.items(),
    )

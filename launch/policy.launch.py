"""Start the policy node and, with autostart, take it to active.

The parameter file is where parameters are set; the arguments here are what changes from one start
to the next. An argument left empty keeps the value of the parameter file.
"""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessStart
from launch.events import matches_action
from launch.launch_description_entity import LaunchDescriptionEntity
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.utilities import make_namespace_absolute, prefix_namespace
from lifecycle_msgs.msg import Transition

from pi05_ros.control.parameter_file import NODE_NAME
from pi05_ros.launch_arguments import ARGUMENTS, check_params_file, node_parameters
from pi05_ros.resources import config_dir
from pi05_ros.transport import profile_environment


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments; the node is put together once their values are known."""
    declared = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default,
            description=argument.description,
            choices=list(argument.choices) or None,
        )
        for argument in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_start)])


def _start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    # Read here, not by conditions later on: when this file is included, those would be evaluated
    # in the scope of the including file.
    values = {a.name: context.launch_configurations[a.name] for a in ARGUMENTS}
    check_params_file(values['params_file'], _full_name(context, values['namespace']))
    node = LifecycleNode(
        package='pi05_ros',
        executable='policy_node',
        name='pi05_policy',
        namespace=values['namespace'],
        parameters=[values['params_file'], *_overrides(values)],
        ros_arguments=['--log-level', values['log_level']],
        additional_env=profile_environment(values['fastdds_profile']),
        output='screen',
        emulate_tty=True,
    )
    autostart = _autostart(node) if values['autostart'] == 'true' else []
    monitors = [_aggregator()] if values['diagnostics_aggregator'] == 'true' else []
    return [*autostart, node, *monitors]


def _aggregator() -> Node:
    """Collects the diagnostics of all nodes, so it belongs to no namespace."""
    return Node(
        package='diagnostic_aggregator',
        executable='aggregator_node',
        namespace='/',
        parameters=[str(config_dir() / 'diagnostic_analyzers.yaml')],
        output='screen',
    )


def _full_name(context: LaunchContext, namespace: str) -> str:
    # An including file may push a namespace.
    pushed = context.launch_configurations.get('ros_namespace')
    return (
        f'{make_namespace_absolute(prefix_namespace(pushed, namespace)).rstrip("/")}/{NODE_NAME}'
    )


def _overrides(values: dict[str, str]) -> list[dict[str, ParameterValue]]:
    # Without its type a checkpoint named 2024 would become a number.
    overrides = node_parameters(values)
    if not overrides:
        return []
    return [{n: ParameterValue(v, value_type=type(v)) for n, v in overrides.items()}]


def _autostart(node: LifecycleNode) -> list[RegisterEventHandler]:
    def activate(context: LaunchContext) -> list[LaunchDescriptionEntity]:
        if context.locals.event.goal_state != 'inactive':
            return []  # configure failed; the node has said why
        return [EmitEvent(event=_change_state(node, Transition.TRANSITION_ACTIVATE))]

    configure = EmitEvent(event=_change_state(node, Transition.TRANSITION_CONFIGURE))
    return [
        RegisterEventHandler(OnProcessStart(target_action=node, on_start=[configure])),
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node,
                start_state='configuring',
                entities=[OpaqueFunction(function=activate)],
                # Only the configure above: one that somebody asks for later must not move a robot.
                handle_once=True,
            )
        ),
    ]


def _change_state(node: LifecycleNode, transition_id: int) -> ChangeState:
    return ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition_id)

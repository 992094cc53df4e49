"""Which input arrives on which topic: the one list that the node and replay both subscribe to."""

from __future__ import annotations

from dataclasses import dataclass

from pi05_ros.policy.robot import RobotSpec

from .parameters import NodeSettings

JOINT_STATES = 'joint_states'
EEF_POSE = 'eef_pose'
TASK_PROMPT = 'task_prompt'
ROBOT_DESCRIPTION = 'robot_description'


@dataclass(frozen=True)
class InputTopic:
    """One input.

    Args:
        name: the input, as in :meth:`pi05_ros.control.inputs.Inputs.push`.
        topic: relative topic name, before remapping.
        type_name: ROS type, e.g. ``sensor_msgs/msg/Image``.
        reliability: ``best_effort`` or ``reliable``.
        latched: the newest message is wanted even if it was sent before the node started.
    """

    name: str
    topic: str
    type_name: str
    reliability: str = 'best_effort'
    latched: bool = False


def input_topics(robot: RobotSpec, settings: NodeSettings) -> tuple[InputTopic, ...]:
    """Return every topic that this robot and these settings listen to."""
    topics = [_camera_topic(camera, settings) for camera in robot.camera_names]
    if robot.needs_joint_states:
        topics.append(InputTopic(JOINT_STATES, JOINT_STATES, 'sensor_msgs/msg/JointState'))
    if robot.needs_eef_pose:
        topics.append(InputTopic(EEF_POSE, EEF_POSE, 'geometry_msgs/msg/PoseStamped'))
    topics.append(
        InputTopic(TASK_PROMPT, TASK_PROMPT, 'std_msgs/msg/String', 'reliable', latched=True)
    )
    return tuple(topics)


def description_topic() -> InputTopic:
    """Return where robot_state_publisher sends the URDF; read once, when the node configures."""
    return InputTopic(
        ROBOT_DESCRIPTION, ROBOT_DESCRIPTION, 'std_msgs/msg/String', 'reliable', latched=True
    )


def _camera_topic(camera: str, settings: NodeSettings) -> InputTopic:
    chosen = settings.camera(camera)
    topic = f'camera/{camera}/image_raw'
    if chosen.transport == 'compressed':
        type_name = 'sensor_msgs/msg/CompressedImage'
        return InputTopic(camera, f'{topic}/compressed', type_name, chosen.reliability)
    return InputTopic(camera, topic, 'sensor_msgs/msg/Image', chosen.reliability)

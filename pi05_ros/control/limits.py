"""The limits of a robot, from its file and from the robot description that was received."""

from __future__ import annotations

from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.errors import UrdfError
from pi05_ros.policy.limits import ROBOT_FILE, limit_origins, limit_robot
from pi05_ros.policy.robot import RobotSpec
from pi05_ros.policy.urdf import UrdfJoint, parse_urdf

from .cdr import parse_string
from .parameters import NodeSettings


def needs_description(settings: NodeSettings) -> bool:
    """Tell whether the settings ask for limits of the robot description."""
    return settings.limits_source != ROBOT_FILE


def with_limits(robot: RobotSpec, settings: NodeSettings, raw: bytes) -> tuple[RobotSpec, str]:
    """Return the robot with the limits that count, and in words where each comes from.

    Args:
        raw: CDR of the std_msgs/String with the description; unused if it is not needed.
    Raises:
        UrdfError: the description cannot be read, or does not fit the robot.
    """
    joints: dict[str, UrdfJoint] = {}
    if needs_description(settings):
        try:
            joints = parse_urdf(parse_string(raw))
        except Pi05Error as error:
            raise UrdfError(f'the robot description cannot be used: {error}') from error
    source = settings.limits_source
    return limit_robot(robot, source, joints), limit_origins(robot, source, joints)

"""The limits that the live node had: those of the robot description in the recording, too."""

from __future__ import annotations

from pi05_ros.control.limits import needs_description, with_limits
from pi05_ros.control.parameters import NodeSettings
from pi05_ros.control.topics import ROBOT_DESCRIPTION
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import RobotSpec

from .bag import Bag
from .remapping import Remapping


def recorded_limits(
    robot: RobotSpec, settings: NodeSettings, bag: Bag, remapping: Remapping
) -> RobotSpec:
    """Return the robot with the limits that count.

    Raises:
        Pi05Error: the description is asked for but was not recorded, or cannot be used.
    """
    raw = b''
    if needs_description(settings):
        topic = remapping.resolve(ROBOT_DESCRIPTION)
        message = next(iter(bag.messages([topic])), None) if topic in bag.topics else None
        if message is None:
            raise Pi05Error(
                f'limits_source is {settings.limits_source}, but {bag.path} has no {topic}; '
                'record it, or set limits_source: robot_file'
            )
        raw = message.raw
    return with_limits(robot, settings, raw)[0]

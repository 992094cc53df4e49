"""Fast DDS transport profiles: what a process that sends images needs in its environment.

With Fast DDS's default transports most best-effort images of 640x480 and more are lost: they do
not fit into the sender's shared-memory segment. So every process that sends images needs a
profile (camera driver, bag player). Other middlewares ignore these variables.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pi05_ros.model.errors import Pi05Error
from pi05_ros.resources import config_dir

# Processes with it and without it exchange everything, so it may be set anywhere.
DEFAULT_PROFILE = 'large_images'
# A third of the latency of large_images at 640x480, but a process with it and a process without
# it do not see each other at all, `ros2 topic list` and rqt included.
LARGE_DATA_TRANSPORTS = 'LARGE_DATA?max_msg_size=4MB&sockets_size=4MB&non_blocking=true'


def profile_environment(profile: str) -> dict[str, str]:
    """Environment variables of a transport profile.

    Args:
        profile: 'large_images' (config/fastdds_large_images.xml), 'large_data' (Fast DDS's
            LARGE_DATA transports, with room for a whole image; every process of the robot needs
            it then), 'default' (leave Fast DDS as it is), or the path of a Fast DDS XML profile.
    Returns: variable name -> value, to be set before the process creates a ROS context.
    Raises:
        Pi05Error: there is no such profile.
    """
    if profile == 'default':
        return {}
    if profile == 'large_data':
        return {'FASTDDS_BUILTIN_TRANSPORTS': LARGE_DATA_TRANSPORTS}
    if profile == 'large_images':
        path = config_dir() / 'fastdds_large_images.xml'
    else:
        path = Path(profile).expanduser()
    if not path.is_file():
        raise Pi05Error(
            f'transport profile {profile!r}: expected large_images, large_data, default, or the '
            f'path of a Fast DDS XML profile that exists'
        )
    return {_profile_variable(): str(path.resolve())}


def _profile_variable() -> str:
    # Each of them ignores or deprecates the other's name. Only before version 3 (Jazzy, Humble)
    # was the package of Fast DDS called fastrtps.
    prefixes = [*os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep), sys.prefix]
    before_3 = any(Path(prefix, 'share', 'fastrtps').is_dir() for prefix in filter(None, prefixes))
    return 'FASTRTPS_DEFAULT_PROFILES_FILE' if before_3 else 'FASTDDS_DEFAULT_PROFILES_FILE'

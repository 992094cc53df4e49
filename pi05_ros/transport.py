"""Fast DDS transport profiles: what a process that sends or takes images needs in its environment.

Fast DDS loses most images of 640x480 and more that are sent best-effort over its default
transports. Each process on the way of an image (camera driver, bag player, policy node) needs the
profile. Other middlewares ignore these variables.
"""

from __future__ import annotations

from pathlib import Path

from pi05_ros.model.errors import Pi05Error
from pi05_ros.resources import config_dir

# Data over TCP and shared memory instead of UDP, in messages that hold a whole image.
LARGE_DATA_TRANSPORTS = 'LARGE_DATA?max_msg_size=4MB&sockets_size=4MB&non_blocking=true'


def profile_environment(profile: str) -> dict[str, str]:
    """Environment variables of a transport profile.

    Args:
        profile: 'large_data' (Fast DDS's built-in LARGE_DATA transports, with room for a whole
            image), 'default' (leave Fast DDS as it is), the name of a profile in the package's
            config directory without `.xml`, or the path of a Fast DDS XML profile.
    Returns: variable name -> value, to be set before the process creates a ROS context.
    Raises:
        Pi05Error: there is no such profile.
    """
    if profile == 'default':
        return {}
    if profile == 'large_data':
        return {'FASTDDS_BUILTIN_TRANSPORTS': LARGE_DATA_TRANSPORTS}
    shipped = config_dir() / f'{profile}.xml'
    path = shipped if shipped.is_file() else Path(profile).expanduser()
    if not path.is_file():
        raise Pi05Error(
            f'transport profile {profile!r}: expected large_data, default, or the path of a '
            f'Fast DDS XML profile that exists'
        )
    # The second name is the one that Fast DDS before version 3 (Jazzy, Humble) reads.
    return {
        'FASTDDS_DEFAULT_PROFILES_FILE': str(path.resolve()),
        'FASTRTPS_DEFAULT_PROFILES_FILE': str(path.resolve()),
    }

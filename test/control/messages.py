"""CDR bytes of ROS messages, made by an independent serialiser."""

from __future__ import annotations

import numpy as np
from rosbags.typesys import Stores, get_typestore

TYPES = get_typestore(Stores.ROS2_JAZZY)
NS_PER_S = 1_000_000_000


def _header(stamp_ns: int, frame_id: str = 'camera') -> object:
    sec, nanosec = divmod(stamp_ns, NS_PER_S)
    time = TYPES.types['builtin_interfaces/msg/Time'](sec=sec, nanosec=nanosec)
    return TYPES.types['std_msgs/msg/Header'](stamp=time, frame_id=frame_id)


def _cdr(type_name: str, little_endian: bool, **fields: object) -> bytes:
    message = TYPES.types[type_name](**fields)
    return bytes(TYPES.serialize_cdr(message, type_name, little_endian=little_endian))


def image_cdr(
    data: bytes,
    height: int,
    width: int,
    *,
    encoding: str = 'rgb8',
    step: int | None = None,
    stamp_ns: int = 0,
    frame_id: str = 'camera',
    little_endian: bool = True,
) -> bytes:
    """Return a sensor_msgs/Image; ``step`` defaults to rows of three bytes a pixel."""
    return _cdr(
        'sensor_msgs/msg/Image',
        little_endian,
        header=_header(stamp_ns, frame_id),
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=3 * width if step is None else step,
        data=np.frombuffer(data, dtype=np.uint8),
    )


def rgb_cdr(image: np.ndarray, stamp_ns: int = 0) -> bytes:
    """Return a (h, w, 3) uint8 RGB image as a sensor_msgs/Image."""
    return image_cdr(image.tobytes(), *image.shape[:2], stamp_ns=stamp_ns)


def compressed_cdr(
    data: bytes, file_format: str = 'jpeg', stamp_ns: int = 0, little_endian: bool = True
) -> bytes:
    """Return a sensor_msgs/CompressedImage."""
    return _cdr(
        'sensor_msgs/msg/CompressedImage',
        little_endian,
        header=_header(stamp_ns),
        format=file_format,
        data=np.frombuffer(data, dtype=np.uint8),
    )


def joint_state_cdr(
    names: list[str],
    position: list[float],
    velocity: list[float] | None = None,
    effort: list[float] | None = None,
    stamp_ns: int = 0,
    frame_id: str = '',
    little_endian: bool = True,
) -> bytes:
    """Return a sensor_msgs/JointState."""
    return _cdr(
        'sensor_msgs/msg/JointState',
        little_endian,
        header=_header(stamp_ns, frame_id),
        name=names,
        position=np.array(position, dtype=np.float64),
        velocity=np.array(velocity or [], dtype=np.float64),
        effort=np.array(effort or [], dtype=np.float64),
    )


def pose_cdr(
    position: list[float],
    orientation: list[float],
    stamp_ns: int = 0,
    frame_id: str = 'base',
    little_endian: bool = True,
) -> bytes:
    """Return a geometry_msgs/PoseStamped; the orientation is x, y, z, w."""
    types = TYPES.types
    return _cdr(
        'geometry_msgs/msg/PoseStamped',
        little_endian,
        header=_header(stamp_ns, frame_id),
        pose=types['geometry_msgs/msg/Pose'](
            position=types['geometry_msgs/msg/Point'](*position),
            orientation=types['geometry_msgs/msg/Quaternion'](*orientation),
        ),
    )


def string_cdr(text: str, little_endian: bool = True) -> bytes:
    """Return a std_msgs/String."""
    return _cdr('std_msgs/msg/String', little_endian, data=text)

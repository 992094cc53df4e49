"""Read ROS messages straight from their CDR bytes: views into the payload, no copies.

Every read is checked against the end of the buffer, and every count against the bytes that are
left, so that no payload makes the parser read outside, allocate much or loop long. Both byte
orders of plain CDR (XCDR1) are understood, which is what every ROS 2 middleware sends for the
message types below. Bytes behind the last field are ignored: middlewares pad to four bytes.

Source of the layout: OMG DDS-XTypes 1.3, section 7.4 (plain CDR), and the .msg definitions of
sensor_msgs, geometry_msgs and std_msgs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .reasons import InputFault, Reason

# A JointState longer than this is no robot's; it bounds the time that one message can take.
MAX_JOINTS = 1024

_ENCAPSULATION_BYTES = 4
_BYTE_ORDERS = {0x0000: '>', 0x0001: '<'}
_TIME = {order: struct.Struct(f'{order}iI') for order in '<>'}
_UINT32 = {order: struct.Struct(f'{order}I') for order in '<>'}
_POSE = {order: struct.Struct(f'{order}7d') for order in '<>'}


class CdrError(InputFault):
    """The bytes are not a whole message of the expected type."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.MALFORMED_MESSAGE, detail)


@dataclass(frozen=True)
class Header:
    """std_msgs/Header: ``stamp_ns`` in nanoseconds of the sender's ROS clock."""

    stamp_ns: int
    frame_id: str


@dataclass(frozen=True)
class ImageMessage:
    """sensor_msgs/Image as received; ``data`` is a view, not yet checked against ``step``."""

    header: Header
    height: int
    width: int
    encoding: str
    is_bigendian: bool
    step: int
    data: memoryview


@dataclass(frozen=True)
class CompressedImageMessage:
    """sensor_msgs/CompressedImage as received; ``data`` is a view of the encoded file."""

    header: Header
    format: str
    data: memoryview


@dataclass(frozen=True)
class JointStateMessage:
    """sensor_msgs/JointState: float64 views; velocity and effort may be empty."""

    header: Header
    names: tuple[str, ...]
    position: np.ndarray
    velocity: np.ndarray
    effort: np.ndarray


@dataclass(frozen=True)
class PoseMessage:
    """geometry_msgs/PoseStamped: position (3,) in metres, orientation (4,) as x, y, z, w."""

    header: Header
    position: np.ndarray
    orientation: np.ndarray


class CdrReader:
    """A cursor over one CDR payload.

    Args:
        raw: the serialised message with its four encapsulation bytes.
    Raises:
        CdrError: it is too short, or not plain CDR.
    """

    def __init__(self, raw: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(raw).cast('B')
        if len(self._view) < _ENCAPSULATION_BYTES:
            raise CdrError(f'{len(self._view)} bytes is shorter than a CDR header')
        representation = (self._view[0] << 8) | self._view[1]
        order = _BYTE_ORDERS.get(representation)
        if order is None:
            raise CdrError(f'CDR representation 0x{representation:04x} is not plain CDR (0 or 1)')
        self.order = order
        self.offset = _ENCAPSULATION_BYTES

    def uint8(self) -> int:
        """Read one byte."""
        return self._take(1)[0]

    def uint32(self) -> int:
        """Read an aligned unsigned 32 bit number."""
        return int(self._unpack(_UINT32[self.order], align=4)[0])

    def header(self) -> Header:
        """Read a std_msgs/Header."""
        sec, nanosec = self._unpack(_TIME[self.order], align=4)
        return Header(sec * 1_000_000_000 + nanosec, self.string())

    def string(self) -> str:
        """Read a string, without its terminating zero."""
        length = self.uint32()
        if length == 0:  # not valid CDR, but some senders write an empty string so
            return ''
        text = bytes(self._take(length))
        try:
            return text.rstrip(b'\0').decode('utf-8')
        except UnicodeDecodeError:
            raise CdrError(f'a string of {length} bytes is not UTF-8') from None

    def byte_sequence(self) -> memoryview:
        """Return a view of a ``uint8[]``."""
        return self._take(self.uint32())

    def float64_sequence(self) -> np.ndarray:
        """Return a read-only (N,) view of a ``float64[]``."""
        count = self.uint32()
        if count == 0:
            return np.empty(0, dtype=np.float64)
        self._align(8)
        return np.frombuffer(self._take(8 * count), dtype=np.dtype(f'{self.order}f8'))

    def string_sequence(self, max_count: int) -> tuple[str, ...]:
        """Read a ``string[]`` of at most ``max_count`` items."""
        count = self.uint32()
        if count > max_count:
            raise CdrError(f'a list of {count} names is longer than {max_count}')
        return tuple(self.string() for _ in range(count))

    def pose(self) -> np.ndarray:
        """Return position and orientation of a geometry_msgs/Pose, (7,) float64."""
        return np.array(self._unpack(_POSE[self.order], align=8), dtype=np.float64)

    def _align(self, size: int) -> None:
        self.offset += -(self.offset - _ENCAPSULATION_BYTES) % size

    def _take(self, size: int) -> memoryview:
        end = self.offset + size
        if end > len(self._view):
            raise CdrError(
                f'the message ends after {len(self._view)} bytes, but a field of {size} bytes '
                f'starts at byte {self.offset}'
            )
        part = self._view[self.offset : end]
        self.offset = end
        return part

    def _unpack(self, layout: struct.Struct, align: int) -> tuple:
        self._align(align)
        return layout.unpack(self._take(layout.size))


def parse_header(raw: bytes | memoryview) -> Header:
    """Read the std_msgs/Header that a stamped message begins with."""
    return CdrReader(raw).header()


def parse_image(raw: bytes | memoryview) -> ImageMessage:
    """Read a sensor_msgs/Image; ``data`` is a view into ``raw``."""
    reader = CdrReader(raw)
    return ImageMessage(
        header=reader.header(),
        height=reader.uint32(),
        width=reader.uint32(),
        encoding=reader.string(),
        is_bigendian=bool(reader.uint8()),
        step=reader.uint32(),
        data=reader.byte_sequence(),
    )


def parse_compressed_image(raw: bytes | memoryview) -> CompressedImageMessage:
    """Read a sensor_msgs/CompressedImage; ``data`` is a view into ``raw``."""
    reader = CdrReader(raw)
    return CompressedImageMessage(reader.header(), reader.string(), reader.byte_sequence())


def parse_joint_state(raw: bytes | memoryview) -> JointStateMessage:
    """Read a sensor_msgs/JointState; the arrays are read-only views into ``raw``."""
    reader = CdrReader(raw)
    return JointStateMessage(
        header=reader.header(),
        names=reader.string_sequence(MAX_JOINTS),
        position=reader.float64_sequence(),
        velocity=reader.float64_sequence(),
        effort=reader.float64_sequence(),
    )


def parse_pose_stamped(raw: bytes | memoryview) -> PoseMessage:
    """Read a geometry_msgs/PoseStamped."""
    reader = CdrReader(raw)
    header = reader.header()
    values = reader.pose()
    return PoseMessage(header, position=values[:3], orientation=values[3:])


def parse_string(raw: bytes | memoryview) -> str:
    """Read a std_msgs/String."""
    return CdrReader(raw).string()

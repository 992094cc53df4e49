"""Small bags with a known content, written with rosbags."""

from __future__ import annotations

import struct
from pathlib import Path

from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

LIBERO_BAG = Path(__file__).parents[1] / 'data' / 'libero_spatial_bowl'
START_NS = 1_700_000_000_000_000_000
UNKNOWN_TYPE = 'nobody_has_msgs/msg/Secret'

Row = tuple[str, str, int, bytes]  # topic, message type, receive time after START_NS, CDR bytes


def string_cdr(text: str) -> bytes:
    """Return a std_msgs/String in little-endian CDR."""
    data = text.encode() + b'\0'
    return b'\x00\x01\x00\x00' + struct.pack('<I', len(data)) + data


def header_cdr(stamp_ns: int, order: str = '<') -> bytes:
    """Return a std_msgs/Header with an empty frame_id in either byte order."""
    encapsulation = b'\x00\x01\x00\x00' if order == '<' else b'\x00\x00\x00\x00'
    return encapsulation + struct.pack(f'{order}iII', *divmod(stamp_ns, 10**9), 1) + b'\0'


def write_bag(path: Path, rows: list[Row], storage: str = 'mcap') -> Path:
    """Write the rows in the order given and return the path."""
    typestore = get_typestore(Stores.ROS2_JAZZY)
    typestore.register(get_types_from_msg('int32 value', UNKNOWN_TYPE))
    plugin = StoragePlugin.MCAP if storage == 'mcap' else StoragePlugin.SQLITE3
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        connections = {
            (topic, msgtype): writer.add_connection(topic, msgtype, typestore=typestore)
            for topic, msgtype in dict.fromkeys(row[:2] for row in rows)
        }
        for topic, msgtype, after_ns, raw in rows:
            writer.write(connections[topic, msgtype], START_NS + after_ns, raw)
    return path

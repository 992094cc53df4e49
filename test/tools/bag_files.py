"""Small bags with a known content, written with rosbags."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import yaml
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
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


def write_bag(
    path: Path, rows: list[Row], storage: str = 'mcap', compression: str | None = None
) -> Path:
    """Write the rows in the order given and return the path.

    Args:
        compression: ``file`` or ``message``, by Zstandard.
    """
    typestore = get_typestore(Stores.ROS2_JAZZY)
    typestore.register(get_types_from_msg('int32 value', UNKNOWN_TYPE))
    plugin = StoragePlugin.MCAP if storage == 'mcap' else StoragePlugin.SQLITE3
    writer = Writer(path, version=9, storage_plugin=plugin)
    if compression is not None:
        writer.set_compression(CompressionMode[compression.upper()], CompressionFormat.ZSTD)
    with writer:
        connections = {
            (topic, msgtype): writer.add_connection(topic, msgtype, typestore=typestore)
            for topic, msgtype in dict.fromkeys(row[:2] for row in rows)
        }
        for topic, msgtype, after_ns, raw in rows:
            writer.write(connections[topic, msgtype], START_NS + after_ns, raw)
    return path


def write_split_bag(path: Path, parts: list[list[Row]], storage: str = 'mcap') -> Path:
    """Write a recording of several files, each with the rows of one part; return the path."""
    path.mkdir()
    infos = []
    for number, rows in enumerate(parts):
        part = write_bag(path / f'part_{number}', rows, storage)
        info = yaml.safe_load((part / 'metadata.yaml').read_text())
        infos.append(info['rosbag2_bagfile_information'])
        for name in infos[-1]['relative_file_paths']:
            shutil.move(part / name, path / name)
        shutil.rmtree(part)
    whole = infos[0]
    whole['relative_file_paths'] = [i['relative_file_paths'][0] for i in infos]
    whole['files'] = [i['files'][0] for i in infos]
    whole['message_count'] = sum(i['message_count'] for i in infos)
    topics: dict[str, dict] = {}
    for info in infos:
        for topic in info['topics_with_message_count']:
            known = topics.setdefault(topic['topic_metadata']['name'], topic)
            if known is not topic:
                known['message_count'] += topic['message_count']
    whole['topics_with_message_count'] = list(topics.values())
    (path / 'metadata.yaml').write_text(yaml.safe_dump({'rosbag2_bagfile_information': whole}))
    return path


def write_unindexed_mcap(path: Path, rows: list[Row]) -> Path:
    """Write an MCAP file as rosbag2's profile ``fastwrite`` does: no chunks and no index."""

    def text(value: str) -> bytes:
        return struct.pack('<I', len(value)) + value.encode()

    def record(opcode: int, content: bytes) -> bytes:
        return struct.pack('<BQ', opcode, len(content)) + content

    magic = b'\x89MCAP0\r\n'
    data = magic + record(1, text('ros2') + text(''))
    channels = {key: number for number, key in enumerate(dict.fromkeys(r[:2] for r in rows), 1)}
    for (topic, msgtype), number in channels.items():
        definition = text('string data')
        data += record(3, struct.pack('<H', number) + text(msgtype) + text('ros2msg') + definition)
        data += record(
            4, struct.pack('<HH', number, number) + text(topic) + text('cdr') + b'\0' * 4
        )
    for topic, msgtype, after_ns, raw in rows:
        stamp_ns = START_NS + after_ns
        head = struct.pack('<HIQQ', channels[topic, msgtype], 0, stamp_ns, stamp_ns)
        data += record(5, head + raw)
    data += record(15, bytes(4)) + record(2, bytes(20)) + magic
    path.write_bytes(data)
    return path

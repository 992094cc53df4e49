"""Variants of the shipped recording: other storage, other encoding, cut, shifted, spoilt."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from bag_files import LIBERO_BAG, START_NS, Row
from PIL import Image
from rosbags.rosbag2 import Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from pi05_ros.control.cdr import parse_image
from pi05_ros.control.images import pixels
from pi05_ros.policy.types import ActionChunk
from pi05_ros.resources import share_dir
from pi05_ros.tools.bag import open_bag

TYPESTORE = get_typestore(Stores.ROS2_JAZZY)
CHUNK = 'pi05_ros/msg/ActionChunk'
TYPESTORE.register(get_types_from_msg((share_dir() / 'msg/ActionChunk.msg').read_text(), CHUNK))
IMAGE, COMPRESSED = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
JOINTS, STRING = 'sensor_msgs/msg/JointState', 'std_msgs/msg/String'
INPUT_TOPICS = (
    '/camera/base/image_raw',
    '/camera/wrist/image_raw',
    '/joint_states',
    '/task_prompt',
)
Edit = Callable[[Row], Iterable[Row]]


def shipped_rows(seconds: float = 0.6, topics: tuple[str, ...] = INPUT_TOPICS) -> list[Row]:
    """Return the beginning of the shipped recording, at the times that it was recorded."""
    with open_bag(LIBERO_BAG) as bag:
        end_ns = bag.start_ns + round(seconds * 1e9)
        return [
            (m.topic, bag.topics[m.topic].msgtype, m.receive_ns - START_NS, m.raw)
            for m in bag.messages(topics)
            if m.receive_ns <= end_ns
        ]


def edited(rows: Iterable[Row], edit: Edit) -> list[Row]:
    """Replace each row by what ``edit`` makes of it."""
    return [new for row in rows for new in edit(row)]


def as_png(row: Row) -> Iterable[Row]:
    """Replace a raw image by the same pixels in a PNG file."""
    topic, msgtype, after_ns, raw = row
    if msgtype != IMAGE:
        return [row]
    message = TYPESTORE.deserialize_cdr(raw, IMAGE)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels(parse_image(raw)))).save(file, 'PNG')
    compressed = TYPESTORE.types[COMPRESSED](
        header=message.header,
        format='rgb8; png compressed rgb8',
        data=np.frombuffer(file.getvalue(), np.uint8),
    )
    return [(f'{topic}/compressed', COMPRESSED, after_ns, serialize(compressed, COMPRESSED))]


def edit_message(msgtype: str, change: Callable) -> Edit:
    """Return an edit that applies ``change`` to every message of a type."""

    def edit(row: Row) -> Iterable[Row]:
        if row[1] != msgtype:
            return [row]
        message = TYPESTORE.deserialize_cdr(row[3], msgtype)
        change(message)
        return [(*row[:3], serialize(message, msgtype))]

    return edit


def serialize(message: object, msgtype: str) -> bytes:
    return bytes(TYPESTORE.serialize_cdr(message, msgtype))


def cut(path: Path, out: Path, share: float) -> Path:
    """Copy the first part of a file."""
    data = path.read_bytes()
    out.write_bytes(data[: int(share * len(data))])
    return out


def chunk_row(topic: str, now_ns: int, chunk: ActionChunk, **provenance: str) -> Row:
    """Return a chunk as the node would publish it at the instant ``now_ns``."""
    types = TYPESTORE.types

    def time(stamp_ns: int) -> object:
        sec, nanosec = divmod(stamp_ns, 10**9)
        return types['builtin_interfaces/msg/Time'](sec=sec, nanosec=nanosec)

    message = types[CHUNK](
        header=types['std_msgs/msg/Header'](stamp=time(chunk.stamp_ns), frame_id=''),
        tick=chunk.tick, dry_run=True, names=list(chunk.names), units=['1'] * len(chunk.names),
        step_dt=types['builtin_interfaces/msg/Duration'](sec=0, nanosec=50_000_000),
        horizon=len(chunk.actions), actions=chunk.actions.ravel(),
        input_names=list(chunk.stamps_ns), input_stamps=[*map(time, chunk.stamps_ns.values())],
        prompt=chunk.prompt, seed=chunk.seed, num_steps=chunk.num_steps, **provenance,
    )  # fmt: skip
    return topic, CHUNK, now_ns - START_NS, serialize(message, CHUNK)


def write_with_chunks(path: Path, rows: list[Row]) -> Path:
    """Write a recording that may hold action chunks."""
    with Writer(path, version=9) as writer:
        connections = {
            key: writer.add_connection(*key, typestore=TYPESTORE)
            for key in dict.fromkeys(row[:2] for row in rows)
        }
        for topic, msgtype, after_ns, raw in rows:
            writer.write(connections[topic, msgtype], START_NS + after_ns, raw)
    return path

"""JointTrajectory onto the wire without building its objects: 4 instead of 200 µs for 50 rows.

Of two chunks of one robot only the stamp and the positions differ. So one message is serialised by
the middleware, and its bytes serve as the form for all later ones.
"""

from __future__ import annotations

import struct

import numpy as np
from builtin_interfaces.msg import Duration, Time
from rclpy.serialization import serialize_message
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi05_ros.policy.types import ActionChunk

NS_PER_S = 1_000_000_000
# Behind the four bytes that say how the message is encoded.
_STAMP_OFFSET = 4


def time_message(stamp_ns: int) -> Time:
    """Return nanoseconds as a builtin_interfaces/Time."""
    sec, nanosec = divmod(stamp_ns, NS_PER_S)
    return Time(sec=sec, nanosec=nanosec)


def duration_message(duration_ns: int) -> Duration:
    """Return nanoseconds as a builtin_interfaces/Duration."""
    sec, nanosec = divmod(duration_ns, NS_PER_S)
    return Duration(sec=sec, nanosec=nanosec)


def trajectory_message(
    rows: np.ndarray, stamp_ns: int, step_s: float, joints: tuple[str, ...]
) -> JointTrajectory:
    """Return (H, D) positions as a message; row i is due ``i * step_s`` after the stamp."""
    message = JointTrajectory(joint_names=list(joints))
    message.header.stamp = time_message(stamp_ns)
    step_ns = round(step_s * NS_PER_S)
    message.points = [
        JointTrajectoryPoint(positions=row.tolist(), time_from_start=duration_message(i * step_ns))
        for i, row in enumerate(rows)
    ]
    return message


class TrajectoryEncoder:
    """Encodes every row of a chunk, stamped with the oldest observation.

    A joint_trajectory_controller drops the points that lie in the past, which makes up for the
    time of the inference.

    Args:
        joints: the D joints of the rows.
    """

    def __init__(self, joints: tuple[str, ...]) -> None:
        self._joints = joints
        self._made_for: tuple[tuple[int, ...], float] | None = None
        self._form = np.empty(0, np.uint8)
        self._places = np.empty(0, np.intp)
        self._order = '<'

    def encode(self, chunk: ActionChunk) -> bytes:
        """Return the message as serialised CDR."""
        wanted = (chunk.actions.shape, chunk.step_s)
        if wanted != self._made_for:
            self._make_form(*wanted)
            self._made_for = wanted
        rows = np.ascontiguousarray(chunk.actions, dtype=f'{self._order}f8')
        self._form[self._places] = rows.view(np.uint8).ravel()
        seconds, nanoseconds = divmod(chunk.stamp_ns, NS_PER_S)
        struct.pack_into(f'{self._order}iI', self._form.data, _STAMP_OFFSET, seconds, nanoseconds)
        return self._form.tobytes()

    def _make_form(self, shape: tuple[int, ...], step_s: float) -> None:
        """Serialise positions that occur once, to see where each row lies."""
        marks = np.arange(1, 1 + np.prod(shape), dtype=np.float64).reshape(shape) + 0.5
        raw = serialize_message(trajectory_message(marks, 0, step_s, self._joints))
        self._order = '<' if raw[1] & 1 else '>'
        starts, end = [], 0
        for row in marks.astype(f'{self._order}f8'):
            start = raw.index(row.tobytes(), end)
            end = start + row.nbytes
            starts.append(start)
        self._form = np.frombuffer(raw, np.uint8).copy()
        self._places = (np.array(starts)[:, None] + np.arange(shape[1] * 8)).ravel()

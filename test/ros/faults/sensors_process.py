"""Sensors in a process of their own: ``python sensors_process.py NAME SOURCE...``.

A source is ``camera:<name>``, ``joints``, ``task`` or ``clock``. Each line on stdin changes some,
as JSON: ``{"wrist": {"running": false}}``. The process ends when stdin does.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.serialization import serialize_message
from rclpy.utilities import remove_ros_args
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import LATCHED, CameraScript, image_message, stamp  # noqa: E402

NS = 1_000_000_000
MAX_SLEEP_S = 0.01  # a change on stdin is seen after this
# A Franka arm over the table, within the limits of its robot file; every joint elsewhere.
POSE = {
    'panda_joint1': 0.1,
    'panda_joint2': -0.2,
    'panda_joint3': 0.3,
    'panda_joint4': -1.8,
    'panda_joint5': 0.5,
    'panda_joint6': 2.0,
    'panda_joint7': 0.7,
    'panda_finger_joint1': 0.02,
}


@dataclass
class CameraSource(CameraScript):
    """``wire`` is ``whole``, ``cut`` (half of the serialised message) or ``noise``."""

    rate_hz: float = 25.0
    wire: str = 'whole'

    def message(self, now_ns: int) -> Image | bytes:
        if self.wire == 'noise':
            return bytes(range(7, 207))
        image = image_message(self, now_ns)
        if self.wire == 'cut':
            whole = serialize_message(image)
            return whole[: len(whole) // 2]
        return image


@dataclass
class JointSource:
    running: bool = True
    rate_hz: float = 50.0
    backwards: bool = False

    def message(self, now_ns: int) -> JointState:
        names = list(POSE)[:: -1 if self.backwards else 1]
        message = JointState(name=names)
        message.position = [POSE[name] for name in names]
        stamp(message, now_ns)
        return message


@dataclass
class TaskSource:
    running: bool = False
    rate_hz: float = 1.0
    text: str = 'pick up the black bowl'
    sent: int = 0

    def message(self, now_ns: int) -> String:
        self.sent += 1
        return String(data=f'{self.text} {self.sent % 10}')


@dataclass
class ClockSource:
    """Simulated time: stands still while not running, and starts anew at ``jump_s`` from now."""

    running: bool = True
    rate_hz: float = 100.0
    jump_s: float = 0.0

    def message(self, now_ns: int) -> Clock:
        message = Clock()
        message.clock.sec, message.clock.nanosec = divmod(now_ns, NS)
        return message


TYPES = {'joints': JointState, 'task': String, 'clock': Clock}
SOURCES = {'joints': JointSource, 'task': TaskSource, 'clock': ClockSource}
TOPICS = {'joints': 'joint_states', 'task': 'task_prompt', 'clock': '/clock'}


class Sensors(Node):
    """Publishes every source at its own rate, stamped with wall or simulated time."""

    def __init__(self, name: str, sources: list[str]) -> None:
        super().__init__(name)
        self.sources: dict[str, object] = {}
        self._outlets = {}
        for source in sources:
            kind, _, camera = source.partition(':')
            made, topic = (CameraSource(), f'camera/{camera}/image_raw') if camera else (None, '')
            name = camera or kind
            self.sources[name] = made or SOURCES[kind]()
            qos = LATCHED if kind == 'task' else QoSProfile(depth=5)
            self._outlets[name] = self.create_publisher(
                TYPES.get(kind, Image), topic or TOPICS[kind], qos
            )
        self._due_s = dict.fromkeys(self.sources, time.monotonic())
        self._simulated_ns = time.time_ns()
        self._looked_s = time.monotonic()

    def now_ns(self) -> int:
        clock = self.sources.get('clock')
        if clock is None:
            return time.time_ns()
        now_s = time.monotonic()
        if clock.running:
            self._simulated_ns += round((now_s - self._looked_s + clock.jump_s) * NS)
            clock.jump_s = 0.0
        self._looked_s = now_s
        return self._simulated_ns

    def change(self, line: str) -> None:
        for name, values in json.loads(line).items():
            for key, value in values.items():
                setattr(self.sources[name], key, value)

    def send_due(self) -> float:
        """Publish what is due, and return for how long nothing will be."""
        now_s = time.monotonic()
        for name, source in self.sources.items():
            if source.running and now_s >= self._due_s[name]:
                # After a pause of the machine the messages behind are left out.
                self._due_s[name] = max(self._due_s[name] + 1.0 / source.rate_hz, now_s - 0.005)
                self._outlets[name].publish(source.message(self.now_ns()))
        due_s = (self._due_s[name] for name, source in self.sources.items() if source.running)
        return max(0.0, min(due_s, default=np.inf) - time.monotonic())


def main() -> None:
    rclpy.init()
    name, *sources = remove_ros_args(sys.argv)[1:]
    sensors = Sensors(name, sources)
    ended = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            sensors.change(line)
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    while not ended.is_set():
        time.sleep(min(sensors.send_due(), MAX_SLEEP_S))
    rclpy.try_shutdown()


if __name__ == '__main__':
    main()

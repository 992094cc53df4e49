"""Cameras and joint states at a steady rate, the other process of ``pi05-ros bench --inputs``.

``python -m pi05_ros.tools.bench_sensors --help`` names the arguments.
"""

from __future__ import annotations

import argparse
import array
import struct
import time
from collections.abc import Sequence

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import qos_profile_sensor_data
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, JointState

from pi05_ros.control.images import NATIVE_ENCODINGS

_NS_PER_S = 1_000_000_000
_STAMP = struct.Struct('<iI')
_STAMP_OFFSET = 4  # behind the encapsulation: an rclpy message begins with its header


class Sender:
    """One topic: the same message again and again, with the time of now in its header."""

    def __init__(self, publisher: Publisher, message: object, rate_hz: float) -> None:
        self._publisher = publisher
        self._payload = bytearray(serialize_message(message))
        self.period_s = 1.0 / rate_hz
        self.due_s = time.monotonic()

    def send(self) -> None:
        """Publish once; what a pause of the machine took is not sent later."""
        _STAMP.pack_into(self._payload, _STAMP_OFFSET, *divmod(time.time_ns(), _NS_PER_S))
        self._publisher.publish(bytes(self._payload))
        self.due_s = max(self.due_s + self.period_s, time.monotonic())


def image_message(size_px: tuple[int, int], encoding: str, seed: int) -> Image:
    """Return an image of noise; ``size_px`` is (height, width)."""
    height, width = size_px
    step = width * NATIVE_ENCODINGS[encoding]
    pixels = np.random.default_rng(seed).integers(0, 256, height * step, dtype=np.uint8)
    data = array.array('B', pixels.tobytes())
    return Image(height=height, width=width, encoding=encoding, step=step, data=data)


def make_senders(node: Node, args: argparse.Namespace) -> list[Sender]:
    """Return one sender per topic; the topics are those of the node that is measured."""
    senders = []
    for seed, camera in enumerate(args.cameras):
        publisher = node.create_publisher(
            Image, f'camera/{camera}/image_raw', qos_profile_sensor_data
        )
        message = image_message((args.height, args.width), args.encoding, seed)
        senders.append(Sender(publisher, message, args.rate_hz))
    joints = JointState(name=args.joints, position=[0.1] * len(args.joints))
    publisher = node.create_publisher(JointState, 'joint_states', qos_profile_sensor_data)
    senders.append(Sender(publisher, joints, args.joint_rate_hz))
    return senders


def main(arguments: Sequence[str] | None = None) -> None:
    """Send until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--namespace', required=True)
    parser.add_argument('--cameras', nargs='+', required=True)
    parser.add_argument('--joints', nargs='+', required=True)
    parser.add_argument('--width', type=int, required=True)
    parser.add_argument('--height', type=int, required=True)
    parser.add_argument('--encoding', choices=sorted(NATIVE_ENCODINGS), required=True)
    parser.add_argument('--rate-hz', type=float, required=True)
    parser.add_argument('--joint-rate-hz', type=float, required=True)
    args = parser.parse_args(arguments)
    rclpy.init()
    senders = make_senders(rclpy.create_node('bench_sensors', namespace=args.namespace), args)
    while True:
        sender = min(senders, key=lambda sender: sender.due_s)
        time.sleep(max(0.0, sender.due_s - time.monotonic()))
        if not rclpy.ok():  # a signal came
            break
        sender.send()


if __name__ == '__main__':
    main()

"""Cameras and joints for ``pi05-ros bench``: a process of its own that publishes on time.

The messages are serialised beforehand and stamped in place when they are published, so that this
process adds next to nothing to what is measured.
"""

from __future__ import annotations

import argparse
import array
import gc
import heapq
import io
import math
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05_ros.control.images import NATIVE_ENCODINGS
from pi05_ros.policy.robot import load_robot

from .direct_publish import StampedMessages
from .sensors import rest_positions
from .terminal import positive

NODE_NAME = 'pi05_bench_sensors'
JOINT_RATE_HZ = 100.0
# Different pictures, so that nothing between camera and model can know the next one.
FRAMES = 8
_GRAIN_PX = 16
_NOISE = 8
_JPEG_QUALITY = 90


def main() -> None:
    """Publish until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--robot', required=True)
    parser.add_argument('--cameras', nargs='+', help="instead of the robot's")
    parser.add_argument('--width', type=int, required=True)
    parser.add_argument('--height', type=int, required=True)
    parser.add_argument('--transport', choices=('raw', 'compressed'), required=True)
    parser.add_argument('--encoding', choices=sorted(NATIVE_ENCODINGS), default='rgb8')
    parser.add_argument('--camera-rate-hz', type=positive, required=True)
    parser.add_argument('--prefix', default='', help='before every topic')
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node(NODE_NAME, enable_rosout=False, start_parameter_services=False)
    try:
        publish_on_time(make_sensors(node, args), stop)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


@dataclass
class Sensor:
    """One stream: what is published in turn, and how often."""

    messages: StampedMessages
    period_s: float


def make_sensors(node: Any, args: argparse.Namespace) -> list[Sensor]:
    """Return a stream for every camera of the robot, its joints and its end effector."""
    from geometry_msgs.msg import PoseStamped
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import JointState

    robot = load_robot(args.robot)
    # As camera drivers publish: nothing is sent twice, nothing waits.
    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    sensors = []

    def add(kind: type, topic: str, messages: list[Any], rate_hz: float) -> None:
        publisher = node.create_publisher(kind, f'{args.prefix}/{topic}', qos)
        raw = [serialize_message(message) for message in messages]
        sensors.append(Sensor(StampedMessages(publisher, raw), 1.0 / rate_hz))

    is_compressed = args.transport == 'compressed'
    for seed, camera in enumerate(args.cameras or robot.camera_names):
        topic = f'camera/{camera}/image_raw' + '/compressed' * is_compressed
        pictures = draw_pictures(args.height, args.width, seed)
        messages = [
            compressed_message(picture) if is_compressed else image_message(picture, args.encoding)
            for picture in pictures
        ]
        add(type(messages[0]), topic, messages, args.camera_rate_hz)
    if robot.needs_joint_states:
        names, positions = rest_positions(robot)
        message = JointState(name=names, position=positions, velocity=[0.0] * len(names))
        message.effort = [0.0] * len(names)
        message.header.stamp.sec = 1
        add(JointState, 'joint_states', [message], JOINT_RATE_HZ)
    if robot.needs_eef_pose:
        pose = PoseStamped()
        pose.header.stamp.sec = 1
        pose.pose.orientation.w = 1.0
        add(PoseStamped, 'eef_pose', [pose], JOINT_RATE_HZ)
    return sensors


def publish_on_time(sensors: list[Sensor], stop: threading.Event) -> None:
    """Publish every stream at its rate, stamped with the time of publishing.

    What could not be published in time is left out: no camera sends bursts.
    """
    gc.collect()
    gc.freeze()
    start_s = time.monotonic()
    due = [(start_s, index) for index in range(len(sensors))]
    heapq.heapify(due)
    while not stop.is_set():
        due_s, index = heapq.heappop(due)
        sensor = sensors[index]
        ahead_s = due_s - time.monotonic()
        if ahead_s > 0 and stop.wait(ahead_s):
            return
        sensor.messages.publish(time.time_ns)
        late = max(0, math.floor((time.monotonic() - due_s) / sensor.period_s))
        heapq.heappush(due, (due_s + (1 + late) * sensor.period_s, index))


def draw_pictures(height: int, width: int, seed: int) -> list[np.ndarray]:
    """Return (height, width, 3) uint8 pictures: soft shapes and some noise."""
    from PIL import Image as Picture

    random = np.random.default_rng(seed)
    rows, columns = -(-height // _GRAIN_PX) + 1, -(-width // _GRAIN_PX) + 1
    pictures = []
    for _ in range(FRAMES):
        coarse = random.integers(32, 224, (rows, columns, 3), dtype=np.uint8)
        soft = np.asarray(
            Picture.fromarray(coarse).resize((width, height), Picture.Resampling.BICUBIC)
        )
        noise = random.integers(-_NOISE, _NOISE + 1, (height, width, 1), dtype=np.int16)
        pictures.append(np.clip(soft + noise, 1, 255).astype(np.uint8))
    return pictures


def compressed_message(picture: np.ndarray) -> Any:
    """Return a sensor_msgs/CompressedImage (JPEG) of an RGB picture."""
    from PIL import Image as Picture
    from sensor_msgs.msg import CompressedImage

    file = io.BytesIO()
    Picture.fromarray(picture).save(file, 'JPEG', quality=_JPEG_QUALITY)
    message = CompressedImage(format='rgb8; jpeg compressed bgr8')
    message.data = array.array('B', file.getvalue())
    message.header.stamp.sec = 1
    return message


def image_message(picture: np.ndarray, encoding: str) -> Any:
    """Return a sensor_msgs/Image of an RGB picture in one of the native encodings."""
    from sensor_msgs.msg import Image

    height, width, _ = picture.shape
    channels = NATIVE_ENCODINGS[encoding]
    colours = picture[..., ::-1] if encoding.startswith('bgr') else picture
    pixels = np.full((height, width, channels), 255, dtype=np.uint8)
    pixels[..., :3] = colours[..., :channels]
    message = Image(height=height, width=width, encoding=encoding, step=width * channels)
    message.data = array.array('B', pixels.tobytes())
    message.header.stamp.sec = 1
    return message


if __name__ == '__main__':
    main()

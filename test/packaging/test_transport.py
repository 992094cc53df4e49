"""Images get through with the shipped Fast DDS profile, and everybody else is still seen."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from pi05_ros.model.errors import Pi05Error
from pi05_ros.transport import DEFAULT_PROFILE, profile_environment

# Publishes 640x480 images until its standard input is closed.
CAMERA = """
import array, sys, threading, rclpy
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
rclpy.init()
node = rclpy.create_node('camera')
publisher = node.create_publisher(Image, 'image', qos_profile_sensor_data)
image = Image(height=480, width=640, encoding='rgb8', step=1920)
image.data = array.array('B', bytes(480 * 1920))
def publish():
    image.header.stamp.sec += 1
    publisher.publish(image)
node.create_timer(0.02, publish)
threading.Thread(target=lambda: (sys.stdin.read(), rclpy.try_shutdown()), daemon=True).start()
try:
    rclpy.spin(node)
except rclpy.executors.ExternalShutdownException:
    pass
"""
# Takes 30 images; prints how many came of how many that were sent meanwhile.
VIEWER = """
import time, rclpy
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
rclpy.init()
node = rclpy.create_node('viewer')
numbers = []
node.create_subscription(
    Image, 'image', lambda m: numbers.append(m.header.stamp.sec), qos_profile_sensor_data)
deadline = time.monotonic() + 30
while len(numbers) < 30 and time.monotonic() < deadline:
    rclpy.spin_once(node, timeout_sec=0.1)
print(len(numbers), numbers[-1] - numbers[0] + 1 if numbers else 0)
"""


def test_default_profile_is_one_that_exists():
    (path,) = profile_environment(DEFAULT_PROFILE).values()
    assert ElementTree.parse(path).getroot().tag == '{http://www.eprosima.com}dds'


def test_default_leaves_fast_dds_as_it_is():
    assert profile_environment('default') == {}


def test_a_path_is_taken_and_made_absolute(tmp_path, monkeypatch):
    (tmp_path / 'mine.xml').write_text('<dds/>')
    monkeypatch.chdir(tmp_path)
    assert list(profile_environment('mine.xml').values()) == [str(tmp_path / 'mine.xml')]


def test_an_unknown_profile_is_refused():
    with pytest.raises(Pi05Error, match="transport profile 'fast': expected large_images, .*path"):
        profile_environment('fast')


@pytest.mark.ros
def test_a_viewer_without_the_profile_gets_the_images_of_a_camera_with_it():
    """Without the profile about one image of fifty arrives; with LARGE_DATA none ever does."""
    plain = {n: v for n, v in os.environ.items() if n != 'FASTDDS_BUILTIN_TRANSPORTS'}
    camera = subprocess.Popen(
        [sys.executable, '-c', CAMERA],
        env={**plain, **profile_environment('large_images')},
        stdin=subprocess.PIPE,
    )
    try:
        viewer = subprocess.run(
            [sys.executable, '-c', VIEWER], env=plain, capture_output=True, text=True, check=True
        )
    finally:
        camera.stdin.close()
        camera.wait(timeout=20)
    received, sent = map(int, viewer.stdout.split())
    assert received >= 30
    assert received >= sent / 2

"""cv_bridge is optional: used where it is installed, and its absence or failure is said."""

from __future__ import annotations

import logging
import sys
import types

import numpy as np
import pytest
import rclpy
from helpers import CameraScript, bench, image_message
from rclpy.serialization import serialize_message

from pi05_ros.control.reasons import InputFault, Reason
from pi05_ros.ros.bridge import RosLogHandler, find_converter, hardware_id

pytestmark = pytest.mark.ros


class FakeCvBridge(types.ModuleType):
    """Takes the place of cv_bridge, which is not on the package index."""

    class CvBridgeError(TypeError):
        pass

    class CvBridge:
        def imgmsg_to_cv2(self, message, desired_encoding):
            assert desired_encoding == 'rgb8'
            if message.encoding != 'yuv422_yuy2':
                raise FakeCvBridge.CvBridgeError(f'no {message.encoding}')
            return np.full((message.height, message.width, 3), 7, dtype=np.uint8)


@pytest.fixture
def cv_bridge(monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv_bridge', FakeCvBridge('cv_bridge'))


def raw_image(encoding: str) -> bytes:
    return serialize_message(image_message(CameraScript(encoding=encoding, channels=2), 0))


def test_absent_cv_bridge_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv_bridge', None)
    found = find_converter()
    assert found.decode is None
    assert found.state.startswith(('not installed', 'cannot be imported'))


@pytest.mark.usefixtures('cv_bridge')
def test_installed_cv_bridge_converts_other_encodings():
    found = find_converter()
    assert found.state == 'installed'
    assert found.decode is not None
    np.testing.assert_array_equal(found.decode(raw_image('yuv422_yuy2')), np.full((24, 32, 3), 7))


@pytest.mark.usefixtures('cv_bridge')
def test_encoding_that_cv_bridge_does_not_know_is_a_named_reason():
    decode = find_converter().decode
    assert decode is not None
    with pytest.raises(InputFault, match="cv_bridge cannot convert '32FC1': no 32FC1") as caught:
        decode(raw_image('32FC1'))
    assert caught.value.reason is Reason.BAD_ENCODING


@pytest.mark.usefixtures('ros', 'cv_bridge')
def test_node_acts_on_images_that_cv_bridge_converts():
    with bench() as b:
        b.sensors.cameras['wrist'] = CameraScript(encoding='yuv422_yuy2', channels=2)
        b.start()
        b.until(lambda: b.observer.chunks)
        b.until(lambda: b.observer.values('Lifecycle').get('cv_bridge') == 'installed')
        b.until(lambda: b.observer.values('Inputs')['wrist encoding'] == 'yuv422_yuy2')


def test_hardware_of_a_cpu_is_its_name():
    assert hardware_id('cpu') == 'cpu'


@pytest.mark.usefixtures('ros')
def test_log_lines_of_the_model_code_go_to_the_node(capfd):
    node = rclpy.create_node('logs')
    log = logging.getLogger('pi05_ros.engine.test')
    handler = RosLogHandler(node.get_logger())
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            log.log(level, 'line of level %s', logging.getLevelName(level))
    finally:
        log.removeHandler(handler)
        node.destroy_node()
    text = capfd.readouterr().err
    assert '[INFO]' in text and 'line of level INFO' in text
    assert '[WARN]' in text and '[ERROR]' in text
    assert 'line of level DEBUG' not in text

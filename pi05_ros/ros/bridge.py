"""What surrounds the node: cv_bridge if installed, Python's log lines, the machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from rclpy.utilities import get_rmw_implementation_identifier
from sensor_msgs.msg import Image

from pi05_ros import __version__
from pi05_ros.control.images import ForeignDecoder, decoder_name
from pi05_ros.control.reasons import InputFault, Reason


@dataclass(frozen=True)
class Converter:
    """cv_bridge, or why it cannot help.

    Args:
        state: for the diagnostics: ``installed``, or what is wrong.
        decode: None where it is not installed.
    """

    state: str
    decode: ForeignDecoder | None


def find_converter() -> Converter:
    """Look for cv_bridge; it is needed only for images in other encodings than the native ones."""
    try:
        import cv_bridge
    except ImportError as error:
        # Installed, but for another NumPy or OpenCV: that is worth knowing.
        absent = isinstance(error, ModuleNotFoundError) and error.name == 'cv_bridge'
        return Converter('not installed' if absent else f'cannot be imported: {error}', None)
    bridge = cv_bridge.CvBridge()

    def decode(raw: bytes | memoryview) -> np.ndarray:
        message = deserialize_message(bytes(raw), Image)
        try:
            return np.asarray(bridge.imgmsg_to_cv2(message, desired_encoding='rgb8'))
        except (cv_bridge.CvBridgeError, ValueError, TypeError) as error:
            raise InputFault(
                Reason.BAD_ENCODING, f'cv_bridge cannot convert {message.encoding!r}: {error}'
            ) from error

    return Converter('installed', decode)


class RosLogHandler(logging.Handler):
    """Hands the log lines of the packages without ROS to the node's logger."""

    def __init__(self, logger: RcutilsLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Log one line; rclpy wants each severity to come from a line of its own."""
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)
        else:
            self._logger.debug(text)


def hardware_id(device: str) -> str:
    """Name what the model runs on: the GPU with the end of its UUID, or the device."""
    if not device.startswith('cuda'):
        return device
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    return f'{properties.name} {str(properties.uuid)[-12:]}'


def environment(node: Node, converter: Converter) -> dict[str, str]:
    """Name what decides whether two nodes hear each other, and the version that runs."""
    return {
        'RMW': get_rmw_implementation_identifier(),
        'ROS_DOMAIN_ID': str(node.context.get_domain_id()),
        'pi05_ros version': __version__,
        'compressed image decoder': decoder_name(),
        'cv_bridge': converter.state,
    }

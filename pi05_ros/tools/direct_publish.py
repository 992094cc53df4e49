"""Publish serialised messages as a driver in C++ does: stamped, then handed to the middleware.

rclpy publishes immutable ``bytes``. Another stamp in them is a new copy of the image, and rclpy
makes one more: 0.3 ms of an image of 640x480 between its stamp and the middleware, which no driver
of a camera needs. Here rcl is given the same memory every time. For benchmarks only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from pi05_ros.model.errors import Pi05Error
from pi05_ros.ros.direct_take import SerializedMessage

from .playback import write_stamp


class DirectPublishError(Pi05Error):
    """rcl is not to be had, or did not publish."""


class StampedMessages:
    """Serialised messages of one topic, published one after the other.

    Args:
        publisher: of rclpy.
        messages: raw CDR, beginning with a std_msgs/Header.
    """

    def __init__(self, publisher: Any, messages: list[bytes]) -> None:
        self._publisher = publisher
        self._publish = _find_publish()
        self._memory = [np.frombuffer(message, np.uint8).copy() for message in messages]
        self._messages = [
            SerializedMessage(
                buffer=memory.ctypes.data,
                buffer_length=memory.nbytes,
                buffer_capacity=memory.nbytes,
            )
            for memory in self._memory
        ]
        self._published = 0

    def publish(self, now_ns: Callable[[], int]) -> None:
        """Stamp the next message with the present time and publish it.

        Raises:
            DirectPublishError: rcl refused.
        """
        index = self._published % len(self._messages)
        message = ctypes.byref(self._messages[index])
        with self._publisher.handle:
            write_stamp(self._memory[index].data, now_ns())
            code = self._publish(self._publisher.handle.pointer, message, None)
        if code != 0:
            raise DirectPublishError(f'rcl cannot publish: error {code}')
        self._published += 1


def _find_publish() -> Callable[..., int]:
    """Return the function of the library that rclpy has loaded."""
    try:
        library = ctypes.PyDLL('librcl.so', os.RTLD_NOLOAD | os.RTLD_NOW)
        function = library.rcl_publish_serialized_message
    except (OSError, AttributeError) as error:
        raise DirectPublishError(f'rcl is not to be had: {error}') from error
    function.restype, function.argtypes = ctypes.c_int, [ctypes.c_void_p] * 3
    return function

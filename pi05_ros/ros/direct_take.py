"""Take an image from the middleware straight into memory of ours, through rcl's C interface.

rclpy's raw take has the middleware write into a buffer of rcl's and copies that into a new
``bytes``, which is then copied once more into memory that the GPU can read. Here rcl is given the
last buffer in the first place. rclpy has no function for this, so rcl's own is called.

The structures below are those of rcutils/types/uint8_array.h, rcutils/allocator.h and rmw/types.h,
the same in ROS 2 Jazzy and Kilted. Whether they are those of the ROS 2 that runs is found out by
:func:`.take_check.checked_rcl`; without its consent nobody takes this way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rclpy.subscription import Subscription

from pi05_ros.model.errors import Pi05Error

# Raw CDR, and the middleware's message info.
Taken = tuple[bytes | memoryview, Mapping[str, Any]]
# Returns (num_bytes,) uint8.
Allocate = Callable[[int], np.ndarray]

# A sender that is faster than this loop must not hold up the tick.
MAX_TAKES = 16
# Beyond the largest message so far: a header of another length is no reason to allocate.
SLACK_BYTES = 4096

_RCL_RET_OK = 0  # rcl/types.h
_RCL_RET_SUBSCRIPTION_TAKE_FAILED = 401
_SEQUENCE_UNSUPPORTED = 2**64 - 1  # rmw/types.h
# Behind the structure that rcl fills; it is overwritten where that is longer than expected here.
_GUARD = b'\xa5' * 64

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_DEALLOCATE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_REALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_ZERO_ALLOCATE = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p
)


class DirectTakeError(Pi05Error):
    """Images cannot be taken straight into a buffer, or one could not be taken."""


class _Allocator(ctypes.Structure):
    """rcutils_allocator_t."""

    _fields_ = [
        ('allocate', _ALLOCATE),
        ('deallocate', _DEALLOCATE),
        ('reallocate', _REALLOCATE),
        ('zero_allocate', _ZERO_ALLOCATE),
        ('state', ctypes.c_void_p),
    ]


class SerializedMessage(ctypes.Structure):
    """rcutils_uint8_array_t."""

    _fields_ = [
        ('buffer', ctypes.c_void_p),
        ('buffer_length', ctypes.c_size_t),
        ('buffer_capacity', ctypes.c_size_t),
        ('allocator', _Allocator),
    ]


class _MessageInfo(ctypes.Structure):
    """rmw_message_info_t."""

    _fields_ = [
        ('source_timestamp', ctypes.c_int64),
        ('received_timestamp', ctypes.c_int64),
        ('publication_sequence_number', ctypes.c_uint64),
        ('reception_sequence_number', ctypes.c_uint64),
        ('gid_implementation', ctypes.c_char_p),
        ('gid', ctypes.c_uint8 * 16),
        ('from_intra_process', ctypes.c_bool),
    ]

    def as_dict(self) -> dict[str, Any]:
        """Return what rclpy's take returns; the publisher's id as (16,) bytes."""
        sequence = self.publication_sequence_number
        return {
            'source_timestamp': self.source_timestamp,
            'received_timestamp': self.received_timestamp,
            'publication_sequence_number': None if sequence == _SEQUENCE_UNSUPPORTED else sequence,
            'publisher_gid': bytes(self.gid),
        }


class _GuardedInfo(ctypes.Structure):
    """The info, and what a longer one than expected would overwrite."""

    _fields_ = [('info', _MessageInfo), ('guard', ctypes.c_char * len(_GUARD))]


class TakeBuffer:
    """Memory for one message. It grows when a message is longer, and then is other memory.

    Args:
        allocate: makes the memory, also when it grows.
        num_bytes: the capacity to begin with.
    """

    def __init__(self, allocate: Allocate, num_bytes: int) -> None:
        self.memory = allocate(num_bytes)
        self._address = self.memory.ctypes.data
        self._allocate = allocate
        self._message_bytes = 0
        self._fault: Exception | None = None
        self._serialized = SerializedMessage(allocator=_ALLOCATOR)
        # The callbacks are shared; this tells them whose memory it is. The buffer outlives every
        # call of rcl, as its method makes the call.
        self._serialized.allocator.state = id(self)
        self._received = _GuardedInfo(guard=_GUARD)
        self._arguments = (ctypes.byref(self._serialized), ctypes.byref(self._received))

    def take(self, rcl: Rcl, subscription: int) -> Mapping[str, Any] | None:
        """Take one message, if there is one; what the buffer held is overwritten then.

        Args:
            subscription: address of the ``rcl_subscription_t``.
        Returns: the message's info; None if there was no message.
        Raises:
            DirectTakeError: rcl failed; the buffer's content is not defined.
        """
        serialized = self._serialized
        # Every time: after a failed allocation rcl leaves a null pointer.
        serialized.buffer = self._address
        serialized.buffer_capacity = self.memory.nbytes
        serialized.buffer_length = 0
        code = rcl.take_serialized_message(subscription, *self._arguments, None)
        if code == _RCL_RET_OK:
            self._message_bytes = serialized.buffer_length
            return self._received.info.as_dict()
        rcl.reset_error()
        if code == _RCL_RET_SUBSCRIPTION_TAKE_FAILED:
            return None
        fault, self._fault = self._fault, None
        raise DirectTakeError(f'rcl cannot take an image: error {code}') from fault

    def message(self) -> memoryview:
        """Return a read-only view of the message taken last."""
        memory: Any = self.memory  # NumPy's types do not say that an array is a buffer
        return memoryview(memory)[: self._message_bytes].toreadonly()

    @property
    def is_intact(self) -> bool:
        """Tell whether rcl kept to the size of the info that it was given."""
        return self._received.guard == _GUARD

    def grow(self, num_bytes: int) -> int | None:
        """Replace the memory by more; return its address, or None if there is no more."""
        try:
            memory = self._allocate(num_bytes + SLACK_BYTES)
        except Exception as error:  # it must not pass through C; raised once rcl returned
            self._fault = error
            return None
        memory[: self.memory.nbytes] = self.memory
        self.memory, self._address = memory, memory.ctypes.data
        return self._address


def plain_memory(num_bytes: int) -> np.ndarray:
    """Return memory that is not page-locked."""
    return np.empty(num_bytes, dtype=np.uint8)


def _reallocate(pointer: int | None, num_bytes: int, state: int) -> int | None:
    return ctypes.cast(state, ctypes.py_object).value.grow(num_bytes)


# rcl may only ask for more, never for memory beside the buffer; what it frees is ours to free.
_ALLOCATOR = _Allocator(
    allocate=_ALLOCATE(lambda num_bytes, state: None),
    deallocate=_DEALLOCATE(lambda pointer, state: None),
    reallocate=_REALLOCATE(_reallocate),
    zero_allocate=_ZERO_ALLOCATE(lambda count, num_bytes, state: None),
)


class Rcl:
    """The functions of rcl that are called, in the libraries that rclpy has loaded.

    Raises:
        DirectTakeError: they are not loaded, or have no such functions.
    """

    def __init__(self) -> None:
        # PyDLL keeps the interpreter's lock, as rclpy's own take does: given away, it would come
        # back up to 5 ms late. Only what is loaded already: a second copy would share no state.
        try:
            mode = os.RTLD_NOLOAD | os.RTLD_NOW
            take = ctypes.PyDLL('librcl.so', mode).rcl_take_serialized_message
            reset = ctypes.PyDLL('librcutils.so', mode).rcutils_reset_error
        except (OSError, AttributeError) as error:
            raise DirectTakeError(f'rcl is not to be had: {error}') from error
        take.restype, take.argtypes = ctypes.c_int, [ctypes.c_void_p] * 4
        reset.restype, reset.argtypes = None, []
        self.take_serialized_message: Callable[..., int] = take
        self.reset_error: Callable[[], None] = reset


class DirectTake:
    """Takes the newest message of one subscription into two buffers by turns.

    The message that :meth:`newest` returned is in one buffer, and the next is written into the
    other. So it stays as it is until the call after the next that returns a message: a reader has
    to be done by then. The tick is: it polls, then reads, copies to the GPU, waits for the result,
    and polls again, all in one thread; what it polls replaces the message that it read before, and
    nobody reads while something is polled between two ticks.
    """

    def __init__(self, rcl: Rcl, allocate: Allocate, num_bytes: int) -> None:
        self._rcl = rcl
        self._buffers = [TakeBuffer(allocate, num_bytes) for _ in range(2)]

    @property
    def is_intact(self) -> bool:
        """See :attr:`TakeBuffer.is_intact`."""
        return all(buffer.is_intact for buffer in self._buffers)

    def newest(self, subscription: Subscription) -> Taken | None:
        """Take what is there; return the newest, as a view, or None.

        Raises:
            DirectTakeError: rcl failed.
        """
        free, info = self._buffers[0], None
        with subscription.handle:
            pointer = subscription.handle.pointer
            for _ in range(MAX_TAKES):
                taken = free.take(self._rcl, pointer)
                if taken is None:
                    break
                info = taken
        if info is None:
            return None
        self._buffers.reverse()
        return free.message(), info


class RclpyTake:
    """Takes the newest message of one subscription as rclpy does, into new ``bytes``."""

    def newest(self, subscription: Subscription) -> Taken | None:
        """Take what is there; return the newest, or None."""
        newest = None
        with subscription.handle:
            for _ in range(MAX_TAKES):
                taken = subscription.handle.take_message(subscription.msg_type, True)
                if taken is None:
                    break
                newest = taken
        return newest

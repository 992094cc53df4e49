"""The timing of a playback, without ROS: when a recorded message is due, and its new stamp."""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

from .bag import Bag, BagMessage

# Later than this is not made up for: the messages behind it would arrive in a burst that no
# camera ever sends.
MAX_LATE_NS = 20_000_000
READ_AHEAD_MESSAGES = 32

_STAMP = {0: struct.Struct('>iI'), 1: struct.Struct('<iI')}
_STAMP_BYTES = slice(4, 12)
# The seconds are an int32.
MAX_STAMP_NS = 2**31 * 1_000_000_000 - 1
_NS_PER_S = 1_000_000_000

T = TypeVar('T')


@dataclass(frozen=True)
class Event:
    """One thing to do at one instant of a playback.

    Args:
        due_ns: bag time at which it is due, counted on through the passes of a loop.
        lap_ns: what the passes before this one add to the recorded stamps.
        clock_ns: time to publish on /clock; None for a message.
        message: the message to publish; None for a clock tick.
    """

    due_ns: int
    lap_ns: int
    clock_ns: int | None = None
    message: BagMessage | None = None


def timeline(bag: Bag, topics: list[str], *, loop: bool, clock_ns: int | None) -> Iterator[Event]:
    """Yield what is due, in order; endless with ``loop``.

    Args:
        clock_ns: bag time between two clock ticks, the first at the start of the bag; None for
            no clock. The clock jumps back with every pass.
    """
    lap_ns = bag.lap_ns if loop else 0
    shift_ns = 0
    while True:
        tick_ns = bag.start_ns
        for message in bag.messages(topics):
            while clock_ns and tick_ns <= message.receive_ns:
                yield Event(tick_ns + shift_ns, shift_ns, clock_ns=tick_ns)
                tick_ns += clock_ns
            yield Event(message.receive_ns + shift_ns, shift_ns, message=message)
        if not loop:
            return
        shift_ns += lap_ns


class Pacer:
    """Maps bag time to the steady clock; time lost is lost, never made up for in a burst.

    The first :meth:`wait_until` sets the start: that event is due at once.

    Args:
        rate: bag seconds per second.
        now_ns: the steady clock.
        wait: waits for so many seconds; returns True if the playback is to end.
    """

    def __init__(
        self,
        rate: float,
        wait: Callable[[float], bool],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._rate = rate
        self._wait = wait
        self._now_ns = now_ns
        self._start_ns: int | None = None
        self._base_ns = 0
        self.behind_ns = 0

    def steady_ns(self, bag_ns: int) -> int:
        """Return the instant of the steady clock that ``bag_ns`` falls on."""
        start_ns = bag_ns if self._start_ns is None else self._start_ns
        return self._base_ns + round((bag_ns - start_ns) / self._rate)

    def wait_until(self, bag_ns: int) -> bool:
        """Wait until ``bag_ns`` is due; return False if the playback is to end."""
        if self._start_ns is None:
            self._start_ns = bag_ns
            self._base_ns = self._now_ns()
        late_ns = self._now_ns() - self.steady_ns(bag_ns)
        if late_ns > MAX_LATE_NS:
            self._base_ns += late_ns
            self.behind_ns += late_ns
        return not self._wait(max(-late_ns, 0) / _NS_PER_S)


def read_stamp(raw: bytes) -> int:
    """Return the stamp of a message that begins with a std_msgs/Header, in nanoseconds.

    0, which means "no stamp", if the message is cut off before its end.
    """
    if len(raw) < _STAMP_BYTES.stop:
        return 0
    seconds, nanoseconds = _STAMP[raw[1] & 1].unpack(raw[_STAMP_BYTES])
    return int(seconds) * _NS_PER_S + int(nanoseconds)


def with_stamp(raw: bytes, stamp_ns: int) -> bytes:
    """Return the message with another header stamp and nothing else changed.

    The stamp is the first eight bytes behind the encapsulation, whose second byte's lowest bit
    tells the byte order. A stamp that a header cannot hold leaves the message as it is.
    """
    if not 0 <= stamp_ns <= MAX_STAMP_NS:
        return raw
    stamp = _STAMP[raw[1] & 1].pack(*divmod(stamp_ns, _NS_PER_S))
    return b''.join((raw[: _STAMP_BYTES.start], stamp, raw[_STAMP_BYTES.stop :]))


def write_stamp(raw: memoryview, stamp_ns: int) -> None:
    """Replace the stamp in writable memory; ``stamp_ns`` is one that a header can hold."""
    _STAMP[raw[1] & 1].pack_into(raw, _STAMP_BYTES.start, *divmod(stamp_ns, _NS_PER_S))


def read_ahead(items: Iterator[T], depth: int = READ_AHEAD_MESSAGES) -> Generator[T, None, None]:
    """Yield ``items`` as a thread fetches them, so that decompression does not delay a message.

    What the thread raises is raised here, after the items before it.
    """
    ready: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue(depth)
    ended = threading.Event()

    def put(item: T | None, error: Exception | None) -> None:
        while not ended.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def fetch() -> None:
        try:
            for item in items:
                put(item, None)
                if ended.is_set():
                    return
        except Exception as error:  # handed over to the reader, which raises it
            put(None, error)
        else:
            put(None, None)

    thread = threading.Thread(target=fetch, name='read-ahead', daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        ended.set()
        thread.join()

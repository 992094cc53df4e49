"""What every input keeps: its newest message, its stamps and how fast it comes."""

from __future__ import annotations

from collections import deque

from .cdr import parse_header
from .reasons import InputFault, Reason

NS_PER_S = 1_000_000_000
# Arrivals older than this say nothing about the present rate.
RATE_WINDOW_NS = 5 * NS_PER_S


class Slot:
    """Newest message of one input. Content is decoded when a tick needs it, not on arrival.

    Args:
        name: the input, e.g. ``wrist``.
        title: how diagnostics and reasons call it, e.g. ``wrist image``.
        topic: where it arrives, for error messages.
    """

    def __init__(self, name: str, title: str, topic: str) -> None:
        self.name = name
        self.title = title
        self.topic = topic
        self.received = 0  # messages seen, since construction
        self.lost = 0  # messages that the middleware reported as lost
        self.clear()

    def clear(self) -> None:
        """Forget the message (not the counters), as after a jump of the clock."""
        self.raw: bytes | None = None
        self.fault: InputFault | None = None
        self.header_ns = 0
        self.receive_ns = 0
        self._arrivals: deque[tuple[int, int | None]] = deque(maxlen=256)

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing came yet (or since the clock jumped)."""
        return self.raw is None

    @property
    def message(self) -> bytes:
        """The newest message.

        Raises:
            InputFault: there is none, or it is malformed.
        """
        if self.fault is not None:
            raise self.fault
        if self.raw is None:
            raise InputFault(Reason.MISSING_INPUT, f'nothing came on {self.topic}')
        return self.raw

    def push(self, raw: bytes, receive_ns: int, sequence: int | None = None) -> None:
        """Replace the message.

        Args:
            raw: CDR bytes of a message that starts with a std_msgs/Header.
            receive_ns: when it arrived, in nanoseconds of the ROS clock.
            sequence: the publisher's count of its messages, where the middleware tells it. The
                rate then counts messages that came and were replaced between two ticks, too.
        """
        self.raw = raw
        self.receive_ns = receive_ns
        self.received += 1
        self._arrivals.append((receive_ns, sequence))
        self.fault = None
        try:
            self.header_ns = parse_header(raw).stamp_ns
        except InputFault as fault:
            self.header_ns = 0
            self.fault = fault

    def stamp_ns(self, source: str) -> int:
        """Return the stamp that counts: ``header`` or ``receive``."""
        return self.header_ns if source == 'header' else self.receive_ns

    def rate_hz(self, now_ns: int) -> float:
        """Return how often messages arrived lately; 0.0 when fewer than two did."""
        while self._arrivals and now_ns - self._arrivals[0][0] > RATE_WINDOW_NS:
            self._arrivals.popleft()
        if len(self._arrivals) < 2:
            return 0.0
        (first_ns, first_seq), (last_ns, last_seq) = self._arrivals[0], self._arrivals[-1]
        if last_ns <= first_ns:
            return 0.0
        count = len(self._arrivals) - 1
        # A publisher that restarted counts from one again; then the arrivals have to do.
        if first_seq is not None and last_seq is not None and last_seq - first_seq > count:
            count = last_seq - first_seq
        return count * NS_PER_S / (last_ns - first_ns)

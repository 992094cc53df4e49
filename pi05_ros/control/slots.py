"""What every input keeps: its newest message, its stamps and how fast it comes."""

from __future__ import annotations

from .cdr import parse_header
from .reasons import InputFault, Reason
from .window import RateMeter


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
        self.clear()

    def clear(self) -> None:
        """Forget the message (not the counters), as after a jump of the clock."""
        self.raw: bytes | memoryview | None = None
        self.fault: InputFault | None = None
        self.has_header = False
        self.header_ns = 0
        self.receive_ns = 0
        self._arrivals = RateMeter()

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing came yet (or since the clock jumped)."""
        return self.raw is None

    @property
    def message(self) -> bytes | memoryview:
        """The newest message.

        Raises:
            InputFault: there is none, or it is malformed.
        """
        if self.fault is not None:
            raise self.fault
        if self.raw is None:
            raise InputFault(Reason.MISSING_INPUT, f'nothing came on {self.topic}')
        return self.raw

    def push(self, raw: bytes | memoryview, receive_ns: int, sequence: int | None = None) -> None:
        """Replace the message.

        Args:
            raw: CDR bytes of a message that starts with a std_msgs/Header. They stay as they are
                until the next push.
            receive_ns: when it arrived, in nanoseconds of the ROS clock.
            sequence: the publisher's count of its messages, where the middleware tells it. The
                rate then counts messages that came and were replaced between two ticks, too.
        """
        self.raw = raw
        self.receive_ns = receive_ns
        self.received += 1
        self._arrivals.add(receive_ns, sequence)
        self.fault = None
        self.header_ns = 0
        self.has_header = False
        try:
            self.header_ns = parse_header(raw).stamp_ns
            self.has_header = True
        except InputFault as fault:
            self.fault = fault

    def stamp_ns(self, source: str) -> int:
        """Return the stamp that counts: ``header`` or ``receive``."""
        return self.header_ns if source == 'header' else self.receive_ns

    def rate_hz(self, now_ns: int) -> float:
        """Return how often messages arrived lately; 0.0 when fewer than two did."""
        return self._arrivals.rate_hz(now_ns)

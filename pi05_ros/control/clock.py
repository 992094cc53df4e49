"""Does the ROS clock still move? A simulated one stops with its simulator or its bag."""

from __future__ import annotations

# A simulated clock that is published at 1 Hz still counts as moving.
STOPPED_AFTER_NS = 1_500_000_000


class ClockWatch:
    """Compares the ROS clock with the steady one."""

    def __init__(self) -> None:
        self._ros_ns: int | None = None
        self._moved_at_ns = 0

    def is_stopped(self, ros_ns: int, steady_ns: int) -> bool:
        """Tell whether the ROS clock has shown the same time for long.

        Args:
            ros_ns: what it shows now.
            steady_ns: a clock that cannot stop.
        """
        if ros_ns != self._ros_ns:
            self._ros_ns, self._moved_at_ns = ros_ns, steady_ns
        return steady_ns - self._moved_at_ns > STOPPED_AFTER_NS

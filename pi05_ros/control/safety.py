"""What may be sent to a robot: finite, within its limits, near the measured joints, not too fast.

The limits stand in the robot file. Nothing here knows ROS or a clock, so a replay decides as the
live node does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import ActionDim, RobotSpec
from pi05_ros.policy.types import ActionChunk

from .reasons import Reason, Skip

NS_PER_S = 1_000_000_000
# float32 actions at the limit itself must not be refused for the last bit.
_TOLERANCE = 1e-6


class HoldError(Pi05Error):
    """There is no command that would make the robot hold."""


@dataclass(frozen=True)
class _Sent:
    """The newest action that passed: first row and measured joints, (D,) float64, and its tick."""

    row: np.ndarray
    measured: np.ndarray  # NaN where there is no such joint
    now_ns: int


class _Limits:
    """One limit per action dimension, (D,) float64, and where it begins to count."""

    def __init__(self, limits: list[float]) -> None:
        self.exact = np.array(limits)
        self.tolerated = self.exact * (1.0 + _TOLERANCE)


class ActionGuard:
    """Lets a chunk pass, clips it to the position limits, or refuses it as a whole.

    In this order: every value is finite, also of the rows that are not sent; values outside of
    ``min`` and ``max`` are clipped; the first row is within ``max_jump`` of the measured joints;
    no row and no action is faster than ``max_rate`` after the one before. An action may also go as
    far as the joint itself went since: it follows a robot that was moved by hand, reset, or played
    from a bag that begins again.

    Args:
        rows: how many of a chunk are sent, from the first on; 0 for all.
    Attributes:
        clips: action dimension -> chunks in which it was clipped.
    """

    def __init__(self, robot: RobotSpec, rows: int = 0) -> None:
        dims = robot.actions
        self._dims = dims
        self._sent_rows = rows or None
        self._low = _inwards([-np.inf if dim.min is None else dim.min for dim in dims], np.inf)
        self._high = _inwards([np.inf if dim.max is None else dim.max for dim in dims], -np.inf)
        self._jump_limits = _Limits([dim.jump_limit for dim in dims])
        self._rate_limits = _Limits([dim.rate_limit for dim in dims])
        indices = [robot.measured_index(dim) for dim in dims]
        self._columns = [column for column, index in enumerate(indices) if index is not None]
        self._indices = [index for index in indices if index is not None]
        self._last: _Sent | None = None
        self.clips: Counter[str] = Counter()

    def forget(self) -> None:
        """Forget the last action, as after a jump of the clock."""
        self._last = None

    def clip(self, actions: np.ndarray) -> np.ndarray:
        """Return (H, D) float32 within the position limits; the same array if it was already."""
        if ((actions >= self._low) & (actions <= self._high)).all():
            return actions
        return np.clip(actions, self._low, self._high)

    def check(
        self, chunk: ActionChunk, state: np.ndarray, now_ns: int, period_ns: int
    ) -> ActionChunk | Skip:
        """Return the chunk as it may be sent, cut to the rows that are, or why it may not.

        Args:
            state: (S,) float64 of the observation, in robot units.
            now_ns: time of the tick, in nanoseconds of the ROS clock.
            period_ns: two ticks closer to each other count as this far apart.
        """
        finite = np.isfinite(chunk.actions)
        if not finite.all():
            columns = np.flatnonzero(~finite.all(axis=0))
            names = ', '.join(chunk.names[column] for column in columns)
            return Skip(Reason.ACTION_NOT_FINITE, '', f'not finite in the action: {names}')
        sent = chunk.actions if self._sent_rows is None else chunk.actions[: self._sent_rows]
        actions = self.clip(sent)
        rows = actions.astype(np.float64)
        now = _Sent(rows[0], self._measured_of(state), now_ns)
        skip = self._jump(now) or self._rate(rows, chunk.step_s, now, period_ns)
        if skip is not None:
            return skip
        self._last = now
        if actions is not sent:
            clipped = np.flatnonzero((actions != sent).any(axis=0))
            self.clips.update(chunk.names[column] for column in clipped)
        return chunk if actions is chunk.actions else replace(chunk, actions=actions)

    def _measured_of(self, state: np.ndarray) -> np.ndarray:
        """Return the measured position of each action's joint, NaN where there is none."""
        measured = np.full(len(self._dims), np.nan)
        measured[self._columns] = state[self._indices]
        return measured

    def _jump(self, now: _Sent) -> Skip | None:
        jump = np.abs(now.row - now.measured)
        return self._refuse(
            Reason.ACTION_JUMP, jump, self._jump_limits, '', 'from the measured position'
        )

    def _rate(self, rows: np.ndarray, step_s: float, now: _Sent, period_ns: int) -> Skip | None:
        rate = np.abs(rows[1:] - rows[:-1]).max(axis=0, initial=0.0) / step_s
        reason, limits = Reason.ACTION_TOO_FAST, self._rate_limits
        skip = self._refuse(reason, rate, limits, '/s', 'between two rows')
        last = self._last
        if skip is None and last is not None:
            elapsed_s = max(now.now_ns - last.now_ns, period_ns) / NS_PER_S
            followed = np.fmax(np.abs(now.measured - last.measured), 0.0)  # 0 for NaN
            rate = np.maximum(np.abs(now.row - last.row) - followed, 0.0) / elapsed_s
            skip = self._refuse(reason, rate, limits, '/s', 'since the action before')
        return skip

    def _refuse(
        self, reason: Reason, found: np.ndarray, limits: _Limits, per: str, where: str
    ) -> Skip | None:
        """Name every dimension above its limit, the worst first; NaN is above none."""
        above = found > limits.tolerated
        if not above.any():
            return None
        worst_first = sorted(
            np.flatnonzero(above), key=lambda column: -found[column] / limits.exact[column]
        )
        faults = []
        for column in worst_first:
            dim, unit = self._dims[column], f'{self._dims[column].unit}{per}'
            faults.append(
                f'{dim.name} {found[column]:.3g} {unit} > {limits.exact[column]:g} {unit}'
            )
        return Skip(reason, '', f'{where}: {", ".join(faults)}')


def hold_row(
    dims: tuple[ActionDim, ...], last: np.ndarray, measured: Mapping[str, float]
) -> np.ndarray:
    """Return the command (D,) float64 that makes the robot stay where it is.

    Joints are held where they were measured and velocities become zero. A gripper keeps its last
    command: held at its measured opening, it would drop what it grips.

    Args:
        last: (D,) the last command.
        measured: joint -> position.
    Raises:
        HoldError: a joint was not measured, or a dimension has no such command.
    """
    row = np.array(last, dtype=np.float64)
    for column, dim in enumerate(dims):
        if dim.kind == 'joint_position':
            if dim.joint is None or dim.joint not in measured:
                raise HoldError(f'no measured position of {dim.joint}, so it cannot be held there')
            row[column] = measured[dim.joint]
        elif dim.kind == 'joint_velocity':
            row[column] = 0.0
        elif not dim.kind.startswith('gripper_'):
            raise HoldError(f'{dim.name} ({dim.kind}) has no command to hold')
    return row


def _inwards(limits: list[float], inner: float) -> np.ndarray:
    """Round limits to float32 so that none grows; ``inner`` is infinity on their inner side."""
    exact = np.array(limits, dtype=np.float64)
    rounded = exact.astype(np.float32)
    grew = rounded < exact if inner > 0 else rounded > exact
    return np.where(grew, np.nextafter(rounded, np.float32(inner)), rounded)

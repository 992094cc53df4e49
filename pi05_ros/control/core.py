"""The control tick: is there a complete, fresh observation, and what does the policy say to it?

Nothing here knows rclpy: the live node and replay drive the same object with raw messages and a
clock that is only ever passed in.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.types import ActionChunk, Observation

from .device import first_line
from .gates import NS_PER_MS, check_age, check_skew
from .inputs import Inputs
from .parameters import NodeSettings
from .reasons import Reason, Skip
from .safety import ActionGuard
from .window import RateMeter

# A pause between two ticks that is longer than this is a jump of the clock, not a slow inference.
MAX_OVERRUN_NS = 10_000_000_000
_ESTOPPED = Skip(Reason.ESTOP, '', 'the emergency stop is latched; ~/estop_reset releases it')
_TOO_LATE = Skip(
    Reason.ACTION_TOO_LATE, '', 'the watchdog or the emergency stop acted while it was computed'
)


class PolicyLike(Protocol):
    """What the core needs of :class:`pi05_ros.policy.policy.Policy`."""

    def act(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> ActionChunk:
        """Return the actions for one observation; raise Pi05Error to refuse this one only."""

    def prepare(self, *, tick: int, seed: int) -> None:
        """Do what a call with this tick and seed needs and no observation has a part in."""

    def rehearse(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> None:
        """Do what ``act`` does before the model runs, and keep nothing of it."""


@dataclass(frozen=True)
class TickResult:
    """What one tick did: either ``chunk`` or ``skip`` is set.

    Args:
        tick: its number since :meth:`ControlCore.start`; it is part of the noise.
        now_ns: ROS time of the tick.
        gate_ms: host time for gates and decoding.
        act_ms: host time inside the policy.
        oldest_receive_ns: when the input with the oldest stamp arrived, in ROS time; None for a
            skipped tick.
        error: the policy broke (rather than refused); it should not be called again.
    """

    tick: int
    now_ns: int
    chunk: ActionChunk | None
    skip: Skip | None
    gate_ms: float
    act_ms: float
    oldest_receive_ns: int | None = None
    error: Exception | None = None

    @property
    def observation_age_ms(self) -> float:
        """Age of the oldest input at the start of the tick; NaN for a skipped one."""
        if self.chunk is None:
            return float('nan')
        return (self.now_ns - self.chunk.stamp_ns) / NS_PER_MS

    @property
    def wait_ms(self) -> float:
        """From the arrival of the oldest input to the start of the tick; NaN for a skipped one."""
        if self.oldest_receive_ns is None:
            return float('nan')
        return (self.now_ns - self.oldest_receive_ns) / NS_PER_MS

    @property
    def transport_ms(self) -> float:
        """From the stamp of the oldest input to its arrival; NaN for a skipped tick."""
        return self.observation_age_ms - self.wait_ms


@dataclass
class Counters:
    """Since :meth:`ControlCore.start`; always ``ticks == actions + sum(skips)``.

    ``reused_images`` counts images that were used for more than one action, ``clock_jumps`` how
    often the clock went back, ``watchdog_trips`` how often actions failed to come in time.
    """

    ticks: int = 0
    actions: int = 0
    skips: Counter[Reason] = field(default_factory=Counter)
    reused_images: int = 0
    clock_jumps: int = 0
    watchdog_trips: int = 0


class ControlCore:
    """Decides each tick; holds no clock, no timer and no publisher.

    Args:
        inputs: filled through :meth:`push`; their camera sizes are fixed already.
        policy: called once per tick that has a complete observation.
    Attributes:
        estopped: the emergency stop is latched; no tick acts until it is reset.
    """

    def __init__(self, inputs: Inputs, policy: PolicyLike, settings: NodeSettings) -> None:
        self.inputs = inputs
        self.policy = policy
        self.settings = settings
        self.estopped = False
        self._interrupts = 0
        self.start()

    def start(self) -> None:
        """Begin counting at tick 0; called when the node is activated."""
        self.counters = Counters()
        robot, rows = self.inputs.robot, self.settings.execute_horizon
        self.guard, self._rehearsed_guard = ActionGuard(robot, rows), ActionGuard(robot, rows)
        self._state: np.ndarray | None = None
        self.last: TickResult | None = None
        self.recent: deque[bool] = deque(maxlen=max(1, round(self.settings.rate_hz)))
        self.action_rate = RateMeter()
        self._next_tick = 0
        self._last_tick_ns: int | None = None
        self._origin = (0, 0)  # a tick's time and number, from which missed ones are counted
        self._clock_ns: int | None = None
        self._jumped = False
        self._used_images: dict[str, int] = {}

    def interrupt(self) -> None:
        """Drop the action that is being computed: the robot was made to hold; from any thread."""
        self._interrupts += 1

    def update(self, settings: NodeSettings) -> None:
        """Take changed settings (only those that are not read-only differ)."""
        if settings.prompt != self.settings.prompt:
            self.inputs.prompt.set(settings.prompt)
        self.settings = settings

    def advance(self, now_ns: int) -> None:
        """Tell the time before pushing what arrived until then.

        A clock that went back (a bag that loops, a simulator that was reset) makes every message
        that is held one from the future, so all are dropped.
        """
        if self._clock_ns is not None and now_ns < self._clock_ns:
            self.inputs.clear()
            self.counters.clock_jumps += 1
            self._jumped = True
            self._last_tick_ns = None
            self.action_rate.clear()
            self.guard.forget()
        self._clock_ns = now_ns

    def push(self, name: str, raw: bytes, receive_ns: int, sequence: int | None = None) -> None:
        """Take one raw CDR message of an input (see :attr:`Inputs.topics`)."""
        self.inputs.push(name, raw, receive_ns, sequence)

    def tick(self, now_ns: int) -> TickResult:
        """Act on the newest inputs, or say why not.

        Args:
            now_ns: ROS time, the reference of every age.
        """
        began_ns = time.perf_counter_ns()
        self.advance(now_ns)
        self._count_missed(now_ns)
        observation = self._observe(now_ns)
        gated_ns = time.perf_counter_ns()
        chunk, skip, error = None, None, None
        if isinstance(observation, Skip):
            skip = observation
        else:
            chunk, skip, error = self._act(observation, now_ns)
        done_ns = time.perf_counter_ns()
        gate_ms, act_ms = (gated_ns - began_ns) / 1e6, (done_ns - gated_ns) / 1e6
        received_ns = None if chunk is None else self._oldest_receive_ns(chunk)
        result = TickResult(
            self._next_tick, now_ns, chunk, skip, gate_ms, act_ms, received_ns, error
        )
        self._record(result)
        return result

    def prepare(self) -> None:
        """Have the policy prepare the next tick; to be called between two."""
        self.policy.prepare(tick=self._next_tick, seed=self.settings.seed)

    def rehearse(self, now_ns: int) -> None:
        """Go through the next tick's work up to the model, just before it; nothing counts.

        A tick after a pause comes from cold caches, where the same work takes several times as
        long. What is wrong with the inputs, the tick itself will say.
        """
        observation = self._observe(now_ns)
        if isinstance(observation, Skip):
            return
        settings = self.settings
        with suppress(Pi05Error):
            self.policy.rehearse(
                observation,
                tick=self._next_tick,
                seed=settings.seed,
                num_steps=settings.num_steps,
            )

    def rehearse_answer(self) -> ActionChunk | None:
        """Check the last chunk again, as the next will be, by a guard that guards nothing else.

        Returns: that chunk; None where the last tick did not act.
        """
        chunk = self.last.chunk if self.last is not None else None
        if chunk is not None and self._state is not None and self._last_tick_ns is not None:
            period_ns = self.settings.period_ns
            self._rehearsed_guard.check(chunk, self._state, self._last_tick_ns, period_ns)
        return chunk

    @property
    def health(self) -> int:
        """Return 0 while every tick acts, 1 if some of the last second did not, 2 if none did."""
        if all(self.recent):
            return 0
        return 1 if any(self.recent) else 2

    def _observe(self, now_ns: int) -> Observation | Skip:
        """Check everything that is cheap first; decode images last."""
        inputs, settings = self.inputs, self.settings
        if self.estopped:
            return _ESTOPPED
        skip = inputs.missing()
        if skip is not None:
            if self._jumped:
                detail = f'the clock went back, inputs were dropped; {skip.detail}'
                return Skip(Reason.CLOCK_JUMP_BACK, skip.input_name, detail)
            return skip
        return (
            inputs.malformed()
            or self._stale(now_ns)
            or inputs.prompt_skip()
            or inputs.observation(settings.stamp_source)
        )

    def _oldest_receive_ns(self, chunk: ActionChunk) -> int:
        oldest = min(chunk.stamps_ns, key=lambda name: chunk.stamps_ns[name])
        return self.inputs.sensors[oldest].receive_ns

    def unready(self, now_ns: int) -> Skip | None:
        """Name the first sensor that is missing, unreadable or stale; the task may come later."""
        return self.inputs.missing() or self.inputs.malformed() or self._stale(now_ns)

    def _stale(self, now_ns: int) -> Skip | None:
        settings, source = self.settings, self.settings.stamp_source
        for slot in self.inputs.sensors.values():
            _, limit_ms = settings.age_limit(slot.name)
            stamp_ns = slot.stamp_ns(source)
            skip = check_age(slot.title, stamp_ns, now_ns, limit_ms, settings.max_future_ms)
            if skip is not None:
                return skip
        stamps = {slot.title: slot.stamp_ns(source) for slot in self.inputs.cameras.values()}
        return check_skew(stamps, settings.max_skew_ms)

    def _act(
        self, observation: Observation, now_ns: int
    ) -> tuple[ActionChunk | None, Skip | None, Exception | None]:
        settings, interrupts = self.settings, self._interrupts
        self._state = observation.state
        try:
            chunk = self.policy.act(
                observation,
                tick=self._next_tick,
                seed=settings.seed,
                num_steps=settings.num_steps,
            )
        except Pi05Error as refusal:
            return None, Skip(_reason_of(refusal), '', str(refusal)), None
        except Exception as error:  # a broken device or model: counted here, handled by the caller
            detail = f'{type(error).__name__}: {first_line(error)}'
            return None, Skip(Reason.INFERENCE_FAILED, '', detail), error
        if self._interrupts != interrupts:
            # The robot holds by now; what was seen before that is no reason to move again.
            return None, _ESTOPPED if self.estopped else _TOO_LATE, None
        checked = self.guard.check(chunk, observation.state, now_ns, settings.period_ns)
        if isinstance(checked, Skip):
            return None, checked, None
        return checked, None, None

    def _count_missed(self, now_ns: int) -> None:
        """Count the periods that passed without a tick because the one before took too long.

        They are counted from the first tick on, not from the last: a tick that is only late, up
        to three quarters of a period, is followed by one in time, and none is missed.
        """
        last_ns, self._last_tick_ns = self._last_tick_ns, now_ns
        if last_ns is None or now_ns - last_ns > MAX_OVERRUN_NS:
            self._origin = (now_ns, self._next_tick)
            return
        period_ns = self.settings.period_ns
        origin_ns, origin_tick = self._origin
        due_tick = origin_tick + (now_ns - origin_ns + period_ns // 4) // period_ns
        missed = due_tick - self._next_tick
        if missed > 0:
            self.counters.ticks += missed
            self.counters.skips[Reason.OVERRUN] += missed
            self.recent.extend([False] * min(missed, self.recent.maxlen or 0))
            self._next_tick += missed

    def _record(self, result: TickResult) -> None:
        self._next_tick += 1
        self._jumped = False
        self.last = result
        self.counters.ticks += 1
        self.recent.append(result.chunk is not None)
        if result.skip is not None:
            self.counters.skips[result.skip.reason] += 1
            return
        self.counters.actions += 1
        self.action_rate.add(result.now_ns)
        for name, slot in self.inputs.cameras.items():
            if self._used_images.get(name) == slot.received:
                self.counters.reused_images += 1
            self._used_images[name] = slot.received


def _reason_of(refusal: Pi05Error) -> Reason:
    """Return the stable reason that the error carries; errors without one count as failures."""
    try:
        return Reason(getattr(refusal, 'reason', None))
    except ValueError:
        return Reason.INFERENCE_FAILED

"""Calls at a control rate, for ``pi05-ros bench --rate-hz``, and the GPU's clock and power.

Back to back, calls heat a GPU into its power limit; a robot's calls come once per tick, and in
between the GPU rests. Calls are rehearsed a moment before, as the node does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pi05_ros.control.gpu import GpuReading, NvmlMissing, open_nvml, read_gpu, uuid_of
from pi05_ros.engine.pipeline import Pipeline

from . import measure
from .measure import Inputs, Timing

_AHEAD_NS = 2_000_000  # as the node's rehearsal
_READINGS = 10
_CALLS_PER_READING = 10


@dataclass(frozen=True)
class GpuLoad:
    """A GPU under repeated calls: medians of readings, None for what it does not tell.

    The driver of some GPUs averages the power over a second. ``throttle_reasons`` are those of any
    reading, by NVML's names.
    """

    sm_clock_mhz: float | None
    lowest_sm_clock_mhz: float | None
    power_w: float | None
    power_limit_w: float | None
    throttle_reasons: list[str]


@dataclass(frozen=True)
class AtRate:
    """A case at a control rate, or why it was not measured there.

    Args:
        missed: slots that passed while the call before still ran, or that the host slept through.
    """

    rate_hz: float
    timing: Timing | None
    missed: int
    gpu: GpuLoad | None
    refused: str


class Slots:
    """Points in time at a fixed rate from now on.

    They are multiples of the period from one start, so that no delay shifts those that follow.

    Args:
        now_ns, sleep_s: the clock.
    """

    def __init__(
        self,
        rate_hz: float,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        sleep_s: Callable[[float], None] = time.sleep,
    ) -> None:
        self._period_ns = 1e9 / rate_hz
        self._now_ns, self._sleep_s = now_ns, sleep_s
        self._start_ns = now_ns()
        self._slot = 0
        self.missed = 0

    def wait(self, rehearse: Callable[[], object] = lambda: None) -> None:
        """Return at the next slot; one that has passed already is counted, and left out.

        It sleeps until about 2 ms before the slot, rehearses, and spins from there: how late the
        host wakes up is not measured. Behind a missed slot it only spins.
        """
        may_sleep = True
        while not self._wait_for_next(rehearse if may_sleep else None):
            self.missed += 1
            may_sleep = False  # where sleeps are long, none would ever end in time

    def _wait_for_next(self, rehearse: Callable[[], object] | None) -> bool:
        """Return whether the slot was still ahead, also after a sleep and a rehearsal."""
        self._slot += 1
        due_ns = self._start_ns + round(self._slot * self._period_ns)
        ahead_ns = due_ns - self._now_ns()
        if rehearse and ahead_ns > _AHEAD_NS:
            self._sleep_s((ahead_ns - _AHEAD_NS) * 1e-9)
            rehearse()
            ahead_ns = due_ns - self._now_ns()
        if ahead_ns < 0:
            return False
        while self._now_ns() < due_ns:
            pass
        return True


class GpuProbe:
    """Reads a GPU's clock and power through NVML.

    Attributes:
        fault: why nothing can be read, or ''.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self.fault = ''
        if device.type != 'cuda':
            self.fault = 'not a GPU'
            return
        uuid = uuid_of(str(device))
        try:
            self._nvml = open_nvml()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except NvmlMissing as error:
            self.fault = str(error)
        except self._nvml.NVMLError as error:
            self.fault = f'NVML does not know {uuid}: {error}'

    def load(self, call: Callable[[int], object], calls: int) -> GpuLoad | None:
        """Go on with calls that are not timed and read the GPU between them.

        Args:
            call: makes so many calls.
            calls: how many were timed; about as many are made here, at most 100.
        Returns:
            None if nothing can be read.
        """
        if self.fault:
            return None
        readings = []
        for _ in range(_READINGS):
            call(max(1, min(_CALLS_PER_READING, calls // _READINGS)))
            readings.append(read_gpu(self._nvml, self._handle))
        return summarise(readings)

    def close(self) -> None:
        """Let go of NVML; what was opened is counted there."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
        self._nvml = self._handle = None
        self.fault = 'closed'


def summarise(readings: list[GpuReading]) -> GpuLoad:
    """Return medians over readings; None where a reading lacks the figure."""
    clocks = [reading.sm_clock_mhz for reading in readings]
    lowest = [clock for clock in clocks if clock is not None]
    reasons = {name for reading in readings for name in reading.throttle_reasons}
    return GpuLoad(
        sm_clock_mhz=_median(clocks),
        lowest_sm_clock_mhz=min(lowest, default=None),
        power_w=_median([reading.power_mw for reading in readings], 1000),
        power_limit_w=_median([reading.power_limit_mw for reading in readings], 1000),
        throttle_reasons=sorted(reasons),
    )


def measure_at(
    rate_hz: float,
    pipeline: Pipeline,
    inputs: Inputs,
    steps: int,
    calls: int,
    back_to_back: Timing,
    probe: GpuProbe,
) -> AtRate:
    """Time calls that begin at a fixed rate, after a warm-up at that rate.

    A rate whose period is shorter than the median call back to back is refused: its calls would
    be back to back again, under another name.
    """
    period_ms, call_ms = 1e3 / rate_hz, back_to_back.p50_ms('total')
    if period_ms < call_ms:
        refused = f'the period, {period_ms:.3f} ms, is shorter than a call, {call_ms:.3f} ms (p50)'
        return AtRate(rate_hz, None, 0, None, refused)
    slots = Slots(rate_hz)

    def rehearse() -> None:
        pipeline.rehearse(inputs.images, inputs.tokens, inputs.noise, steps)

    def run(count: int) -> list[Any]:
        return measure.run_calls(pipeline, inputs, steps, count, lambda: slots.wait(rehearse))

    run(measure.warm_up_calls(calls))
    slots.missed = 0
    rows = run(calls)
    missed = slots.missed
    return AtRate(rate_hz, measure.percentiles(rows), missed, probe.load(run, calls), '')


def _median(values: list[int | None], unit: int = 1) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) / unit if len(known) == len(values) and known else None

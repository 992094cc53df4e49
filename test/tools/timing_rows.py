"""Made-up stage times whose sums are known."""

from __future__ import annotations

from typing import Any

from pi05_ros.tools.report import RunReport, TimingLog

TIMES_MS = {
    'h2d_ms': 0.4,
    'preprocess_ms': 2.0,
    'vision_ms': 16.0,
    'prefill_ms': 50.0,
    'denoise_ms': 30.0,
    'd2h_ms': 0.1,
    'total_ms': 100.0,
    'transport_ms': 4.0,
    'wait_ms': 15.0,
    'inputs_ms': 0.3,
    'publish_ms': 0.5,
    'tick_ms': 101.0,
    'sensor_to_action_ms': 120.0,
}


def timing(**changed_ms: float) -> dict[str, float]:
    """Return one tick: 100 ms, of which 1.5 ms are in no stage."""
    return {**TIMES_MS, **changed_ms}


def timing_log(ticks: int = 10, **changed_ms: float) -> TimingLog:
    """Return a log of equal ticks."""
    log = TimingLog()
    for _ in range(ticks):
        log.add(timing(**changed_ms))
    return log


def run_report(**changed: Any) -> RunReport:
    """Return a report of a flawless run of ten ticks."""
    fields: dict[str, Any] = {
        'subject': {'robot': 'franka', 'backend': 'eager', 'device': ''},
        'rate_hz': 5.0,
        'action_hz': 5.0,
        'ticks': 10,
        'actions': 10,
        'received': 10,
        'skips': {},
        'log': timing_log(),
    }
    return RunReport(**{**fields, **changed})

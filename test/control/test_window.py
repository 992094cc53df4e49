"""Percentiles and rates of the diagnostics."""

from __future__ import annotations

import math

import pytest

from pi05_ros.control.clock import STOPPED_AFTER_NS, ClockWatch
from pi05_ros.control.window import RATE_WINDOW_NS, RateMeter, Window

MS = 1_000_000


def test_percentiles_are_of_the_newest_values_only():
    window = Window(size=4)
    for value in (1000.0, 1.0, 2.0, 3.0, 4.0):
        window.add(value)
    assert (window.last, window.percentile(50), window.percentile(100)) == (4.0, 2.5, 4.0)


def test_unmeasured_values_are_left_out():
    window = Window()
    window.add(math.nan)
    assert len(window) == 0
    assert math.isnan(window.last)
    assert math.isnan(window.percentile(50))


def test_rate_counts_intervals():
    meter = RateMeter()
    for i in range(5):
        meter.add(i * 50 * MS)
    assert meter.rate_hz(200 * MS) == pytest.approx(20.0)


def test_rate_counts_what_came_between_two_looks():
    meter = RateMeter()
    meter.add(0, count=10)
    meter.add(100 * MS, count=13)
    assert meter.rate_hz(100 * MS) == pytest.approx(30.0)


def test_rate_falls_to_zero_when_nothing_comes():
    meter = RateMeter()
    meter.add(0)
    meter.add(50 * MS)
    assert meter.rate_hz(100 * MS) > 0
    assert meter.rate_hz(RATE_WINDOW_NS + 100 * MS) == 0.0


def test_one_event_has_no_rate():
    meter = RateMeter()
    assert meter.rate_hz(0) == 0.0
    meter.add(0)
    meter.add(0)
    assert meter.rate_hz(0) == 0.0


def test_clock_counts_as_stopped_only_after_a_while():
    watch = ClockWatch()
    assert not watch.is_stopped(5, 0)
    assert not watch.is_stopped(5, STOPPED_AFTER_NS)
    assert watch.is_stopped(5, STOPPED_AFTER_NS + 1)
    assert not watch.is_stopped(6, STOPPED_AFTER_NS + 2)

"""The watchdog fires once per stall, in a thread of its own, and never after it was stopped."""

from __future__ import annotations

import queue
import threading

from pi05_ros.control.watchdog import Watchdog

DEADLINE_S = 30.0


def test_a_stall_is_told_once_and_the_next_one_again():
    stalls: queue.Queue[str] = queue.Queue()
    dog = Watchdog(0.02, lambda: stalls.put(threading.current_thread().name))
    try:
        assert stalls.get(timeout=DEADLINE_S) == 'watchdog'
        assert stalls.empty()
        dog.feed()
        stalls.get(timeout=DEADLINE_S)
    finally:
        dog.stop()
    assert stalls.empty()


def test_a_watchdog_that_is_fed_is_silent():
    stalls: list[None] = []
    dog = Watchdog(3600.0, lambda: stalls.append(None))
    dog.feed()
    dog.stop()
    assert stalls == []


def test_stopping_waits_for_what_the_stall_does():
    began, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        go_on.wait(DEADLINE_S)
        done.set()

    dog = Watchdog(0.001, hold)
    assert began.wait(DEADLINE_S)
    threading.Timer(0.05, go_on.set).start()
    dog.stop()
    assert done.is_set()

"""The names under which the node reports on /diagnostics."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import rclpy
from helpers import Sensors, bench

from pi05_ros.ros import diagnostics
from pi05_ros.ros.diagnostics import DiagnosticsPublisher

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]


def test_diagnostics_of_an_unconfigured_node_list_every_part():
    with bench() as b:
        b.until(lambda: b.observer.diagnostics, send=False)
        names = [status.name for status in b.observer.diagnostics[-1].status]
        parts = ('Lifecycle', 'Inputs', 'Pipeline', 'Action', 'Model', 'GPU')
        assert names == [f'pi05_policy: {part}' for part in parts]
        assert {status.hardware_id for status in b.observer.diagnostics[-1].status} == {'none'}


def test_namespace_is_part_of_the_names():
    sensors = Sensors(namespace='left')
    with bench(sensors=sensors, namespace='left') as b:
        assert b.configure()
        b.until(lambda: b.observer.diagnostics)
        assert b.observer.diagnostics[-1].status[0].name == 'left/pi05_policy: Lifecycle'


class Rounds:
    """A publisher that nothing spins: the test fires its timer and tells the time."""

    def __init__(self) -> None:
        self.sent = 0
        self.now_s = 100.0
        self.node = rclpy.create_node('test_diagnostics')
        self.publisher = DiagnosticsPublisher(self.node, self._collect)

    def fire(self) -> int:
        """Fire the timer; return how many rounds were sent until now."""
        self.publisher._timer.callback()
        return self.sent

    def tick(self, period_s: float) -> int:
        self.publisher.tick_ended(period_s)
        return self.sent

    def _collect(self) -> list:
        self.sent += 1
        return []


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rounds]:
    made = Rounds()
    monkeypatch.setattr(diagnostics, 'time', SimpleNamespace(monotonic=lambda: made.now_s))
    yield made
    made.node.destroy_node()


def test_a_round_between_fast_ticks_waits_for_the_end_of_the_next(rounds: Rounds):
    assert rounds.tick(1 / 60) == 0
    assert rounds.fire() == 0
    assert rounds.tick(1 / 60) == 1
    assert rounds.tick(1 / 60) == 1


def test_a_round_whose_tick_does_not_come_is_sent_by_the_next_firing(rounds: Rounds):
    rounds.tick(1 / 60)
    assert rounds.fire() == 0
    assert rounds.fire() == 1
    rounds.now_s += 1.0
    assert rounds.fire() == 2


def test_a_round_between_slow_ticks_is_sent_at_once(rounds: Rounds):
    rounds.tick(1.0)
    assert rounds.fire() == 1

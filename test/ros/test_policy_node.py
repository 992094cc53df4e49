"""The node in one process with its sensors, over real DDS; a small policy stands for the model."""

from __future__ import annotations

import pytest
from helpers import TASK, bench

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]


def test_acts_on_the_newest_observation_of_every_input():
    with bench() as b:
        b.start()
        b.until(lambda: len(b.observer.chunks) >= 3)
        chunk = b.observer.chunks[-1]
        assert chunk.dry_run
        assert set(chunk.input_names) == {'base', 'wrist', 'joint_states'}
        assert chunk.prompt == TASK
        assert list(chunk.names)[0] == 'panda_joint1'
        assert chunk.actions[0] == pytest.approx(0.1)
        stamps = [t.sec * 10**9 + t.nanosec for t in chunk.input_stamps]
        assert chunk.header.stamp.sec * 10**9 + chunk.header.stamp.nanosec == min(stamps)

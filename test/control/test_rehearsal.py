"""A rehearsed tick acts as one that was not: nothing of the rehearsal counts or stays."""

from __future__ import annotations

import numpy as np
import pytest
from rig import Rig, ScriptedPolicy

from pi05_ros.policy.errors import PolicyError


def act(rig: Rig, rehearse: bool) -> None:
    """Let five ticks act on rising joints, each with a rehearsal around it where wanted."""
    for step in range(5):
        if rehearse:
            rig.core.rehearse(rig.now_ns)
        rig.policy.value = 0.25 + 0.01 * step
        rig.fresh_tick()
        if rehearse:
            rig.core.rehearse_answer()


def test_rehearsals_change_neither_counters_nor_actions():
    plain, rehearsed = Rig(), Rig()
    act(plain, rehearse=False)
    act(rehearsed, rehearse=True)
    assert rehearsed.core.counters == plain.core.counters
    assert rehearsed.policy.calls == plain.policy.calls
    assert rehearsed.core.guard.clips == plain.core.guard.clips
    assert rehearsed.core.last.chunk is not None
    np.testing.assert_array_equal(rehearsed.core.last.chunk.actions, plain.core.last.chunk.actions)


def test_the_policy_rehearses_with_the_inputs_of_the_next_tick():
    rig = Rig()
    rig.everything()
    rig.core.rehearse(rig.now_ns)
    rig.tick()
    (rehearsed,), (seen,) = rig.policy.rehearsed, rig.policy.seen
    np.testing.assert_array_equal(rehearsed.state, seen.state)
    assert rehearsed.images['base'] is seen.images['base']


def test_without_usable_inputs_nothing_is_rehearsed():
    rig = Rig()
    rig.core.rehearse(rig.now_ns)
    rig.everything()
    rig.core.estopped = True
    rig.core.rehearse(rig.now_ns)
    assert rig.policy.rehearsed == []
    assert rig.core.counters.ticks == 0


def test_a_refusal_is_left_for_the_tick_to_tell():
    class Refusing(ScriptedPolicy):
        def rehearse(self, observation, **call: object) -> None:
            raise PolicyError('prompt_too_long', 'of the rehearsal')

    rig = Rig(Refusing())
    rig.everything()
    rig.core.rehearse(rig.now_ns)
    assert rig.tick().chunk is not None


def test_an_answer_is_rehearsed_with_the_last_chunk_alone():
    rig = Rig()
    assert rig.core.rehearse_answer() is None
    chunk = rig.fresh_tick().chunk
    assert rig.core.rehearse_answer() is chunk
    rig.tick(after_ms=10_000)  # its inputs are stale
    assert rig.core.rehearse_answer() is None


@pytest.mark.parametrize('value', [3.5, np.nan])
def test_a_refused_action_is_no_reason_to_rehearse(value: float):
    rig = Rig(ScriptedPolicy(value=value))
    assert rig.fresh_tick().skip is not None
    assert rig.core.rehearse_answer() is None

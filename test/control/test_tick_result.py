"""What a tick tells of itself beside its actions, and of the one after it."""

from __future__ import annotations

import math

from rig import Rig


def test_age_of_the_oldest_input_is_its_transport_and_its_wait():
    rig = Rig()
    rig.image('base', age_ms=20)
    rig.image('wrist', age_ms=30)
    rig.joints(age_ms=5)
    result = rig.tick(after_ms=4)
    assert (result.transport_ms, result.wait_ms) == (1.0, 33.0)
    assert result.observation_age_ms == 34.0


def test_skipped_tick_has_no_times():
    result = Rig().tick()
    assert result.skip is not None
    assert math.isnan(result.transport_ms)
    assert math.isnan(result.wait_ms)


def test_the_tick_that_is_prepared_is_the_next_one():
    rig = Rig()
    for _ in range(3):
        rig.fresh_tick()
        rig.core.prepare()
    assert rig.policy.prepared[:-1] == [call[:2] for call in rig.policy.calls[1:]]
    rig.core.start()
    rig.core.prepare()
    rig.fresh_tick()
    assert rig.policy.prepared[-1] == rig.policy.calls[-1][:2]

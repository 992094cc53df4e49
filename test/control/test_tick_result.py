"""What a tick tells of itself beside its actions."""

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

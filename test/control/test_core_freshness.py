"""Which inputs are fresh enough to act on: age, skew and stamps from the future."""

from __future__ import annotations

from messages import image_cdr
from rig import MS, START_NS, Rig, gradient

from pi05_ros.control.reasons import Reason


def test_stale_image_is_named_with_age_and_limit():
    rig = Rig(max_image_age_ms=80.0)
    rig.image('base', age_ms=120)
    rig.image('wrist', age_ms=143)
    rig.joints()
    skip = rig.skip()
    assert skip.reason is Reason.STALE_INPUT
    assert skip.detail == 'base image 120 ms old > 80 ms'


def test_a_camera_may_have_a_limit_of_its_own():
    rig = Rig(**{'max_image_age_ms': 80.0, 'cameras.wrist.max_age_ms': 150.0})
    rig.image('base', age_ms=70)
    rig.image('wrist', age_ms=110)
    rig.joints()
    assert rig.tick().chunk is not None
    rig.image('wrist', age_ms=151)
    assert rig.skip().detail == 'wrist image 151 ms old > 150 ms'
    rig.image('wrist', age_ms=70)
    rig.image('base', age_ms=110)
    assert rig.skip().detail == 'base image 110 ms old > 80 ms'


def test_stale_joints_have_a_limit_of_their_own():
    rig = Rig(max_joint_age_ms=30.0)
    rig.image('base', age_ms=60)
    rig.image('wrist', age_ms=60)
    rig.joints(age_ms=31)
    assert rig.skip().detail == 'joint_states 31 ms old > 30 ms'


def test_skewed_cameras_are_refused():
    rig = Rig(max_skew_ms=20.0)
    rig.image('base', age_ms=10)
    rig.image('wrist', age_ms=40)
    rig.joints()
    skip = rig.skip()
    assert skip.reason is Reason.SKEWED_INPUTS
    assert skip.detail == 'wrist image is 30 ms older than base image > 20 ms'


def test_receive_time_ignores_a_wrong_camera_clock():
    rig = Rig(stamp_source='receive')
    rig.everything()
    wrong = image_cdr(gradient().tobytes(), 4, 6, stamp_ns=1_000_000)
    rig.core.push('wrist', wrong, START_NS - 3 * MS)
    result = rig.tick()
    assert result.chunk is not None
    assert result.chunk.stamps_ns['wrist'] == START_NS - 3 * MS


def test_stamp_from_the_future_is_refused():
    rig = Rig()
    rig.everything()
    rig.image('wrist', age_ms=-200)
    skip = rig.skip()
    assert skip.reason is Reason.FUTURE_STAMP
    assert skip.input_name == 'wrist image'


def test_image_is_used_again_within_its_age_and_counted():
    rig = Rig(max_image_age_ms=70.0)
    rig.everything()
    assert rig.tick().chunk is not None
    rig.now_ns += 50 * MS
    rig.joints()
    assert rig.tick().chunk is not None
    assert rig.core.counters.reused_images == 2
    rig.now_ns += 50 * MS
    rig.joints()
    assert rig.skip().reason is Reason.STALE_INPUT

"""Age and skew limits, at and around their edges."""

from __future__ import annotations

import pytest

from pi05_ros.control.gates import check_age, check_skew, skew_of
from pi05_ros.control.reasons import Reason

NOW_NS = 1_760_000_000_000_000_000
MS = 1_000_000


def age(age_ms: float, limit_ms: float = 80.0, future_ms: float = 20.0):
    return check_age('wrist image', NOW_NS - round(age_ms * MS), NOW_NS, limit_ms, future_ms)


@pytest.mark.parametrize('age_ms', [0.0, 79.9, 80.0, -20.0])
def test_fresh_inputs_pass_up_to_and_including_the_limit(age_ms):
    assert age(age_ms) is None


def test_old_input_is_named_with_its_age_and_limit():
    skip = age(143.2)
    assert skip is not None
    assert skip.reason is Reason.STALE_INPUT
    assert skip.input_name == 'wrist image'
    assert skip.detail == 'wrist image 143 ms old > 80 ms'
    assert str(skip) == 'stale_input: wrist image 143 ms old > 80 ms'


def test_stamp_from_the_future_is_refused():
    skip = age(-21.0)
    assert skip is not None
    assert skip.reason is Reason.FUTURE_STAMP
    assert skip.detail == 'wrist image stamped 21 ms in the future > 20 ms'


def test_missing_stamp_says_what_to_set():
    skip = check_age('wrist image', 0, NOW_NS, 80.0, 20.0)
    assert skip is not None
    assert skip.detail == 'wrist image has no stamp in its header; set stamp_source: receive'


def test_skew_blames_the_oldest_camera():
    stamps = {'base image': NOW_NS, 'wrist image': NOW_NS - 61 * MS, 'side image': NOW_NS - 5 * MS}
    skip = check_skew(stamps, 50.0)
    assert skip is not None
    assert skip.reason is Reason.SKEWED_INPUTS
    assert skip.input_name == 'wrist image'
    assert skip.detail == 'wrist image is 61 ms older than base image > 50 ms'
    assert check_skew(stamps, 61.0) is None


def test_a_single_camera_has_no_skew():
    assert check_skew({'base image': NOW_NS}, 0.0) is None
    assert check_skew({}, 0.0) is None
    assert skew_of({}) == 0.0

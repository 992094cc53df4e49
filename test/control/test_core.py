"""A tick acts on a complete, fresh observation, or names the input that kept it from acting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import image_cdr
from rig import JOINTS, MS, START_NS, TASK, Rig, ScriptedPolicy, gradient

from pi05_ros.control.core import MAX_OVERRUN_NS
from pi05_ros.control.reasons import Reason
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.policy.errors import PromptError


def test_complete_observation_reaches_the_policy_unchanged():
    rig = Rig()
    rig.image('base', image=gradient(start=1))
    rig.image('wrist', image=gradient(start=2))
    rig.joints(value=0.3)
    result = rig.tick()
    assert result.skip is None
    (observation,) = rig.policy.seen
    np.testing.assert_array_equal(observation.images['base'], gradient(start=1))
    np.testing.assert_array_equal(observation.images['wrist'], gradient(start=2))
    assert observation.state.tolist() == [0.3] * len(JOINTS)
    assert observation.prompt == TASK
    assert rig.policy.calls == [(0, 0, 10)]


def test_action_carries_the_stamp_of_the_oldest_input():
    rig = Rig()
    rig.image('base', age_ms=30)
    rig.image('wrist', age_ms=20)
    rig.joints(age_ms=5)
    result = rig.tick()
    assert result.chunk is not None
    assert result.chunk.stamp_ns == START_NS - 30 * MS
    assert result.observation_age_ms == 30.0


@pytest.mark.parametrize('absent', ['base', 'wrist', 'joint_states'])
def test_missing_input_is_named_with_its_topic_and_nothing_is_filled_in(absent):
    rig = Rig()
    if absent != 'base':
        rig.image('base')
    if absent != 'wrist':
        rig.image('wrist')
    if absent != 'joint_states':
        rig.joints()
    skip = rig.skip()
    assert skip.reason is Reason.MISSING_INPUT
    assert absent in skip.input_name
    assert absent in skip.detail
    assert rig.policy.seen == []


def test_empty_task_is_a_missing_input():
    rig = Rig(prompt='  ')
    rig.everything()
    skip = rig.skip()
    assert (skip.reason, skip.input_name) == (Reason.MISSING_INPUT, 'task_prompt')
    rig.task('stack the cups')
    assert rig.tick().chunk is not None
    assert rig.policy.seen[0].prompt == 'stack the cups'


def test_the_later_of_parameter_and_topic_is_the_task():
    rig = Rig()
    rig.task('from the topic')
    rig.fresh_tick()
    rig.core.update(replace(rig.settings, prompt='from the parameter'))
    rig.fresh_tick()
    rig.core.update(replace(rig.core.settings, num_steps=3))  # leaves the task alone
    rig.task('from the topic again')
    rig.core.update(replace(rig.core.settings, num_steps=4))
    rig.fresh_tick()
    assert [seen.prompt for seen in rig.policy.seen] == [
        'from the topic',
        'from the parameter',
        'from the topic again',
    ]
    assert rig.policy.calls[-1] == (2, 0, 4)


def test_malformed_message_is_a_reason_until_a_good_one_comes():
    rig = Rig()
    rig.everything()
    rig.core.push('wrist', b'\x00\x01\x00\x00\x01', START_NS)
    skip = rig.skip()
    assert skip.reason is Reason.MALFORMED_MESSAGE
    assert skip.detail.startswith('wrist image: the message ends')
    rig.image('wrist')
    assert rig.tick().chunk is not None


def test_wrong_encoding_is_named_with_the_camera():
    rig = Rig()
    rig.everything()
    stamp_ns = START_NS - MS
    raw = image_cdr(gradient().tobytes(), 4, 6, encoding='yuv422_yuy2', stamp_ns=stamp_ns)
    rig.core.push('base', raw, START_NS)
    skip = rig.skip()
    assert skip.reason is Reason.BAD_ENCODING
    assert skip.detail.startswith("base image: encoding 'yuv422_yuy2' is not one of rgb8")
    assert 'install cv_bridge' in skip.detail


def test_another_image_size_is_refused_once_sizes_are_fixed():
    rig = Rig()
    rig.everything()
    assert rig.inputs.fix_sizes() == {'base': (4, 6), 'wrist': (4, 6)}
    assert rig.tick().chunk is not None
    rig.now_ns += 50 * MS
    rig.everything()
    rig.image('wrist', image=gradient(6, 4))
    skip = rig.skip()
    assert skip.reason is Reason.BAD_IMAGE_SIZE
    assert skip.detail.startswith('wrist image: image is 6x4, configured for 4x6')


def test_unusable_image_that_grows_old_is_stale():
    rig = Rig()
    rig.everything()
    raw = image_cdr(b'', 4, 6, stamp_ns=START_NS)
    rig.core.push('wrist', raw, START_NS)
    assert rig.skip().reason is Reason.SHORT_BUFFER
    rig.now_ns += 300 * MS
    rig.image('base')
    rig.joints()
    assert rig.skip().detail == 'wrist image 300 ms old > 100 ms'


def test_missing_joint_is_named():
    rig = Rig()
    rig.everything()
    rig.joints(names=JOINTS[:3] + JOINTS[4:])
    skip = rig.skip()
    assert skip.reason is Reason.JOINT_MISSING
    assert 'lacks panda_joint4' in skip.detail


def test_joint_that_is_not_finite_is_refused():
    rig = Rig()
    rig.everything()
    rig.joints(value=float('nan'))
    assert rig.skip().reason is Reason.JOINT_NOT_FINITE


def test_refusal_of_the_policy_is_counted_by_its_own_reason():
    def refuse() -> None:
        raise PromptError('prompt_too_long', 'the prompt has 300 tokens')

    rig = Rig(ScriptedPolicy(refuse))
    rig.everything()
    skip = rig.skip()
    assert str(skip) == 'prompt_too_long: the prompt has 300 tokens'


def test_refusal_without_a_reason_counts_as_failed_inference():
    def refuse() -> None:
        raise BackendError('images do not fit')

    rig = Rig(ScriptedPolicy(refuse))
    rig.everything()
    result = rig.tick()
    assert result.skip is not None
    assert result.skip.reason is Reason.INFERENCE_FAILED
    assert result.error is None


def test_broken_policy_is_counted_and_handed_to_the_caller():
    def break_down() -> None:
        raise RuntimeError('CUDA error: unspecified launch failure')

    rig = Rig(ScriptedPolicy(break_down))
    rig.everything()
    result = rig.tick()
    assert isinstance(result.error, RuntimeError)
    assert str(result.skip) == (
        'inference_failed: RuntimeError: CUDA error: unspecified launch failure'
    )
    rig.assert_consistent()


def test_whole_chunk_is_refused_if_one_value_is_not_finite():
    rig = Rig(ScriptedPolicy(value=float('nan')))
    rig.everything()
    skip = rig.skip()
    assert skip.reason is Reason.ACTION_NOT_FINITE
    assert 'panda_joint1' in skip.detail


def test_periods_without_a_tick_are_counted_as_overruns():
    rig = Rig()
    rig.fresh_tick()
    rig.fresh_tick(after_ms=50)
    result = rig.fresh_tick(after_ms=160)  # two ticks are missing
    counters = rig.core.counters
    assert counters.skips == {Reason.OVERRUN: 2}
    assert (counters.ticks, counters.actions) == (5, 3)
    assert result.tick == 4
    rig.assert_consistent()


@pytest.mark.parametrize('jitter_ms', [-20.0, 20.0])
def test_jitter_below_half_a_period_is_no_overrun(jitter_ms):
    rig = Rig()
    rig.fresh_tick()
    rig.fresh_tick(after_ms=50 + jitter_ms)
    assert rig.core.counters.skips == {}


def test_late_tick_followed_by_one_in_time_misses_nothing():
    rig = Rig()
    for after_ms in (50, 50, 85, 15, 50, 50):
        rig.fresh_tick(after_ms)
    assert rig.core.counters.skips == {}
    assert rig.core.counters.ticks == 6


def test_ticks_of_twice_the_period_miss_every_second_one():
    rig = Rig()
    for _ in range(5):
        result = rig.fresh_tick(after_ms=100)
    assert rig.core.counters.skips == {Reason.OVERRUN: 4}
    assert result.tick == 8
    rig.assert_consistent()


def test_a_long_pause_of_the_clock_is_no_overrun():
    rig = Rig()
    rig.fresh_tick()
    rig.fresh_tick(after_ms=MAX_OVERRUN_NS / MS + 1)
    assert rig.core.counters.skips == {}


def test_clock_that_goes_back_drops_every_held_message():
    rig = Rig()
    rig.fresh_tick()
    skip = rig.skip(after_ms=-3000)
    assert skip.reason is Reason.CLOCK_JUMP_BACK
    assert rig.core.counters.clock_jumps == 1
    assert rig.skip(after_ms=50).reason is Reason.MISSING_INPUT
    assert rig.fresh_tick().chunk is not None


def test_tick_acts_at_once_if_inputs_of_the_new_time_are_there():
    rig = Rig()
    rig.fresh_tick()
    assert rig.fresh_tick(after_ms=-3000).chunk is not None
    assert rig.core.counters.clock_jumps == 1
    rig.assert_consistent()


def test_start_counts_from_zero_and_repeats_the_noise():
    rig = Rig(seed=7)
    rig.fresh_tick()
    rig.fresh_tick()
    rig.core.start()
    rig.fresh_tick()
    assert rig.policy.calls == [(0, 7, 10), (1, 7, 10), (0, 7, 10)]
    assert rig.core.counters.ticks == 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(['base', 'wrist', 'joint_states', 'task_prompt']),
            st.binary(max_size=120),
            st.integers(-200, 400),
        ),
        max_size=6,
    )
)
def test_no_bytes_make_a_tick_raise(messages):
    rig = Rig()
    rig.everything()
    for name, body, after_ms in messages:
        rig.core.push(name, b'\x00\x01\x00\x00' + body, rig.now_ns)
        result = rig.tick(after_ms)
        assert (result.chunk is None) != (result.skip is None)
        rig.assert_consistent()


def test_health_follows_the_last_second():
    rig = Rig(rate_hz=4.0)
    assert rig.core.health == 0
    rig.tick()
    assert rig.core.health == 2
    rig.fresh_tick(250)
    assert rig.core.health == 1
    for _ in range(3):
        rig.fresh_tick(250)
    assert rig.core.health == 0


def test_reason_names_are_stable():
    """They are grepped for in logs and diagnostics, and counted in reports."""
    assert [str(reason) for reason in Reason] == [
        'missing_input',
        'stale_input',
        'future_stamp',
        'skewed_inputs',
        'malformed_message',
        'bad_encoding',
        'bad_step',
        'short_buffer',
        'bad_image_size',
        'undecodable_image',
        'joint_missing',
        'joint_not_finite',
        'prompt_too_long',
        'clock_jump_back',
        'inference_failed',
        'action_not_finite',
        'action_jump',
        'action_too_fast',
        'action_too_late',
        'estop',
        'overrun',
    ]

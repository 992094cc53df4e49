"""The diagnostics as golden text: names, order, units and decimals are part of the interface."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import pytest
from rig import MS, START_NS, TIMES, Rig

from pi05_ros.control import status
from pi05_ros.control.statistics import TickStatistics
from pi05_ros.control.status import ERROR, OK, WARN, LifecycleView, OutputView, Status

BACKENDS = {'vision': 'tensorrt', 'prefill': 'cuda', 'denoise': 'cuda'}
OUTPUT = OutputView('/commands', listeners=1, limits_from='urdf')
LOST = {'base': 0, 'wrist': 3, 'joint_states': None}


def assert_text(found: Status, expected: str) -> None:
    assert found.text() == textwrap.dedent(expected).strip('\n')


def acting_rig() -> tuple[Rig, TickStatistics]:
    rig = Rig()
    statistics = TickStatistics()
    rig.inputs.cameras['base'].size_px = (4, 6)
    for tick in range(3):
        result = rig.fresh_tick()
        assert result.chunk is not None
        statistics.record(result.chunk, tick_ms=11.0 + tick, sensor_to_action_ms=21.0 + tick)
    return rig, statistics


def test_lifecycle_text():
    view = LifecycleView('inactive', '', '', 'system', environment={'ROS_DOMAIN_ID': '7'})
    assert_text(
        status.lifecycle_status(view),
        """
        [OK] Lifecycle: inactive
          state: inactive
          last error: none
          clock: system
          ROS_DOMAIN_ID: 7
        """,
    )


@pytest.mark.parametrize(
    ('view', 'level', 'message'),
    [
        (LifecycleView('active', '', ''), OK, 'active'),
        (
            LifecycleView('configuring', 'loading the model', ''),
            WARN,
            'configuring: loading the model',
        ),
        (
            LifecycleView('unconfigured', '', 'configure: no checkpoint'),
            ERROR,
            'unconfigured; configure: no checkpoint',
        ),
        (
            LifecycleView('active', '', '', 'simulated', clock_stopped=True),
            WARN,
            'active, but the ROS clock stands still: nothing ticks',
        ),
        (LifecycleView('inactive', '', '', 'simulated', clock_stopped=True), OK, 'inactive'),
    ],
)
def test_lifecycle_levels(view, level, message):
    found = status.lifecycle_status(view)
    assert (found.level, found.message) == (level, message)


def test_inputs_text():
    rig, _ = acting_rig()
    assert_text(
        status.inputs_status(rig.inputs, rig.settings, rig.now_ns, LOST, {}, 'direct'),
        """
        [OK] Inputs: all inputs fresh
          base age (ms): 10.0
          base rate (Hz): 20.0
          base lost: 0
          base encoding: rgb8
          base size (px): 6x4
          wrist age (ms): 10.0
          wrist rate (Hz): 20.0
          wrist lost: 3
          wrist encoding: rgb8
          wrist size (px): n/a
          joint_states age (ms): 5.0
          joint_states rate (Hz): 20.0
          joint_states lost: n/a
          camera skew (ms): 0.0
          task from: parameter
          image take: direct
        """,
    )


def test_inputs_have_the_same_keys_before_anything_came():
    rig, _ = acting_rig()
    full = status.inputs_status(rig.inputs, rig.settings, rig.now_ns, LOST, {}, 'direct')
    empty = status.inputs_status(Rig().inputs, rig.settings, START_NS, {}, {}, 'direct')
    assert [key for key, _ in empty.values] == [key for key, _ in full.values]
    assert empty.level == ERROR
    assert empty.message == (
        'no base image (on camera/base/image_raw), wrist image (on camera/wrist/image_raw), '
        'joint_states (on joint_states)'
    )


def test_inputs_name_everything_that_is_wrong_worst_first():
    rig, _ = acting_rig()
    rig.image('base', age_ms=150)
    rig.joints(names=['panda_joint1'])
    rig.tick()
    rig.core.inputs.observation('header')
    found = status.inputs_status(
        rig.inputs, rig.settings, rig.now_ns, LOST, {'wrist': '/cam offers best_effort'}, 'direct'
    )
    assert found.level == ERROR
    first, second, third = found.message.split('; ', 2)
    assert first == '/cam offers best_effort'
    assert second.startswith('joint_states: lacks panda_joint2')
    assert third.endswith('base image 150 ms old > 100 ms')


def test_images_taken_the_slow_way_are_a_warning():
    rig, _ = acting_rig()
    found = status.inputs_status(
        rig.inputs, rig.settings, rig.now_ns, LOST, {}, 'rclpy: rcl is not to be had'
    )
    assert found.level == WARN
    assert found.message == 'images are taken the slow way, through rclpy: rcl is not to be had'


def test_missing_task_is_a_warning():
    rig = Rig(prompt='')
    rig.everything()
    found = status.inputs_status(rig.inputs, rig.settings, rig.now_ns, LOST, {}, 'direct')
    assert (found.level, found.message[:7]) == (WARN, 'no task')


def test_stamp_from_the_future_is_a_warning():
    rig, _ = acting_rig()
    rig.image('wrist', age_ms=-10_000)
    found = status.inputs_status(rig.inputs, rig.settings, rig.now_ns, LOST, {}, 'direct')
    assert found.level == WARN
    assert found.message == 'wrist image stamped 10000 ms in the future > 50 ms'


def test_cameras_apart_are_a_warning():
    rig, _ = acting_rig()
    rig.image('wrist', age_ms=80)
    found = status.inputs_status(rig.inputs, rig.settings, rig.now_ns, LOST, {}, 'direct')
    assert found.level == WARN
    assert found.message == 'wrist image is 70 ms older than base image > 50 ms'


def test_pipeline_text():
    _, statistics = acting_rig()
    assert_text(
        status.pipeline_status(statistics, Rig().settings, BACKENDS, 'cuda:0'),
        """
        [OK] Pipeline: tick 12.0 ms of 50.0 ms; backend tensorrt/cuda
          backend asked: auto
          vision backend: tensorrt
          prefill backend: cuda
          denoise backend: cuda
          h2d last (ms): n/a
          h2d p50 (ms): n/a
          h2d p95 (ms): n/a
          preprocess last (ms): 0.50
          preprocess p50 (ms): 0.50
          preprocess p95 (ms): 0.50
          vision last (ms): 2.00
          vision p50 (ms): 2.00
          vision p95 (ms): 2.00
          prefill last (ms): 3.00
          prefill p50 (ms): 3.00
          prefill p95 (ms): 3.00
          denoise last (ms): 4.00
          denoise p50 (ms): 4.00
          denoise p95 (ms): 4.00
          d2h last (ms): n/a
          d2h p50 (ms): n/a
          d2h p95 (ms): n/a
          total last (ms): 9.50
          total p50 (ms): 9.50
          total p95 (ms): 9.50
          tick last (ms): 13.00
          tick p50 (ms): 12.00
          tick p95 (ms): 12.90
        """,
    )


@pytest.mark.parametrize(
    ('tick_ms', 'level', 'begin'),
    [
        ([40.0] * 200, OK, 'tick 40.0 ms of 50.0 ms'),
        ([40.0] * 196 + [60.0] * 4, WARN, '1 % of the ticks take longer than the period: tick 40'),
        ([60.0] * 200, ERROR, 'ticks take longer than the period: tick 60.0 ms of 50.0 ms'),
    ],
    ids=['in time', 'p99 too long', 'p50 too long'],
)
def test_pipeline_level_compares_ticks_with_the_period(tick_ms, level, begin):
    rig = Rig()
    chunk = rig.fresh_tick().chunk
    assert chunk is not None
    assert chunk.times is TIMES
    statistics = TickStatistics()
    for value in tick_ms:
        statistics.record(chunk, value, value)
    found = status.pipeline_status(statistics, rig.settings, BACKENDS, 'cuda:0')
    assert found.level == level
    assert found.message.startswith(begin)


@pytest.mark.parametrize(
    ('backend', 'device', 'level'),
    [('auto', 'cuda:0', WARN), ('auto', 'cpu', OK), ('eager', 'cuda:0', OK)],
)
def test_a_gpu_that_auto_leaves_to_the_slow_backend_is_a_warning(backend, device, level):
    eager = dict.fromkeys(BACKENDS, 'eager')
    found = status.pipeline_status(TickStatistics(), Rig(backend=backend).settings, eager, device)
    assert found.level == level
    assert ('though there is a GPU' in found.message) == (level == WARN)


def test_action_text():
    rig, statistics = acting_rig()
    assert_text(
        status.action_status(rig.core, statistics, OUTPUT, True, rig.now_ns),
        """
        [OK] Action: dry run on /commands
          Target frequency (Hz): 20.0
          Actual frequency (Hz): 20.0
          sensor to action last (ms): 23.00
          sensor to action p50 (ms): 22.00
          sensor to action p95 (ms): 22.90
          sensor to action p99 (ms): 22.98
          ticks: 3
          actions: 3
          skipped: 0
          skipped by reason: none
          reused images: 0
          clock jumps: 0
          clipped by joint: panda_finger_joint1=3, panda_joint4=3
          limits from: urdf
          watchdog trips: 0
          emergency stop: off
          topic: /commands
          dry run: true
        """,
    )


def test_action_says_what_keeps_ticks_from_acting():
    rig, statistics = acting_rig()
    rig.now_ns += 200 * MS
    rig.tick()
    found = status.action_status(rig.core, statistics, OUTPUT, True, rig.now_ns)
    assert found.level == WARN
    assert found.message == (
        '3 of the last 7 ticks acted; stale_input: base image 210 ms old > 100 ms'
    )
    assert dict(found.values)['skipped by reason'] == 'overrun=3, stale_input=1'


def test_action_is_an_error_when_no_tick_acts():
    rig, statistics = acting_rig()
    rig.core.start()
    rig.inputs.clear()
    rig.tick()
    found = status.action_status(rig.core, statistics, OUTPUT, True, rig.now_ns)
    assert found.level == ERROR
    assert found.message.startswith('0 of the last 1 ticks acted; missing_input: no base image')


@pytest.mark.parametrize(
    ('is_active', 'expected'),
    [(True, (WARN, 'no ticks: the ROS clock stands still')), (False, (OK, 'not active'))],
)
def test_action_does_not_speak_of_past_ticks_when_the_clock_stands_still(is_active, expected):
    rig, statistics = acting_rig()
    found = status.action_status(
        rig.core, statistics, OUTPUT, is_active, rig.now_ns, clock_stopped=True
    )
    assert (found.level, found.message) == expected


@pytest.mark.parametrize(
    ('dry_run', 'listeners', 'level', 'message'),
    [
        (False, 1, OK, 'acting on /commands'),
        (False, 0, WARN, 'acting on /commands; nobody subscribes to /commands'),
        (True, 0, OK, 'dry run on /commands'),
    ],
)
def test_commands_that_nobody_hears_are_a_warning(dry_run, listeners, level, message):
    rig = Rig(dry_run=dry_run)
    rig.fresh_tick()
    found = status.action_status(
        rig.core, TickStatistics(), replace(OUTPUT, listeners=listeners), True, rig.now_ns
    )
    assert (found.level, found.message) == (level, message)


def test_action_is_quiet_while_not_active():
    rig, statistics = acting_rig()
    rig.core.start()
    found = status.action_status(rig.core, statistics, OUTPUT, False, rig.now_ns)
    assert (found.level, found.message) == (OK, 'not active')


def test_model_text():
    facts = {'checkpoint': '/ckpt', 'vision_backend': 'cuda', 'device': 'cpu', 'num_steps': '10'}
    assert_text(
        status.model_status(facts, Rig(num_steps=3, seed=5).settings, 'stack'),
        """
        [OK] Model: /ckpt
          checkpoint: /ckpt
          device: cpu
          num_steps: 3
          seed: 5
          task: stack
        """,
    )


def test_parts_of_an_unconfigured_node_are_listed_all_the_same():
    assert_text(status.not_configured('Inputs'), '[OK] Inputs: not configured')
    assert status.CONFIGURED_PARTS == ('Inputs', 'Pipeline', 'Action', 'Model', 'GPU')

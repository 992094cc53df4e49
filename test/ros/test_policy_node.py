"""The node in one process with its sensors, over real DDS; a small policy stands for the model."""

from __future__ import annotations

import gc
import re
import time
import weakref

import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from helpers import TASK, Bench, CameraScript, Sensors, SmallPolicy, bench
from lifecycle_msgs.msg import Transition
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String

from pi05_ros.control.loading import load
from pi05_ros.policy.errors import PromptError
from pi05_ros.policy.robot import load_robot
from pi05_ros.policy.types import Observation
from pi05_ros.tools.random_checkpoint import make_checkpoint

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE
BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


def skips_with(b: Bench, reason: str) -> bool:
    """Tell whether the counters name the reason; the counters are always consistent."""
    counts = b.observer.counts()
    if not counts:
        return False
    by_reason = {name: n for name, n in counts.items() if name not in ('ticks', 'actions')}
    assert counts['ticks'] == counts['actions'] + by_reason.pop('skipped')
    return by_reason.get(reason, 0) > 0


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


def test_a_long_tick_is_followed_by_one_with_the_newest_image():
    """The executor serves timers before subscriptions: a cached image would be an old one."""
    ages_ms: list[float] = []

    def look(observation: Observation) -> None:
        ages_ms.append((time.time_ns() - observation.oldest_stamp_ns) / 1e6)
        time.sleep(0.12)

    policy = SmallPolicy(load_robot('franka'), look)
    with bench(policy, {'rate_hz': 20.0, 'max_image_age_ms': 1000.0}) as b:
        assert b.configure()
        with b.sensors.streaming():
            assert b.node.trigger_activate() == SUCCESS
            ages_ms.clear()
            b.until(lambda: len(ages_ms) >= 8, send=False)
    # A cached image would be one inference old; the newest one is at most some periods of 20 ms.
    assert sorted(ages_ms)[len(ages_ms) // 2] < 100


def test_configure_activate_deactivate_cleanup_twice_frees_everything():
    policies: list[SmallPolicy] = []
    with bench() as b:

        def load(settings: object, sizes: object) -> SmallPolicy:
            policies.append(SmallPolicy(load_robot('franka')))
            return policies[-1]

        b.node._load_policy = load
        idle = entities(b)
        for _ in range(2):
            b.start()
            seen = len(b.observer.chunks)
            b.until(lambda seen=seen: len(b.observer.chunks) > seen)
            assert b.node.trigger_deactivate() == SUCCESS
            assert b.node.trigger_cleanup() == SUCCESS
            assert b.node.lifecycle_state == 'unconfigured'
            assert policies[-1].closed
            assert entities(b) == idle
        gone = [weakref.ref(policy) for policy in policies]
        policies.clear()
        gc.collect()
        assert [ref() for ref in gone] == [None, None]


def entities(b: Bench) -> dict[str, int]:
    """Count what a node has of each kind."""
    kinds = ('publishers', 'subscriptions', 'timers', 'waitables')
    return {kind: len(list(getattr(b.node, kind))) for kind in kinds}


def test_ticks_are_numbered_from_zero_after_every_activation():
    with bench() as b:
        b.start()
        b.until(lambda: len(b.observer.chunks) >= 2)
        assert b.node.trigger_deactivate() == SUCCESS
        b.until(lambda: b.observer.message('Lifecycle') == 'inactive', send=False)
        b.observer.chunks.clear()
        assert b.node.trigger_activate() == SUCCESS
        b.until(lambda: b.observer.chunks)
        assert b.observer.chunks[0].tick <= 2


def test_nothing_is_published_while_inactive():
    with bench() as b:
        assert b.configure()
        b.until(lambda: b.observer.message('Inputs') == 'all inputs fresh')
        b.until(lambda: b.observer.message('Action') == 'not active')
        assert b.observer.chunks == []


def test_camera_that_never_comes_is_named_with_its_topic():
    sensors = Sensors()
    sensors.destroy_publisher(sensors.image_publishers['wrist'])
    sensors.cameras['wrist'].running = False
    with bench(parameters={'input_timeout_s': 0.5}, sensors=sensors) as b:
        assert not b.configure()
        error = b.node.last_error
        assert error.startswith(
            'configure: nothing came in 0.5 s of wrist image: nobody publishes'
        )
        assert '/camera/wrist/image_raw' in error
        assert b.node.lifecycle_state == 'unconfigured'
        b.until(lambda: 'nobody publishes' in b.observer.message('Lifecycle'), send=False)
        assert b.observer.status('Lifecycle').level == DiagnosticStatus.ERROR


def test_camera_that_comes_late_is_waited_for():
    sensors = Sensors()
    sensors.cameras['wrist'].running = False
    with bench(parameters={'input_timeout_s': 15.0}, sensors=sensors) as b:
        polled: list[int] = []
        before = b.node._report_progress

        def wrist_comes(what: str) -> None:
            polled.append(1)
            if what.startswith('waiting'):
                sensors.cameras['wrist'].running = True
            before(what)

        b.node._report_progress = wrist_comes
        assert b.configure()
        assert polled


def test_reliable_subscription_to_a_best_effort_camera_says_what_to_set():
    sensors = Sensors(qos=BEST_EFFORT)
    parameters = {'cameras.wrist.reliability': 'reliable', 'input_timeout_s': 1.0}
    with bench(parameters=parameters, sensors=sensors) as b:
        assert not b.configure()
        assert (
            '/test_sensors publishes /camera/wrist/image_raw with other QoS' in b.node.last_error
        )
        assert 'set cameras.wrist.reliability: best_effort' in b.node.last_error


def test_camera_that_changes_to_other_qos_shows_in_the_diagnostics():
    with bench(parameters={'cameras.wrist.reliability': 'reliable'}) as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        sensors = b.sensors
        sensors.destroy_publisher(sensors.image_publishers['wrist'])
        sensors.image_publishers['wrist'] = sensors.create_publisher(
            sensors.image_publishers['base'].msg_type, 'camera/wrist/image_raw', BEST_EFFORT
        )
        b.until(lambda: 'reliability: best_effort' in b.observer.message('Inputs'))
        assert b.observer.status('Inputs').level == DiagnosticStatus.ERROR
        b.until(lambda: skips_with(b, 'skewed_inputs') or skips_with(b, 'stale_input'))


@pytest.mark.parametrize(
    ('script', 'match'),
    [
        (CameraScript(encoding='yuv422_yuy2', channels=2), 'wrist image: encoding .yuv422_yuy2.'),
        (CameraScript(step=0), 'wrist image: step 0 is shorter than a row of 32 rgb8 pixels'),
        (CameraScript(cut_bytes=5), 'wrist image: buffer has 2299 bytes'),
    ],
    ids=['encoding', 'step', 'buffer'],
)
def test_unusable_camera_is_refused_at_configure(script, match):
    sensors = Sensors(cameras={'base': CameraScript(), 'wrist': script})
    with bench(parameters={'input_timeout_s': 0.5}, sensors=sensors) as b:
        assert not b.configure()
        assert re.search(match, b.node.last_error)


def test_missing_joint_is_refused_at_configure():
    sensors = Sensors()
    sensors.joints = tuple(name for name in sensors.joints if name != 'panda_joint4')
    with bench(parameters={'input_timeout_s': 0.5}, sensors=sensors) as b:
        assert not b.configure()
        assert 'joint_states: lacks panda_joint4; it has panda_joint1' in b.node.last_error


def test_faults_while_active_are_counted_by_name_and_recovered_from():
    with bench(parameters={'max_image_age_ms': 300.0, 'max_skew_ms': 60.0}) as b:
        b.start()
        wrist = b.sensors.cameras['wrist']

        def recovered() -> bool:
            count = len(b.observer.chunks)
            b.until(lambda: len(b.observer.chunks) > count)
            return True

        assert recovered()
        wrist.running = False
        b.until(lambda: skips_with(b, 'skewed_inputs') or skips_with(b, 'stale_input'))
        wrist.running = True
        assert recovered()
        wrist.lag_ns = 100_000_000
        b.until(lambda: skips_with(b, 'skewed_inputs'))
        wrist.lag_ns = 0
        assert recovered()
        wrist.size_px = (24, 40)
        b.until(lambda: skips_with(b, 'bad_image_size'))
        assert 'wrist image: image is 24x40, configured for 24x32' in b.observer.message('Action')
        wrist.size_px = (24, 32)
        assert recovered()
        wrist.encoding = '16UC1'
        b.until(lambda: skips_with(b, 'bad_encoding'))
        wrist.encoding = 'rgb8'
        assert recovered()
        b.sensors.joints = b.sensors.joints[1:]
        b.until(lambda: skips_with(b, 'joint_missing'))
        b.sensors.joints = ('panda_joint1', *b.sensors.joints)
        assert recovered()
        b.sensors.joint_position = float('nan')
        b.until(lambda: skips_with(b, 'joint_not_finite'))


def test_stale_joints_are_named_with_age_and_limit():
    with bench(parameters={'max_joint_age_ms': 80.0}) as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        b.sensors.joints_running = False
        b.until(lambda: skips_with(b, 'stale_input'))
        b.until(lambda: 'stale_input: joint_states' in b.observer.message('Action'))
        assert b.observer.message('Action').endswith('ms old > 80 ms')


def test_latched_task_from_before_the_node_came_replaces_the_parameter():
    sensors = Sensors()
    sensors.say_task('stack the cups')
    with bench(sensors=sensors) as b:
        b.start()
        b.until(lambda: b.observer.chunks and b.observer.chunks[-1].prompt == 'stack the cups')
        result = b.node.set_parameters([Parameter('prompt', value='wipe the table')])
        assert result[0].successful
        b.until(lambda: b.observer.chunks[-1].prompt == 'wipe the table')
        sensors.say_task('open the drawer')
        b.until(lambda: b.observer.chunks[-1].prompt == 'open the drawer')
        b.until(lambda: b.observer.values('Inputs').get('task from') == 'topic')


def test_task_that_is_not_latched_says_how_to_publish_it():
    with bench() as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        publisher = b.sensors.create_publisher(String, 'task_prompt', 1)
        b.until(lambda: '--qos-durability transient_local' in b.observer.message('Inputs'))
        assert b.observer.status('Inputs').level == DiagnosticStatus.ERROR
        b.sensors.destroy_publisher(publisher)
        b.until(lambda: b.observer.message('Inputs') == 'all inputs fresh')


def test_without_a_task_nothing_is_published_until_one_comes():
    with bench(parameters={'prompt': ''}) as b:
        b.start()
        b.until(lambda: skips_with(b, 'missing_input'))
        assert b.observer.chunks == []
        assert 'no task: parameter prompt is empty' in b.observer.message('Action')
        b.sensors.say_task()
        b.until(lambda: b.observer.chunks)


def test_refusal_of_the_policy_is_a_counted_skip():
    def refuse(observation: Observation) -> None:
        if observation.prompt == 'too long':
            raise PromptError('prompt_too_long', 'the prompt has 300 tokens, limit 200')

    with bench(SmallPolicy(load_robot('franka'), refuse)) as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        b.sensors.say_task('too long')
        b.until(lambda: skips_with(b, 'prompt_too_long'))
        assert b.node.lifecycle_state == 'active'


def test_broken_policy_frees_everything_and_the_node_can_be_configured_again():
    broken = False

    def break_down(observation: Observation) -> None:
        if broken:
            raise RuntimeError('CUDA error: invalid argument')

    policy = SmallPolicy(load_robot('franka'), break_down)
    with bench(policy) as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        broken = True
        b.until(lambda: b.node.lifecycle_state == 'unconfigured')
        assert policy.closed
        assert b.node.last_error == 'act: RuntimeError: CUDA error: invalid argument'
        b.until(lambda: 'CUDA error' in b.observer.message('Lifecycle'))
        broken = False
        b.start()


def test_middleware_that_fails_in_a_tick_ends_the_active_state():
    with bench() as b:
        b.start()
        b.until(lambda: b.observer.chunks)

        def fail() -> None:
            raise RuntimeError('cannot publish')

        b.node._session.tick = fail
        b.until(lambda: b.node.lifecycle_state == 'unconfigured')
        assert b.node.last_error == 'act: RuntimeError: cannot publish'


def test_real_policy_is_freed_by_cleanup(tmp_path):
    make_checkpoint('tiny', tmp_path / 'tiny', seed=0)
    with bench(parameters={'checkpoint': str(tmp_path / 'tiny')}, load_policy=load) as b:
        for _ in range(2):
            b.start()
            seen = len(b.observer.chunks)
            b.until(lambda seen=seen: len(b.observer.chunks) > seen)
            gone = weakref.ref(b.node._session.running.policy.pipeline)
            assert b.node.trigger_deactivate() == SUCCESS
            assert b.node.trigger_cleanup() == SUCCESS
            assert gone() is None


def test_exception_in_a_transition_is_reported_and_leaves_the_node_usable():
    """rclpy swallows it without a word."""
    with bench() as b:
        load = b.node._load_policy

        def fail(settings: object, sizes: object) -> SmallPolicy:
            raise KeyError('no such tensor')

        b.node._load_policy = fail
        assert not b.configure()
        assert b.node.last_error == "configure: KeyError: 'no such tensor'"
        assert b.node.lifecycle_state == 'unconfigured'
        b.node._load_policy = load
        assert b.configure()
        assert b.node.last_error == ''


def test_loading_is_announced_before_the_node_blocks():
    with bench() as b:
        assert b.configure()
        b.until(lambda: b.observer.message('Lifecycle') == 'inactive')
        said = [
            status.message
            for message in b.observer.diagnostics
            for status in message.status
            if status.name == 'pi05_policy: Lifecycle'
        ]
        assert 'configuring: loading the model' in said
        assert 'configuring: warming up' in said


def test_transitions_work_through_the_services():
    with bench() as b:
        with b.sensors.streaming():
            assert b.change_state(Transition.TRANSITION_CONFIGURE)
        assert b.change_state(Transition.TRANSITION_ACTIVATE)
        b.until(lambda: b.observer.chunks)
        assert b.change_state(Transition.TRANSITION_DEACTIVATE)
        assert b.change_state(Transition.TRANSITION_CLEANUP)
        assert b.node.lifecycle_state == 'unconfigured'

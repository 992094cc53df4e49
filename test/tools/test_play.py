"""The real command in another process, with real topics in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rclpy
from bag_files import LIBERO_BAG, UNKNOWN_TYPE, header_cdr, string_cdr, write_bag
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from pi05_ros.tools.bag import open_bag
from pi05_ros.tools.play import find_message_class
from pi05_ros.tools.playback import read_stamp, with_stamp

pytestmark = pytest.mark.ros

DEADLINE_S = 30
LATCHED = QoSProfile(
    depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL, reliability=ReliabilityPolicy.RELIABLE
)


def play_command(*arguments: object) -> list[str]:
    return [sys.executable, '-m', 'pi05_ros.tools.cli', 'play', *map(str, arguments)]


@pytest.fixture(autouse=True)
def _own_machine_only(monkeypatch):
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')


@pytest.fixture
def playing() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start ``pi05-ros play`` with the given arguments; ended after the test."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object) -> subprocess.Popen:
        process = subprocess.Popen(
            play_command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Listener:
    """Raw messages of some topics, collected until a condition holds."""

    def __init__(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node('listener', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.raw: dict[str, list[bytes]] = {}
        self.received_ns: dict[str, list[int]] = {}

    def subscribe(self, msg_class: type, topic: str, qos: QoSProfile | int) -> None:
        self.raw[topic] = []
        self.received_ns[topic] = []

        def keep(raw: bytes) -> None:
            self.raw[topic].append(raw)
            self.received_ns[topic].append(time.time_ns())

        self.node.create_subscription(msg_class, topic, keep, qos, raw=True)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, {t: len(r) for t, r in self.raw.items()}
            self.executor.spin_once(timeout_sec=0.1)

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


def recorded(topic: str) -> list[bytes]:
    with open_bag(LIBERO_BAG) as bag:
        return [message.raw for message in bag.messages([topic])]


def without_stamp(raw: bytes) -> bytes:
    return with_stamp(raw, 0)


def test_bytes_arrive_unchanged_with_kept_stamps(playing, listener):
    topic = '/camera/base/image_raw'
    listener.subscribe(Image, topic, 10)
    playing(LIBERO_BAG, '--loop', '--keep-stamps', '--topics', topic)
    listener.wait_for(lambda: len(listener.raw[topic]) >= 10)
    assert set(listener.raw[topic]) <= set(recorded(topic))


def test_only_the_stamp_changes_and_it_is_now_even_across_the_end_of_a_loop(playing, listener):
    topic = '/joint_states'
    listener.subscribe(JointState, topic, 100)
    playing(LIBERO_BAG, '--loop', '--rate', 5, '--topics', 'joint_states')
    listener.wait_for(lambda: len(listener.raw[topic]) > 400)
    raw = listener.raw[topic]
    stamps = [read_stamp(message) for message in raw]
    assert {without_stamp(m) for m in raw} <= {without_stamp(m) for m in recorded(topic)}
    assert all(b > a for a, b in zip(stamps, stamps[1:], strict=False))
    ages_ns = [
        received_ns - stamp_ns
        for received_ns, stamp_ns in zip(listener.received_ns[topic], stamps, strict=True)
    ]
    # Minutes against the years that lie between the recording and now.
    assert max(map(abs, ages_ns)) < DEADLINE_S * 1_000_000_000


def test_clock_runs_in_bag_time_and_jumps_back_while_stamps_stay(playing, listener):
    listener.subscribe(Clock, '/clock', qos_profile_sensor_data)
    listener.subscribe(JointState, '/joint_states', 100)
    playing(LIBERO_BAG, '--loop', '--clock', 200, '--rate', 5, '--topics', '/joint_states')

    def jumped_back() -> bool:
        times = [read_stamp(raw) for raw in listener.raw['/clock']]
        return any(b < a for a, b in zip(times, times[1:], strict=False))

    listener.wait_for(lambda: jumped_back() and bool(listener.raw['/joint_states']))
    with open_bag(LIBERO_BAG) as bag:
        first_ns, last_ns = bag.start_ns, bag.start_ns + bag.duration_ns
    for raw in listener.raw['/clock']:
        assert first_ns <= read_stamp(raw) <= last_ns
    assert set(listener.raw['/joint_states']) <= set(recorded('/joint_states'))


def test_prompt_is_latched_and_reaches_a_late_subscriber(playing, listener, tmp_path):
    rows = [
        ('/task_prompt', 'std_msgs/msg/String', 0, string_cdr('stack the cups')),
        ('/eef_pose', 'geometry_msgs/msg/PoseStamped', 60 * 10**9, header_cdr(1)),
    ]
    process = playing(write_bag(tmp_path / 'bag', rows))
    listener.subscribe(JointState, '/joint_states', 1)
    listener.wait_for(lambda: listener.node.count_publishers('/task_prompt') == 1)
    listener.subscribe(String, '/task_prompt', LATCHED)
    listener.wait_for(lambda: bool(listener.raw['/task_prompt']))
    assert b'stack the cups' in listener.raw['/task_prompt'][0]
    assert process.poll() is None


def test_remapping_works_as_for_every_node(playing, listener):
    listener.subscribe(JointState, '/left/joint_states', 100)
    playing(
        LIBERO_BAG, '--loop', '--topics', '/joint_states',
        '--ros-args', '-r', '/joint_states:=/left/joint_states',
    )  # fmt: skip
    listener.wait_for(lambda: len(listener.raw['/left/joint_states']) > 3)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['SIGINT', 'SIGTERM'])
def test_a_signal_ends_it_with_the_counts_and_exit_code_0(playing, listener, number):
    listener.subscribe(JointState, '/joint_states', 100)
    process = playing(LIBERO_BAG, '--loop', '--topics', '/joint_states')
    listener.wait_for(lambda: len(listener.raw['/joint_states']) > 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert '/joint_states' in output
    assert 'Traceback' not in output


def run_play(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'COLUMNS': '200'}
    return subprocess.run(
        play_command(*arguments),
        capture_output=True,
        text=True,
        env=environment,
        timeout=DEADLINE_S,
        check=False,
    )


def test_every_message_of_a_whole_pass_is_counted():
    result = run_play(LIBERO_BAG, '--rate', 20, '--topics', '/joint_states', '/task_prompt')
    assert result.returncode == 0, result.stderr
    counts = [line.split()[:3] for line in result.stdout.splitlines() if '_msgs/msg/' in line]
    assert counts == [
        ['/joint_states', 'sensor_msgs/msg/JointState', '300'],
        ['/task_prompt', 'std_msgs/msg/String', '1'],
    ]


def bag_with_unknown_type(tmp_path: Path) -> Path:
    rows = [
        ('/known', 'std_msgs/msg/String', 0, string_cdr('hello')),
        ('/secret', UNKNOWN_TYPE, 10, b'\x00\x01\x00\x00\x07\x00\x00\x00'),
    ]
    return write_bag(tmp_path / 'bag', rows)


def test_a_type_that_is_not_installed_is_listed_and_skipped(tmp_path):
    result = run_play(bag_with_unknown_type(tmp_path))
    assert result.returncode == 0
    assert f'WARN 1 topic skipped, type not installed: /secret ({UNKNOWN_TYPE})' in result.stdout


def test_a_type_that_is_not_installed_is_an_error_when_asked_for(tmp_path):
    result = run_play(bag_with_unknown_type(tmp_path), '--topics', '/secret')
    assert result.returncode == 2
    assert f'message type not installed for /secret ({UNKNOWN_TYPE})' in result.stderr


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [
        (['/no/such/bag'], 'does not exist'),
        ([__file__], 'cannot be read as a bag'),
        ([Path(__file__).parent], 'not a rosbag2 directory'),
        ([LIBERO_BAG, '--topics', '/nope'], 'has no topic /nope; it has /camera/base/image_raw'),
        ([LIBERO_BAG, '--rate', '0'], 'not a positive number'),
        ([LIBERO_BAG, '--rate', '-1'], 'not a positive number'),
        ([LIBERO_BAG, '--clock', 'nan'], 'not a positive number'),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, complaint):
    result = run_play(*arguments)
    assert result.returncode == 2
    assert complaint in result.stderr.splitlines()[-1]
    assert 'Traceback' not in result.stderr


def test_message_classes_are_found_by_name():
    assert find_message_class('sensor_msgs/msg/Image') is Image
    for unknown in (UNKNOWN_TYPE, 'sensor_msgs/msg/Nothing', 'sensor_msgs/srv/SetCameraInfo', ''):
        assert find_message_class(unknown) is None

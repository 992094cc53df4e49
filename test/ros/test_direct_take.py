"""Images straight from the middleware into memory of ours, beside rclpy's own take."""

from __future__ import annotations

import ctypes
import time
import weakref

import numpy as np
import pytest
import rclpy
from helpers import CameraScript, SmallPolicy, bench, image_message
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image

from pi05_ros.control.parameters import settings_from_values
from pi05_ros.control.topics import input_topics
from pi05_ros.policy.robot import load_robot
from pi05_ros.policy.types import Observation
from pi05_ros.ros import direct_take, take_check
from pi05_ros.ros.direct_take import DirectTake, DirectTakeError, Rcl, RclpyTake
from pi05_ros.ros.subscriptions import InputSubscriptions, PolledGroup
from pi05_ros.ros.take_check import checked_rcl

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

QOS = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)
DEADLINE_S = 10.0


class Link:
    """A camera and two subscriptions to it, one for each way to take."""

    def __init__(self, node: Node) -> None:
        group = PolledGroup()
        self.publisher = node.create_publisher(Image, 'image', QOS)
        self.subscriptions = [
            node.create_subscription(
                Image, 'image', lambda message: None, QOS, callback_group=group, raw=True
            )
            for _ in range(2)
        ]

    def send(self, value: int, size_px: tuple[int, int] = (24, 32)) -> bytes:
        camera = CameraScript(size_px=size_px, value=value)
        raw = serialize_message(image_message(camera, time.time_ns()))
        self.publisher.publish(raw)
        return raw

    def take(self, take: DirectTake | RclpyTake) -> direct_take.Taken:
        """Wait for the message; each way has a subscription of its own."""
        subscription = self.subscriptions[isinstance(take, DirectTake)]
        deadline = time.monotonic() + DEADLINE_S
        while (taken := take.newest(subscription)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return taken


class Memory:
    """Allocates, and remembers what it gave."""

    def __init__(self) -> None:
        self.given: list[np.ndarray] = []

    def __call__(self, num_bytes: int) -> np.ndarray:
        self.given.append(np.zeros(num_bytes, dtype=np.uint8))
        return self.given[-1]

    def holds(self, message: object) -> bool:
        view = np.asarray(message)
        return any(np.shares_memory(view, memory) for memory in self.given)


@pytest.fixture
def node(ros):
    node = rclpy.create_node('test_direct_take')
    yield node
    node.destroy_node()


@pytest.fixture
def link(node):
    return Link(node)


def test_it_brings_what_rclpy_brings_into_the_given_memory(node, link):
    memory = Memory()
    direct = DirectTake(Rcl(), memory, 10_000)
    for value in range(4):
        sent = link.send(value)
        found, info = link.take(direct)
        expected, expected_info = link.take(RclpyTake())
        assert bytes(found) == expected == sent
        assert found.readonly and memory.holds(found)
        for key in ('source_timestamp', 'publication_sequence_number'):
            assert info[key] == expected_info[key]
        assert info['publication_sequence_number'] == value + 1
        assert 0 <= info['received_timestamp'] - info['source_timestamp'] < 60e9
    assert [info['publisher_gid']] == publisher_gids(node)
    assert len(memory.given) == 2


def publisher_gids(node: Node) -> list[bytes]:
    """Return the id of every publisher, as the graph has it."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := node.get_publishers_info_by_topic('/image')):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [bytes(info.endpoint_gid) for info in found]


def test_without_a_message_there_is_none(link):
    direct = DirectTake(Rcl(), Memory(), 100)
    assert direct.newest(link.subscriptions[1]) is None


def test_a_message_stays_until_the_one_after_the_next(link):
    direct = DirectTake(Rcl(), Memory(), 10_000)
    first_sent = link.send(1)
    first, _ = link.take(direct)
    assert direct.newest(link.subscriptions[1]) is None
    second_sent = link.send(2)
    second, _ = link.take(direct)
    assert (bytes(first), bytes(second)) == (first_sent, second_sent)
    third_sent = link.send(3)
    third, _ = link.take(direct)
    assert (bytes(second), bytes(third)) == (second_sent, third_sent)
    assert bytes(first) == third_sent


def test_a_longer_message_grows_the_buffer_and_leaves_the_one_before(link):
    memory = Memory()
    direct = DirectTake(Rcl(), memory, 3000)
    small_sent = link.send(1, (20, 30))
    small, _ = link.take(direct)
    large_sent = link.send(2, (200, 300))
    large, _ = link.take(direct)
    assert len(memory.given) == 3
    assert memory.given[2].nbytes >= len(large_sent)
    assert (bytes(small), bytes(large)) == (small_sent, large_sent)
    assert memory.holds(large)
    sent = link.send(3, (20, 30))
    found, _ = link.take(direct)
    assert bytes(found) == sent
    assert len(memory.given) == 3


def test_memory_that_is_not_to_be_had_is_an_error_and_the_next_take_works(link):
    memory = Memory()

    def limited(num_bytes: int) -> np.ndarray:
        if num_bytes > 20_000:
            raise MemoryError('no more page-locked memory')
        return memory(num_bytes)

    direct = DirectTake(Rcl(), limited, 10_000)
    link.send(1, (200, 300))
    with pytest.raises(DirectTakeError, match='rcl cannot take an image: error') as caught:
        link.take(direct)
    assert isinstance(caught.value.__cause__, MemoryError)
    sent = link.send(2)
    found, _ = link.take(direct)
    assert bytes(found) == sent


def test_buffers_are_freed_with_the_last_view_of_them(link):
    memory = Memory()
    direct = DirectTake(Rcl(), memory, 10_000)
    sent = link.send(1)
    message, _ = link.take(direct)
    alive = [weakref.ref(given) for given in memory.given]
    memory.given.clear()
    del direct
    assert sorted(ref() is None for ref in alive) == [False, True]
    assert bytes(message) == sent
    del message
    assert all(ref() is None for ref in alive)


def test_the_trial_passes_here_and_leaves_nothing_behind(node):
    before = [len(list(node.subscriptions)), len(list(node.publishers))]
    assert isinstance(checked_rcl(node), Rcl)
    assert [len(list(node.subscriptions)), len(list(node.publishers))] == before


class ShortInfo(ctypes.Structure):
    """As if rcl's info had become longer by the last two fields."""

    _fields_ = direct_take._MessageInfo._fields_[:-2]
    as_dict = direct_take._MessageInfo.as_dict
    gid = bytes(16)


class ShortGuardedInfo(ctypes.Structure):
    _fields_ = [('info', ShortInfo), ('guard', ctypes.c_char * 64)]


class SwappedInfo(direct_take._MessageInfo):
    def as_dict(self):
        found = super().as_dict()
        return found | {'source_timestamp': found['publication_sequence_number']}


class SwappedGuardedInfo(ctypes.Structure):
    _fields_ = [('info', SwappedInfo), ('guard', ctypes.c_char * 64)]


class ForeignInfo(direct_take._MessageInfo):
    def as_dict(self):
        return super().as_dict() | {'publisher_gid': bytes(16)}


class ForeignGuardedInfo(ctypes.Structure):
    _fields_ = [('info', ForeignInfo), ('guard', ctypes.c_char * 64)]


@pytest.mark.parametrize(
    ('info', 'match'),
    [
        (ShortGuardedInfo, 'a message info of another size than expected'),
        (SwappedGuardedInfo, 'source_timestamp is 1, rclpy has'),
        (ForeignGuardedInfo, 'publisher_gid is (empty|0000.*, which rclpy does not have)'),
    ],
    ids=['longer', 'swapped', 'foreign'],
)
def test_an_info_of_another_layout_fails_the_trial(node, monkeypatch, info, match):
    monkeypatch.setattr(direct_take, '_GuardedInfo', info)
    with pytest.raises(DirectTakeError, match=match):
        checked_rcl(node)


def test_other_bytes_fail_the_trial(node, monkeypatch):
    right = direct_take.TakeBuffer.message
    monkeypatch.setattr(direct_take.TakeBuffer, 'message', lambda self: right(self)[1:])
    with pytest.raises(DirectTakeError, match='came as another'):
        checked_rcl(node)


def test_the_trial_ends_when_nothing_comes(node, monkeypatch):
    monkeypatch.setattr(DirectTake, 'newest', lambda self, subscription: None)
    with pytest.raises(DirectTakeError, match='a message to ourselves did not arrive'):
        checked_rcl(node, timeout_s=0.05)


def test_a_failure_of_the_middleware_fails_the_trial(node, monkeypatch):
    def fail(message: Image) -> bytes:
        raise RuntimeError('no type support')

    monkeypatch.setattr(take_check, 'serialize_message', fail)
    with pytest.raises(DirectTakeError, match='the trial failed: RuntimeError: no type support'):
        checked_rcl(node)


class Watcher:
    """A policy that lends memory, and tells where the images that it was shown lie."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.direct: list[bool] = []
        self.values: list[set[int]] = []
        self.policy = SmallPolicy(load_robot('franka'), self._look)
        self.policy.image_buffer = self.memory

    def _look(self, observation: Observation) -> None:
        images = observation.images.values()
        self.direct.append(all(self.memory.holds(image) for image in images))
        self.values.append({int(value) for image in images for value in np.unique(image)})


def test_the_node_takes_images_directly_and_says_so():
    watcher = Watcher()
    with bench(watcher.policy) as b:
        b.start()
        b.until(lambda: len(watcher.direct) > 6 and all(watcher.direct[-3:]))
        b.until(lambda: b.observer.values('Inputs').get('image take') == 'direct')
        for camera in b.sensors.cameras.values():
            camera.value = 7
        b.until(lambda: watcher.values[-1] == {7})
        assert watcher.direct[-1]
        assert len(watcher.memory.given) == 4


def test_an_image_that_grew_is_refused_and_the_next_small_one_acts_again():
    watcher = Watcher()
    with bench(watcher.policy) as b:
        b.start()
        wrist = b.sensors.cameras['wrist']
        wrist.size_px = (240, 320)
        b.until(lambda: b.observer.counts().get('bad_image_size', 0) > 2)
        assert len(watcher.memory.given) == 6
        wrist.size_px = (24, 32)
        seen = len(watcher.direct)
        b.until(lambda: len(watcher.direct) > seen + 2)
        assert watcher.direct[-1]


def test_without_rcl_the_node_takes_through_rclpy_and_says_why(monkeypatch, capfd):
    def absent(name: str, mode: int) -> object:
        raise OSError(f'{name}: cannot open shared object file')

    monkeypatch.setattr(direct_take.ctypes, 'PyDLL', absent)
    watcher = Watcher()
    with bench(watcher.policy) as b:
        b.start()
        b.until(lambda: len(watcher.direct) > 6)
        assert not any(watcher.direct)
        why = 'rclpy: rcl is not to be had: librcl.so: cannot open shared object file'
        b.until(lambda: b.observer.values('Inputs').get('image take') == why)
    assert watcher.memory.given == []
    assert 'images are taken through rclpy' in capfd.readouterr().err


def test_only_raw_images_are_taken_directly(node):
    values = {'checkpoint': 'none', 'cameras.wrist.transport': 'compressed'}
    robot = load_robot('franka')
    topics = input_topics(robot, settings_from_values(values, robot.camera_names))
    memory = Memory()
    feeds = InputSubscriptions(node, topics, lambda *message: None)
    feeds.take_directly(Rcl(), memory)
    assert len(memory.given) == 2
    assert feeds.has_raw_images()
    only_compressed = tuple(topic for topic in topics if topic.name != 'base')
    assert not InputSubscriptions(node, only_compressed, lambda *message: None).has_raw_images()


def test_joint_states_stay_immutable_bytes():
    with bench(SmallPolicy(load_robot('franka'))) as b:
        b.start()
        b.until(lambda: len(b.observer.chunks) > 2)
        inputs = b.node._session._inputs
        assert isinstance(inputs.joints.raw, bytes)
        assert all(isinstance(slot.raw, memoryview) for slot in inputs.cameras.values())

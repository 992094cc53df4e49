"""A recording through real topics under simulated time gives the actions of its replay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import rclpy
from helpers import LATCHED, Observer, Spinner
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.serialization import serialize_message
from rosbags.rosbag2 import Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosgraph_msgs.msg import Clock

from pi05_ros.policy_node import PolicyNode
from pi05_ros.resources import demo_bag, share_dir
from pi05_ros.ros.subscriptions import MESSAGE_TYPES
from pi05_ros.tools.bag import BagMessage, open_bag
from pi05_ros.tools.cli import main
from pi05_ros.tools.random_checkpoint import make_checkpoint
from pi05_ros.tools.recomputer import CHUNK_TYPE
from pi05_ros.tools.remapping import Remapping
from pi05_ros.tools.replayer import Replay, Setup

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

SUCCESS = TransitionCallbackReturn.SUCCESS


class BagSensors(Node):
    """Publishes recorded bytes and /clock, when the test says so."""

    def __init__(self, types: dict[str, str]) -> None:
        super().__init__('test_bag_sensors')
        self._channels = {
            topic: self.create_publisher(
                MESSAGE_TYPES[name], topic, LATCHED if topic == '/task_prompt' else 10
            )
            for topic, name in types.items()
        }
        self._clock = self.create_publisher(Clock, '/clock', 10)

    def send(self, message: BagMessage) -> None:
        self._channels[message.topic].publish(message.raw)

    def tell_time(self, now_ns: int) -> None:
        message = Clock()
        message.clock.sec, message.clock.nanosec = divmod(now_ns, 10**9)
        self._clock.publish(message)


class Live:
    """The real node, fed tick by tick."""

    def __init__(self, node: PolicyNode, sensors: BagSensors, observer: Observer) -> None:
        self.node = node
        self.sensors = sensors
        self.observer = observer
        self.spinner = Spinner(sensors, observer, node)

    def until(self, predicate) -> None:
        self.spinner.until(predicate, send=False)

    def set_clock(self, now_ns: int) -> None:
        def arrived() -> bool:
            self.sensors.tell_time(now_ns)
            return self.node.get_clock().now().nanoseconds == now_ns

        self.until(arrived)

    def configure(self, messages: list[BagMessage]) -> None:
        """Send the first messages again and again until the node has all of them."""
        done = threading.Event()

        def stream() -> None:
            while not done.wait(0.05):
                for message in messages:
                    self.sensors.send(message)

        thread = threading.Thread(target=stream)
        thread.start()
        try:
            assert self.node.trigger_configure() == SUCCESS, self.node.last_error
        finally:
            done.set()
            thread.join()

    def deliver(self, messages: list[BagMessage]) -> None:
        """Send messages; return when the node holds the newest of every input."""
        newest = {message.topic: message for message in messages}
        for message in messages:
            self.sensors.send(message)
        session = self.node._session
        assert session is not None
        feeds, inputs = session._feeds.by_name, session._inputs

        def arrived() -> bool:
            session._feeds.poll()
            return all(
                inputs.sensors[name].raw == newest[feed.resolved_topic].raw
                for name, feed in feeds.items()
                if name in inputs.sensors and feed.resolved_topic in newest
            )

        self.until(arrived)

    def tick(self, now_ns: int) -> None:
        """Let the clock reach a tick; return when its chunk has arrived."""
        count = len(self.observer.chunks)
        self.set_clock(now_ns)
        self.until(lambda: len(self.observer.chunks) > count)


@contextmanager
def live(parameters: dict[str, object], types: dict[str, str]) -> Iterator[Live]:
    overrides = [Parameter(name, value=value) for name, value in parameters.items()]
    node = PolicyNode(parameter_overrides=overrides)
    sensors = BagSensors(types)
    made = Live(node, sensors, Observer(rclpy.create_node('test_observer')).listen())
    try:
        yield made
    finally:
        node.close()
        made.spinner.close()


def record(path: Path, types: dict[str, str], rows: list[tuple[str, int, bytes]]) -> Path:
    """Write (topic, receive stamp, bytes) rows as a recorder would."""
    typestore = get_typestore(Stores.ROS2_KILTED)
    definition = (share_dir() / 'msg' / 'ActionChunk.msg').read_text()
    typestore.register(get_types_from_msg(definition, CHUNK_TYPE))
    with Writer(path, version=9) as writer:
        channels = {
            topic: writer.add_connection(topic, name, typestore=typestore)
            for topic, name in types.items()
        }
        for topic, receive_ns, raw in sorted(rows, key=lambda row: row[1]):
            writer.write(channels[topic], receive_ns, raw)
    return path


def test_live_node_under_simulated_time_does_what_the_replay_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_checkpoint('tiny', tmp_path / 'tiny', seed=0)
    parameters = {
        'checkpoint': str(tmp_path / 'tiny'), 'rate_hz': 10.0, 'num_steps': 2, 'seed': 3,
        'precision': 'float32', 'backend': 'eager', 'device': 'cpu',
    }  # fmt: skip
    replay = Replay(Setup(None, parameters).settings(), Remapping())
    with open_bag(demo_bag()) as bag:
        replay.run(bag)
        types = {name: bag.topics[name].msgtype for name in replay.topics}
        messages = list(bag.messages(types))
    ticks = [result.now_ns for result in replay.results][:12]
    first = next(i for i, m in enumerate(messages) if m.topic == '/camera/wrist/image_raw')

    with live({**parameters, 'use_sim_time': True}, types) as node:
        node.set_clock(ticks[0] - replay.settings.period_ns)
        node.configure(messages[: first + 1])
        assert node.node.trigger_activate() == SUCCESS
        sent = first + 1
        for now_ns in ticks:
            due = [m for m in messages[sent:] if m.receive_ns <= now_ns]
            node.deliver(due)
            sent += len(due)
            node.tick(now_ns)
        chunks = node.observer.chunks

    expected = [result.chunk for result in replay.results[: len(ticks)]]
    assert [chunk.tick for chunk in chunks] == [chunk.tick for chunk in expected]
    for found, wanted in zip(chunks, expected, strict=True):
        assert np.asarray(found.actions, np.float32).tobytes() == wanted.actions.tobytes()
        stamps = [stamp.sec * 10**9 + stamp.nanosec for stamp in found.input_stamps]
        assert dict(zip(found.input_names, stamps, strict=True)) == dict(wanted.stamps_ns)

    topic = '/pi05_policy/dry_run/action_chunk'
    rows = [(m.topic, m.receive_ns, m.raw) for m in messages]
    rows += [
        (topic, now_ns + 1, serialize_message(chunk))
        for now_ns, chunk in zip(ticks, chunks, strict=True)
    ]
    recorded = record(tmp_path / 'recorded', {**types, topic: CHUNK_TYPE}, rows)
    assert main(['recompute', str(recorded), '--checkpoint', parameters['checkpoint']]) == 0
    assert f'{len(ticks)} identical bit for bit, 0 different' in capsys.readouterr().out

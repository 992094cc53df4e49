"""Ticks follow the ROS clock, also a simulated one that jumps back; diagnostics do not stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers import Bench, SmallPolicy, bench
from rclpy.executors import Executor
from rclpy.lifecycle import TransitionCallbackReturn
from rosgraph_msgs.msg import Clock

from pi05_ros.policy.robot import load_robot

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

MS = 1_000_000
START_NS = 1_760_000_000_000_000_000


class SimulatedTime:
    """Drives /clock and the sensors step by step; nothing moves by itself."""

    def __init__(self, b: Bench) -> None:
        self._bench = b
        self._publisher = b.observer.node.create_publisher(Clock, '/clock', 10)
        self.now_ns = START_NS

    def set(self, now_ns: int) -> None:
        """Publish a time and wait until the node has it."""
        self.now_ns = now_ns
        message = Clock()
        message.clock.sec, message.clock.nanosec = divmod(now_ns, 1_000_000_000)
        node = self._bench.node

        def arrived() -> bool:
            self._publisher.publish(message)
            return node.get_clock().now().nanoseconds == now_ns

        self._bench.until(arrived, send=False)

    def step(self, by_ms: int) -> None:
        """Send what the sensors see, then let time pass."""
        self._bench.sensors.send(self.now_ns)
        self.set(self.now_ns + by_ms * MS)

    def run(self, steps: int, by_ms: int = 10) -> None:
        for _ in range(steps):
            self.step(by_ms)


@contextmanager
def simulated() -> Iterator[tuple[Bench, SimulatedTime]]:
    policy = SmallPolicy(load_robot('franka'))
    with bench(policy, {'use_sim_time': True, 'rate_hz': 10.0}) as b:
        time = SimulatedTime(b)
        time.set(START_NS)
        b.sensors.send = lambda now_ns=None, send=b.sensors.send: send(now_ns or time.now_ns)
        b.start()
        yield b, time


def test_ticks_step_with_the_clock_of_a_bag():
    with simulated() as (b, time):
        time.run(steps=100)  # one simulated second, however long it takes
        b.until(lambda: b.observer.counts().get('ticks', 0) >= 10, send=False)
        assert b.observer.counts()['ticks'] in (10, 11)
        stamps = [c.header.stamp.sec * 10**9 + c.header.stamp.nanosec for c in b.observer.chunks]
        assert all(START_NS <= stamp <= time.now_ns for stamp in stamps)
        ages = [time.now_ns - stamp for stamp in stamps]
        assert ages == sorted(ages, reverse=True)


def test_ticks_of_a_simulated_clock_are_not_rehearsed():
    with simulated() as (b, time):
        time.run(steps=30)
        b.until(lambda: len(b.observer.chunks) > 0, send=False)
        assert b.node._rehearsal_timer is None
        assert b.node._session.running.policy.rehearsed == []


def test_clock_that_stops_stops_the_ticks_but_not_the_diagnostics():
    with simulated() as (b, time):
        time.run(steps=30)
        ticks = b.observer.counts
        b.until(
            lambda: 'the ROS clock stands still' in b.observer.message('Lifecycle'), send=False
        )
        assert b.observer.message('Action') == 'no ticks: the ROS clock stands still'
        before = ticks()['ticks']
        seen = len(b.observer.diagnostics)
        b.until(lambda: len(b.observer.diagnostics) > seen, send=False)
        assert ticks()['ticks'] == before
        assert b.observer.values('Lifecycle')['clock'] == 'simulated'


def test_activation_without_any_clock_names_the_clock():
    with bench(SmallPolicy(load_robot('franka')), {'use_sim_time': True}) as b:
        assert b.configure(), b.node.last_error
        assert b.node.trigger_activate() != TransitionCallbackReturn.SUCCESS
        assert 'nothing comes on /clock' in b.node.last_error


def test_bag_that_starts_again_is_followed():
    with simulated() as (b, time):
        time.run(steps=50)
        b.until(lambda: b.observer.chunks, send=False)
        b.observer.chunks.clear()
        time.set(START_NS)
        time.run(steps=50)
        b.until(lambda: b.observer.chunks, send=False)
        b.until(lambda: b.observer.values('Action').get('clock jumps') == '1', send=False)
        newest = b.observer.chunks[-1].header.stamp
        assert START_NS <= newest.sec * 10**9 + newest.nanosec <= time.now_ns
        counts = b.observer.counts()
        assert counts['ticks'] == counts['actions'] + counts['skipped']


def make_events_executor() -> Executor:
    experimental = pytest.importorskip('rclpy.experimental')
    return experimental.EventsExecutor()


def test_executor_that_calls_callbacks_gives_the_node_the_same_inputs():
    """The events executor ignores callback groups; its callbacks fill the same slots."""
    policy = SmallPolicy(load_robot('franka'))
    with bench(policy) as b:
        b.executor.shutdown()
        b.executor = make_events_executor()
        for member in (b.node, b.sensors, b.observer.node):
            b.executor.add_node(member)
        b.start()
        b.sensors.joint_position = 0.7
        b.until(lambda: policy.seen[-1].state[0] == 0.7)
        b.sensors.cameras['wrist'].value = 9
        b.until(lambda: policy.seen[-1].images['wrist'][0, 0, 0] == 9)
        how = 'rclpy: the executor takes them, and does not heed callback groups'
        b.until(lambda: b.observer.values('Inputs').get('image take') == how)
        # The rate counts what came between two ticks, too: more than the 20 Hz of the ticks.
        b.until(lambda: float(b.observer.values('Inputs').get('base rate (Hz)', 'nan')) > 22)

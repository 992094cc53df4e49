"""Hold, watchdog, emergency stop and refusal to activate, over real DDS."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import rclpy
from helpers import DEADLINE_S, Bench, SmallPolicy, bench
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.time import Time
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.policy.robot import load_robot

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

SUCCESS = TransitionCallbackReturn.SUCCESS
LIVE = {'action_interface': 'forward_command', 'dry_run': False}
# The finger's command: the small policy repeats the measured 0.1 m, which is clipped.
FINGER = 0.04


def commands_of(b: Bench) -> list[list[float]]:
    commands: list[list[float]] = []
    b.observer.node.create_subscription(
        Float64MultiArray, 'commands', lambda message: commands.append(list(message.data)), 10
    )
    return commands


def trigger(b: Bench, name: str) -> Trigger.Response:
    client = b.observer.node.create_client(Trigger, f'pi05_policy/{name}')
    b.until(client.service_is_ready)
    future = client.call_async(Trigger.Request())
    b.until(future.done)
    return future.result()


def is_hold(command: list[float], position: float) -> bool:
    """Joint 4 tells: an action is clipped to its limits there, a hold is the measured position."""
    return command[3] == pytest.approx(position) and command[7] == pytest.approx(FINGER)


def test_hold_is_the_last_command_on_deactivate():
    with bench(parameters=LIVE) as b:
        commands = commands_of(b)
        b.start()
        b.until(lambda: len(commands) >= 2)
        assert not is_hold(commands[-1], 0.1)
        assert b.node.trigger_deactivate() == SUCCESS
        b.until(lambda: is_hold(commands[-1], 0.1), send=False)
        held = len(commands)
        assert b.node.trigger_cleanup() == SUCCESS
        b.until(lambda: b.observer.message('Lifecycle') == 'unconfigured')
        assert len(commands) == held


def test_hold_is_the_last_command_on_shutdown_of_the_active_node():
    with bench(parameters=LIVE) as b:
        commands = commands_of(b)
        b.start()
        b.until(lambda: len(commands) >= 2)
        assert b.node.trigger_shutdown() == SUCCESS
        b.until(lambda: is_hold(commands[-1], 0.1), send=False)
        b.until(lambda: b.observer.message('Lifecycle') == 'finalized')
        assert is_hold(commands[-1], 0.1)


def test_hold_is_the_last_command_when_the_model_breaks():
    fail = threading.Event()

    def act(observation: object) -> None:
        if fail.is_set():
            raise RuntimeError('device lost')

    with bench(SmallPolicy(load_robot('franka'), act), LIVE) as b:
        commands = commands_of(b)
        b.start()
        b.until(lambda: len(commands) >= 2)
        fail.set()
        b.until(lambda: b.node.lifecycle_state == 'unconfigured')
        b.until(lambda: is_hold(commands[-1], 0.1))


def test_hold_of_a_trajectory_is_one_point_from_now_on():
    parameters = {'action_interface': 'joint_trajectory', 'dry_run': False}
    with bench(parameters=parameters) as b:
        sent: list[JointTrajectory] = []
        b.observer.node.create_subscription(JointTrajectory, 'joint_trajectory', sent.append, 10)
        b.start()
        b.until(lambda: len(sent) >= 2)
        assert b.node.trigger_deactivate() == SUCCESS
        b.until(lambda: len(sent[-1].points) == 1, send=False)
        assert (sent[-1].header.stamp.sec, sent[-1].header.stamp.nanosec) == (0, 0)
        assert sent[-1].points[0].time_from_start.nanosec == 50_000_000
        assert sent[-1].points[0].positions[:7] == pytest.approx([0.1] * 7)


def test_hold_of_a_joint_state_names_every_joint_at_its_measured_position():
    with bench(parameters={'action_interface': 'joint_state', 'dry_run': False}) as b:
        sent: list[JointState] = []
        b.observer.node.create_subscription(JointState, 'joint_commands', sent.append, 10)
        b.start()
        b.until(lambda: len(sent) >= 2)
        acted_ns = Time.from_msg(sent[-1].header.stamp).nanoseconds
        assert b.node.trigger_deactivate() == SUCCESS
        b.until(lambda: is_hold(list(sent[-1].position), 0.1), send=False)
        assert list(sent[-1].name) == [dim.joint for dim in load_robot('franka').actions]
        assert list(sent[-1].position)[:7] == pytest.approx([0.1] * 7)
        assert Time.from_msg(sent[-1].header.stamp).nanoseconds > acted_ns


def test_watchdog_holds_once_when_a_camera_stops_and_acting_resumes():
    with bench(parameters=LIVE) as b:
        commands = commands_of(b)
        b.start()
        b.until(lambda: len(commands) >= 2)
        b.sensors.cameras['wrist'].running = False
        b.until(lambda: is_hold(commands[-1], 0.1))
        held = len(commands)
        b.until(lambda: b.observer.values('Action').get('watchdog trips') == '1')
        assert len(commands) == held
        b.sensors.cameras['wrist'].running = True
        b.until(lambda: len(commands) >= held + 2)
        assert not is_hold(commands[-1], 0.1)


@contextmanager
def heard_elsewhere() -> Iterator[tuple[Node, list[list[float]]]]:
    """Commands as another process hears them, also while the node under test hangs."""
    node = rclpy.create_node('elsewhere')
    commands: list[list[float]] = []
    node.create_subscription(
        Float64MultiArray, 'commands', lambda message: commands.append(list(message.data)), 10
    )
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, daemon=True)
    thread.start()
    try:
        yield node, commands
    finally:
        executor.shutdown()
        thread.join()
        node.destroy_node()


class Hanging:
    """A policy whose inference does not return from :attr:`hang` on, until :meth:`release`."""

    def __init__(self) -> None:
        self.hang, self.hangs, self._go_on = (threading.Event() for _ in range(3))
        self.policy = SmallPolicy(load_robot('franka'), self._act)

    def release(self) -> None:
        self.hang.clear()
        self._go_on.set()

    def _act(self, observation: object) -> None:
        if self.hang.is_set():
            self.hangs.set()
            self._go_on.wait(DEADLINE_S)


def wait_until(condition: Callable[[], bool]) -> bool:
    """Wait in a thread that nothing spins; return whether it became true."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@contextmanager
def aside(work: Callable[[], None]) -> Iterator[None]:
    """Run something in a thread, and wait for it at the end."""
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def test_hold_is_on_the_wire_while_the_inference_hangs_and_its_late_action_is_dropped():
    hanging, held = Hanging(), []
    with bench(hanging.policy, LIVE) as b, heard_elsewhere() as (_, commands):
        b.start()
        b.until(lambda: len(commands) >= 2)

        def release_after_the_hold() -> None:
            hanging.hangs.wait(DEADLINE_S)
            held.append(wait_until(lambda: is_hold(commands[-1], 0.1)))
            b.node.set_parameters([Parameter('prompt', value='')])  # the next ticks skip
            hanging.release()

        hanging.hang.set()
        with aside(release_after_the_hold):
            b.until(lambda: b.observer.counts().get('action_too_late') == 1)
        assert held == [True]
        b.until(lambda: b.observer.counts().get('missing_input', 0) >= 2)
        assert is_hold(commands[-1], 0.1)


def test_dry_run_says_what_came_of_a_hang_as_nothing_moves_in_it():
    hanging = Hanging()
    with bench(hanging.policy) as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        counters = b.node._session.running.core.counters

        def release_after_the_trip() -> None:
            hanging.hangs.wait(DEADLINE_S)
            wait_until(lambda: counters.watchdog_trips == 1)
            hanging.release()

        hanging.hang.set()
        with aside(release_after_the_trip):
            b.until(lambda: b.observer.values('Action').get('watchdog trips') == '1')
        assert 'action_too_late' not in b.observer.counts()


def test_estop_acts_at_once_while_the_inference_hangs():
    hanging, seen = Hanging(), []
    patient = {**LIVE, 'watchdog_periods': 1000}
    with bench(hanging.policy, patient) as b, heard_elsewhere() as (node, commands):
        estop = node.create_client(Trigger, 'pi05_policy/estop')
        b.start()
        b.until(lambda: len(commands) >= 2 and estop.service_is_ready())

        def stop_and_release() -> None:
            hanging.hangs.wait(DEADLINE_S)
            called = estop.call_async(Trigger.Request())
            seen.append(wait_until(called.done))
            seen.append(wait_until(lambda: is_hold(commands[-1], 0.1)))
            hanging.release()

        hanging.hang.set()
        with aside(stop_and_release):
            b.until(lambda: b.observer.counts().get('estop', 0) >= 3)
        assert seen == [True, True]
        assert is_hold(commands[-1], 0.1)
        assert [is_hold(command, 0.1) for command in commands].count(True) == 1


def test_estop_that_cannot_hold_is_latched_says_so_and_answers_again(monkeypatch):
    def fail(measured: object) -> None:
        raise RuntimeError('publisher lost')

    with bench(parameters=LIVE) as b:
        b.start()
        with monkeypatch.context() as broken:
            broken.setattr(b.node._session.running.output, 'hold', fail)
            answer = trigger(b, 'estop')
        assert not answer.success
        assert answer.message == 'latched, but no hold is sent: RuntimeError: publisher lost'
        b.until(lambda: b.observer.counts().get('estop', 0) >= 1)
        assert trigger(b, 'estop_reset').message == 'released'


def test_estop_is_taken_while_the_node_configures():
    def load(settings: object, sizes: object) -> SmallPolicy:
        b.until(estop.service_is_ready, send=False)
        called = estop.call_async(Trigger.Request())
        assert wait_until(called.done)
        return SmallPolicy(load_robot('franka'))

    with bench(parameters=LIVE, load_policy=load) as b, heard_elsewhere() as (node, commands):
        estop = node.create_client(Trigger, 'pi05_policy/estop')
        b.start()
        b.until(lambda: b.observer.counts().get('estop', 0) >= 2)
        assert commands == []


def test_watchdog_that_stops_sends_no_hold_then_or_later():
    with bench(parameters={**LIVE, 'watchdog_action': 'stop'}) as b:
        commands = commands_of(b)
        b.start()
        b.until(lambda: len(commands) >= 2)
        b.sensors.joints_running = False
        b.until(lambda: b.observer.values('Action').get('watchdog trips') == '1')
        assert b.node.trigger_deactivate() == SUCCESS
        b.until(lambda: b.observer.message('Lifecycle') == 'inactive', send=False)
        assert not any(is_hold(command, 0.1) for command in commands)


def test_estop_holds_once_and_stays_until_it_is_reset():
    with bench(parameters=LIVE) as b:
        commands = commands_of(b)
        b.start()
        b.until(lambda: len(commands) >= 2)
        assert trigger(b, 'estop').success
        b.until(lambda: is_hold(commands[-1], 0.1))
        held = len(commands)
        b.until(lambda: b.observer.counts().get('estop', 0) >= 3)
        assert b.observer.values('Action')['emergency stop'] == 'latched'
        assert b.node.trigger_deactivate() == SUCCESS
        assert b.node.trigger_cleanup() == SUCCESS
        b.start()
        b.until(lambda: b.observer.counts().get('estop', 0) >= 1)
        assert len(commands) == held
        assert trigger(b, 'estop_reset').message == 'released'
        b.until(lambda: len(commands) > held)
        b.until(lambda: b.observer.values('Action').get('emergency stop') == 'off')


def test_activation_is_refused_while_another_node_commands():
    with bench(parameters=LIVE) as b:
        other = b.observer.node.create_publisher(Float64MultiArray, 'commands', 1)
        assert b.configure()
        b.until(lambda: len(b.node.get_publishers_info_by_topic('/commands')) == 2)
        with b.sensors.streaming():
            assert b.node.trigger_activate() != SUCCESS
        assert b.node.last_error == (
            'activate: /commands is already published by /test_observer; stop it, or remap'
        )
        assert b.node.lifecycle_state == 'inactive'
        b.observer.node.destroy_publisher(other)
        b.until(lambda: len(b.node.get_publishers_info_by_topic('/commands')) == 1)
        with b.sensors.streaming():
            assert b.node.trigger_activate() == SUCCESS


def test_dry_run_activates_beside_another_publisher_and_commands_nothing():
    with bench(parameters={'action_interface': 'forward_command'}) as b:
        commands = commands_of(b)
        b.observer.node.create_publisher(Float64MultiArray, 'commands', 1)
        b.start()
        b.until(lambda: b.observer.chunks)
        assert trigger(b, 'estop').success
        b.until(lambda: b.observer.counts().get('estop', 0) >= 2)
        assert commands == []


def test_activation_is_refused_while_an_input_is_stale_and_named():
    with bench() as b:
        assert b.configure()
        b.sensors.cameras['wrist'].running = False
        b.until(lambda: b.observer.message('Inputs').startswith('wrist image '))
        with b.sensors.streaming():
            assert b.node.trigger_activate() != SUCCESS
        assert b.node.last_error.startswith(
            'activate: an input is not ready: stale_input: wrist image'
        )

"""Hold, watchdog, emergency stop and refusal to activate, over real DDS."""

from __future__ import annotations

import threading

import pytest
from helpers import Bench, SmallPolicy, bench
from rclpy.lifecycle import TransitionCallbackReturn
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


def test_watchdog_acts_while_the_inference_hangs():
    hang, go_on = threading.Event(), threading.Event()

    def act(observation: object) -> None:
        if hang.is_set():
            go_on.wait(30.0)

    with bench(SmallPolicy(load_robot('franka'), act), LIVE) as b:
        commands = commands_of(b)
        b.start()
        b.until(lambda: len(commands) >= 2)
        held = threading.Event()
        output = b.node._session.running.output
        hold = output.hold

        def note(measured: dict[str, float]) -> bool:
            sent = hold(measured)
            if sent:
                held.set()
                hang.clear()
                go_on.set()
            return sent

        output.hold = note
        hang.set()
        b.until(held.is_set)
        b.until(lambda: any(is_hold(command, 0.1) for command in commands))


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
        assert b.observer.values('Action')['emergency stop'] == 'off'


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

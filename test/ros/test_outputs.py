"""What goes onto the wire, and which robot's actions no message may carry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builtin_interfaces.msg import Duration
from helpers import TIMES, SmallPolicy, bench
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.msg import ActionChunk as ActionChunkMessage
from pi05_ros.msg import StageTiming
from pi05_ros.policy.robot import ActionDim, load_robot
from pi05_ros.policy.types import ActionChunk
from pi05_ros.ros.outputs import (
    OutputError,
    Provenance,
    check_carries,
    check_rows,
    chunk_message,
    command_message,
    joint_state_message,
)
from pi05_ros.ros.trajectory import TrajectoryEncoder, duration_message, time_message

pytestmark = pytest.mark.ros

STAMP_NS = 1_760_000_000_123_456_789
CHUNK = ActionChunk(
    actions=np.arange(6, dtype=np.float32).reshape(3, 2) / 4,
    names=('a', 'b'),
    step_s=0.05,
    stamp_ns=STAMP_NS,
    stamps_ns={'base': STAMP_NS, 'joint_states': STAMP_NS + 1_000_000_000},
    tick=7,
    seed=3,
    num_steps=10,
    prompt='stack',
    times=TIMES,
)
ORIGIN = Provenance('ab' * 32, 'eager', 'float32', ('rad', 'm'))


def test_trajectory_is_stamped_with_the_oldest_observation_and_steps_on_from_it():
    message = decoded(TrajectoryEncoder(('joint_a', 'joint_b')).encode(CHUNK))
    assert message.header.stamp == time_message(STAMP_NS)
    assert list(message.joint_names) == ['joint_a', 'joint_b']
    assert [list(point.positions) for point in message.points] == CHUNK.actions.tolist()
    assert [point.time_from_start for point in message.points] == [
        Duration(sec=0, nanosec=0),
        Duration(sec=0, nanosec=50_000_000),
        Duration(sec=0, nanosec=100_000_000),
    ]


@settings(deadline=None)
@given(st.data())
def test_a_later_trajectory_has_nothing_of_the_one_before(data):
    """Rows of odd numbers of joints lie differently in the message."""
    names = data.draw(st.lists(st.text('abc_', min_size=1), min_size=1, max_size=8), label='names')
    encoder = TrajectoryEncoder(tuple(names))
    number = st.floats(width=32, allow_nan=False)
    for _ in range(3):
        shape = (data.draw(st.integers(1, 4), label='rows'), len(names))
        chunk = replace(
            CHUNK,
            actions=data.draw(arrays(np.float32, shape, elements=number)),
            stamp_ns=data.draw(st.integers(1, 2**31 * 10**9 - 1), label='stamp'),
        )
        message = decoded(encoder.encode(chunk))
        assert message.header.stamp == time_message(chunk.stamp_ns)
        assert message.joint_names == names
        assert [list(point.positions) for point in message.points] == chunk.actions.tolist()


def decoded(raw: bytes) -> JointTrajectory:
    return deserialize_message(raw, JointTrajectory)


def test_command_is_the_first_row():
    assert list(command_message(CHUNK).data) == [0.0, 0.25]


@pytest.mark.parametrize(
    ('kind', 'unit', 'positions', 'velocities'),
    [('joint_position', 'rad', [0.5, 0.75], []), ('joint_velocity', 'rad/s', [], [0.5, 0.75])],
)
def test_joint_state_carries_one_row_by_name_in_the_field_of_its_kind(
    kind, unit, positions, velocities
):
    dims = tuple(ActionDim(name=n, kind=kind, joint=f'joint_{n}', unit=unit) for n in 'ab')
    message = joint_state_message(CHUNK.actions[1], dims, STAMP_NS)
    assert message.header.stamp == time_message(STAMP_NS)
    assert list(message.name) == ['joint_a', 'joint_b']
    assert (list(message.position), list(message.velocity)) == (positions, velocities)
    assert list(message.effort) == []


@pytest.mark.parametrize('interface', ['forward_command', 'joint_state'])
def test_more_rows_than_the_interface_carries_are_refused(interface):
    check_rows(interface, 0)
    check_rows(interface, 1)
    check_rows('joint_trajectory', 8)
    with pytest.raises(OutputError, match=f'{interface} carries the first row .* is 2; set it'):
        check_rows(interface, 2)


def test_chunk_carries_what_is_needed_to_recompute_it():
    message = chunk_message(CHUNK, ORIGIN, dry_run=True)
    assert message.dry_run
    assert message.tick == 7
    assert message.horizon == 3
    assert np.array(message.actions).reshape(3, 2).tolist() == CHUNK.actions.tolist()
    assert (list(message.names), list(message.units)) == (['a', 'b'], ['rad', 'm'])
    assert message.step_dt == duration_message(50_000_000)
    assert dict(zip(message.input_names, message.input_stamps, strict=True)) == {
        'base': time_message(STAMP_NS),
        'joint_states': time_message(STAMP_NS + 1_000_000_000),
    }
    assert (message.seed, message.num_steps, message.prompt) == (3, 10, 'stack')
    assert (message.backend, message.precision) == ('eager', 'float32')
    assert message.checkpoint_sha256 == 'ab' * 32


@pytest.mark.parametrize('interface', ['joint_trajectory', 'forward_command', 'joint_state'])
def test_joint_positions_can_be_carried(interface):
    check_carries(interface, load_robot('franka'))


@pytest.mark.parametrize('robot', ['franka', 'libero', 'droid', 'aloha'])
def test_chunks_carry_every_robot(robot):
    check_carries('action_chunk', load_robot(robot))


@pytest.mark.parametrize(
    ('robot', 'interface', 'match'),
    [
        (
            'libero',
            'joint_trajectory',
            r'carries joint positions in SI units, but robot libero has '
            r'eef_delta_x \(eef_delta_position \[1\]\), .* gripper \(gripper_command \[1\]\); '
            'use action_interface action_chunk',
        ),
        ('libero', 'forward_command', r'eef_delta_x \(eef_delta_position'),
        ('droid', 'joint_trajectory', r'panda_joint1 \(joint_velocity \[1\]\)'),
        ('droid', 'forward_command', r'\[1\]'),
        ('libero', 'joint_state', r'positions \(or velocities\) .* eef_delta_x'),
        ('aloha', 'joint_state', r'has left_gripper \(gripper_position \[1\]\), right_gripper'),
    ],
)
def test_actions_that_a_message_would_misstate_are_refused(robot, interface, match):
    with pytest.raises(OutputError, match=match):
        check_carries(interface, load_robot(robot))


@pytest.mark.parametrize('interface', ['forward_command', 'joint_state'])
def test_velocities_go_as_commands_but_not_mixed_with_positions(interface):
    franka = load_robot('franka')
    speed = ActionDim(name='v', kind='joint_velocity', joint='j', unit='rad/s')
    check_carries(interface, franka.model_copy(update={'actions': (speed,)}))
    mixed = franka.model_copy(update={'actions': (speed, *franka.actions)})
    with pytest.raises(OutputError, match=r'has v \(joint_velocity \[rad/s\]\)'):
        check_carries(interface, mixed)


@pytest.mark.usefixtures('ros')
@pytest.mark.parametrize(
    ('interface', 'kind', 'topic'),
    [
        ('joint_trajectory', JointTrajectory, 'joint_trajectory'),
        ('forward_command', Float64MultiArray, 'commands'),
        ('joint_state', JointState, 'joint_commands'),
        ('action_chunk', ActionChunkMessage, 'pi05_policy/action_chunk'),
    ],
)
def test_actions_go_to_the_chosen_topic_and_timing_beside_them(interface, kind, topic):
    parameters = {'action_interface': interface, 'dry_run': False}
    with bench(parameters=parameters) as b:
        actions: list[object] = []
        timing: list[StageTiming] = []
        b.observer.node.create_subscription(kind, topic, actions.append, 10)
        b.observer.node.create_subscription(StageTiming, 'pi05_policy/timing', timing.append, 10)
        b.start()
        b.until(lambda: actions and timing)
        assert b.observer.chunks == []
        assert timing[-1].vision_ms == 2.0
        assert np.isnan(timing[-1].h2d_ms)
        last = timing[-1]
        parts_ms = (last.transport_ms, last.wait_ms, last.tick_ms)
        assert min(parts_ms) > 0.0
        assert last.sensor_to_action_ms == pytest.approx(sum(parts_ms))
        assert 0.0 < last.inputs_ms + last.publish_ms < last.tick_ms
        b.until(lambda: b.observer.message('Action') == f'acting on /{topic}')


@pytest.mark.usefixtures('ros')
@pytest.mark.parametrize(('asked', 'rows'), [(0, 4), (1, 1), (3, 3)])
def test_only_the_rows_to_execute_are_sent(asked, rows):
    parameters = {
        'action_interface': 'joint_trajectory', 'dry_run': False, 'execute_horizon': asked,
    }  # fmt: skip
    with bench(parameters=parameters) as b:
        sent: list[JointTrajectory] = []
        b.observer.node.create_subscription(JointTrajectory, 'joint_trajectory', sent.append, 10)
        b.start()
        b.until(lambda: sent)
        assert len(sent[-1].points) == rows


@pytest.mark.usefixtures('ros')
def test_rows_that_the_interface_does_not_carry_refuse_to_configure():
    with bench(parameters={'action_interface': 'joint_state', 'execute_horizon': 2}) as b:
        assert not b.configure()
        assert 'carries the first row of a chunk, but execute_horizon is 2' in b.node.last_error


@pytest.mark.usefixtures('ros')
def test_dry_run_moves_nothing():
    with bench(parameters={'action_interface': 'forward_command'}) as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        assert b.observer.node.get_publishers_info_by_topic('/commands') == []
        assert b.observer.chunks[-1].dry_run


@pytest.mark.usefixtures('ros')
def test_interface_that_cannot_carry_the_robot_is_refused_at_configure_even_in_a_dry_run():
    policy = SmallPolicy(load_robot('libero'))
    parameters = {'robot': 'libero', 'action_interface': 'joint_trajectory'}
    with bench(policy, parameters=parameters) as b:
        assert not b.configure()
        assert 'action_interface joint_trajectory carries joint positions' in b.node.last_error

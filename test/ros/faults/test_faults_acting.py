"""One real node acts while all around it fails; each fault is injected, seen, removed."""

from __future__ import annotations

import re
import signal

import pytest
from fault_bench import ARM, FaultBench
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient


class Sensors:
    """The processes that send, to be replaced by the tests that kill them."""

    def __init__(self, bay) -> None:
        self._bay = bay
        self.start_wrist()
        self.start_arm()
        self.desk = bay.sensors('desk', 'camera:base', 'task')

    def start_wrist(self) -> None:
        self.wrist = self._bay.sensors('hand_camera', 'camera:wrist')

    def start_arm(self) -> None:
        self.joints = self._bay.sensors('arm', 'joints')

    def change(self, source: str, **values: object) -> None:
        {'wrist': self.wrist, 'joints': self.joints}.get(source, self.desk).change(
            source, **values
        )


@pytest.fixture(scope='module')
def sensors(bay) -> Sensors:
    return Sensors(bay)


@pytest.fixture(scope='module')
def node(bay, sensors) -> FaultBench:
    bench = bay.node()
    bench.start()
    return bench


INPUT_FAULTS = {
    'wrist camera stops': (
        'wrist',
        {'running': False},
        {'running': True},
        r'stale_input: wrist image \d+ ms old > 400 ms',
    ),
    'joint states stop': (
        'joints',
        {'running': False},
        {'running': True},
        r'stale_input: joint_states \d+ ms old > 400 ms',
    ),
    'wrist image 350 ms behind the base image': (
        'wrist',
        {'lag_ns': 350_000_000},
        {'lag_ns': 0},
        r'skewed_inputs: wrist image is \d+ ms older than base image > 300 ms|stale_input: wrist',
    ),
    'camera sends noise instead of a message': (
        'wrist',
        {'wire': 'noise'},
        {'wire': 'whole'},
        r'malformed_message: wrist image: ',
    ),
    'camera message cut in half': (
        'wrist',
        {'wire': 'cut'},
        {'wire': 'whole'},
        r'malformed_message: wrist image: ',
    ),
    'image of another size': (
        'wrist',
        {'size_px': [48, 64]},
        {'size_px': [24, 32]},
        r'bad_image_size: wrist image: image is 48x64, configured for 24x32',
    ),
    'image of another encoding': (
        'wrist',
        {'encoding': '16UC1'},
        {'encoding': 'rgb8'},
        r'bad_encoding: wrist image: .*16UC1',
    ),
    'image with step 0': (
        'wrist',
        {'step': 0},
        {'step': None},
        r'bad_step: wrist image: step 0 is shorter than a row of 32 rgb8 pixels \(96 bytes\)',
    ),
    'image buffer 100 bytes short': (
        'wrist',
        {'cut_bytes': 100},
        {'cut_bytes': 0},
        r'short_buffer: wrist image: buffer has 2204 bytes, step \* height is 2304',
    ),
    'clock of the camera machine 10 s ahead': (
        'wrist',
        {'lag_ns': -10_000_000_000},
        {'lag_ns': 0},
        r'future_stamp: wrist image stamped \d+ ms in the future > 50 ms',
    ),
}


@pytest.mark.parametrize('fault', INPUT_FAULTS)
def test_the_node_holds_names_the_input_and_acts_again(fault, node, sensors, table):
    source, broken, mended, said = INPUT_FAULTS[fault]
    before = node.seen()
    sensors.change(source, **broken)
    message = node.until_said('Action', said)
    node.until(node.is_holding)
    held = len(node.commands)
    node.until_said('Inputs', 'wrist image|joint_states')
    skipped = node.counts()['skipped']
    node.until(lambda: node.counts()['skipped'] > skipped)
    assert len(node.commands) == held, 'a command after the hold, while the input was bad'
    deed = node.deed(before)
    sensors.change(source, **mended)
    node.until_acting()
    table.add(fault, deed, re.search(f'(?:{said}).*', message).group(), 'yes, with the input')


def test_camera_process_killed_outright_is_named_and_its_successor_taken(node, sensors, table):
    before = node.seen()
    sensors.wrist.kill()
    message = node.until_said('Action', r'stale_input: wrist image \d+ ms old')
    node.until(node.is_holding)
    deed = node.deed(before)
    sensors.start_wrist()
    node.until_acting()
    node.until_said('Inputs', 'all inputs fresh')
    said = message.partition('; ')[2]
    table.add('`kill -9` of the camera process', deed, said, 'yes, with the new process')


def test_joint_publisher_that_comes_back_with_another_order_is_read_by_name(node, sensors, table):
    before = node.seen()
    sensors.joints.kill()
    message = node.until_said('Action', r'stale_input: joint_states \d+ ms old')
    deed = node.deed(before)
    sensors.start_arm()
    sensors.joints.change('joints', backwards=True)
    node.until_acting()
    assert node.commands[-1][:7] == pytest.approx(ARM, abs=0.05)
    said = message.partition('; ')[2]
    table.add(
        'joint publisher killed; its successor sends the joints in another order',
        deed, said, 'yes, read by name',
    )  # fmt: skip


def test_second_camera_on_the_topic_is_named(node, bay, table):
    before = node.seen()
    other = bay.sensors('other_camera', 'camera:wrist')
    rivals = (
        '/hand_camera and /other_camera both publish on /camera/wrist/image_raw; '
        'stop one, or remap it'
    )
    said = node.until_said('Inputs', rivals)
    assert said.startswith(rivals)
    assert node.observer.status('Inputs').level == b'\x02'
    deed = node.deed(before)
    other.close()
    node.until_said('Inputs', 'all inputs fresh')
    table.add('second publisher on a camera topic', deed, rivals, 'yes, without it')


def test_controller_that_goes_is_told(node, table):
    before = node.seen()
    node.observer.node.destroy_subscription(node.commands_from)
    said = node.until_said('Action', '; nobody subscribes to /commands$')
    deed = node.deed(before)
    node.listen_to_commands()
    node.until(lambda: 'nobody' not in node.observer.message('Action'))
    node.until_acting()
    table.add('controller no longer subscribes', deed, said, 'yes, with the controller')


def test_joint_states_at_1_khz_are_all_counted_and_the_newest_taken(node, sensors, table):
    before = node.seen()
    sensors.joints.change('joints', rate_hz=1000.0)

    def rate_hz() -> float:
        return float(node.observer.values('Inputs').get('joint_states rate (Hz)', 'nan'))

    node.until(lambda: rate_hz() > 100.0)
    for _ in range(3):  # s: until the node's window of the rate knows little else
        node.seen()
    node.until_acting()
    said = f'joint_states rate (Hz): {rate_hz():.0f}'
    deed = node.deed(before)
    sensors.joints.change('joints', rate_hz=50.0)
    node.until_said('Inputs', 'all inputs fresh')
    table.add('joint states at 1 kHz', deed, said, 'not needed')


def test_flood_of_tasks_leaves_the_newest_one(node, sensors, table):
    before = node.seen()
    sensors.desk.change('task', running=True, rate_hz=1000.0)
    node.until(lambda: re.search(r'bowl \d', node.observer.values('Model').get('task', '')))
    node.until_acting()
    deed = node.deed(before)
    sensors.desk.change('task', running=False)
    said = f'task: {node.observer.values("Model")["task"]}'
    table.add('1,000 tasks per second', deed, said, 'not needed')


def test_parameters_change_while_acting_or_are_refused_with_the_reason(node, table):
    client = AsyncParameterClient(node.observer.node, 'pi05_policy')
    node.until(client.services_are_ready)

    def ask(name: str, **values: object) -> list:
        future = getattr(client, name)([Parameter(key, value=v) for key, v in values.items()])
        node.until(future.done)
        result = future.result()
        return result.results if name == 'set_parameters' else [result.result]

    before = node.seen()
    assert all(r.successful for r in ask('set_parameters', num_steps=3, max_skew_ms=250.0))
    node.until(lambda: node.observer.values('Model')['num_steps'] == '3')
    reasons = []
    for refused in ({'rate_hz': 30.0}, {'num_steps': 99}):
        (result,) = ask('set_parameters', **refused)
        assert not result.successful
        reasons.append(result.reason)
    (result,) = ask('set_parameters_atomically', num_steps=4, max_skew_ms=-1.0)
    assert not result.successful
    reasons.append(result.reason)
    future = client.get_parameters(['num_steps', 'max_skew_ms'])
    node.until(future.done)
    steps, skew = future.result().values
    assert (steps.integer_value, skew.double_value) == (3, 250.0)
    node.until_acting()
    fault = 'parameters set while acting: read-only, out of range, one bad of several at once'
    table.add(fault, node.deed(before), '; '.join(reasons), 'refused, the rest unchanged')


def test_sigint_ends_the_acting_node_with_the_hold_as_last_command(node, table):
    """The last one: the node is gone afterwards."""
    node.until(lambda: not node.is_holding())
    exit_code = node.stop(signal.SIGINT)
    assert exit_code == 0
    node.until(node.is_holding)
    said = node.observer.message('Lifecycle')
    table.add('SIGINT while acting', f'held; exit code {exit_code}', said, 'ended')

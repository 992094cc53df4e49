"""SIGINT and SIGTERM in every state: exit code 0, the hold last, nothing of the process left."""

from __future__ import annotations

import signal

import pytest
from fault_bench import STAND_IN, FaultBench
from lifecycle_msgs.msg import Transition

CLEANUP = Transition.TRANSITION_CLEANUP
CONFIGURE, ACTIVATE = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE
SLOW_LOAD, SLOW_CLOSE = ('--load-s', '60'), ('--close-s', '1.5')


@pytest.fixture(scope='module', autouse=True)
def sensors(bay):
    return bay.sensors('sensors', 'camera:base', 'camera:wrist', 'joints')


def go_unconfigured(node: FaultBench, sensors) -> None:
    pass


def go_waiting(node: FaultBench, sensors) -> None:
    sensors.change('wrist', running=False)
    node.request_state(CONFIGURE)
    node.until_said('Lifecycle', 'configuring: waiting')


def go_loading(node: FaultBench, sensors) -> None:
    node.request_state(CONFIGURE)
    node.until_said('Lifecycle', 'configuring: loading the model')


def go_inactive(node: FaultBench, sensors) -> None:
    assert node.configure()


def go_activating(node: FaultBench, sensors) -> None:
    """An input that stutters is waited for."""
    assert node.configure()
    sensors.change('wrist', running=False)
    node.until_said('Inputs', r'wrist image \d+ ms old')
    node.request_state(ACTIVATE)
    node.until_said('Lifecycle', 'activating')


def go_active(node: FaultBench, sensors) -> None:
    node.start()


def go_cleaning_up(node: FaultBench, sensors) -> None:
    assert node.configure()
    node.request_state(CLEANUP)
    node.until_said('Lifecycle', 'cleaningup')


def go_to_error(node: FaultBench, sensors) -> None:
    node.start()
    node.set_task('harmless')
    node.until_said('Lifecycle', 'errorprocessing')


SITUATIONS = {
    'unconfigured': (go_unconfigured, (), signal.SIGTERM),
    'configuring, waiting for a camera': (go_waiting, (), signal.SIGINT),
    'configuring, loading': (go_loading, SLOW_LOAD, signal.SIGTERM),
    'inactive': (go_inactive, (), signal.SIGINT),
    'activating': (go_activating, (), signal.SIGTERM),
    'active': (go_active, (), signal.SIGTERM),
    'cleaning up': (go_cleaning_up, SLOW_CLOSE, signal.SIGINT),
    'error processing': (go_to_error, SLOW_CLOSE, signal.SIGTERM),
}


@pytest.mark.parametrize('state', SITUATIONS)
def test_signal_ends_the_process_in_order(state, bay, sensors, table):
    go, arguments, number = SITUATIONS[state]
    node = bay.node([*STAND_IN, *arguments])
    node.until_said('Lifecycle', '^unconfigured$')
    go(node, sensors)
    exit_code = node.stop(number)
    assert exit_code == 0, node.describe()
    assert 'Traceback' not in node.node.log_path.read_text()
    if node.commands:
        node.until(node.is_holding)
    said = node.observer.message('Lifecycle')
    sensors.change('wrist', running=True)
    held = 'held; ' if node.commands else ''
    table.add(f'{number.name} while {state}', f'{held}exit code {exit_code}', said, 'ended')

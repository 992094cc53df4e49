"""The order of every transition, and what becomes of a node whose hooks raise."""

from __future__ import annotations

import pytest
from rclpy.lifecycle import TransitionCallbackReturn

from pi05_ros.model.errors import Pi05Error
from pi05_ros.ros.lifecycle import ManagedNode
from pi05_ros.ros.signals import StopRequested, StopSignal

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE
ERROR = TransitionCallbackReturn.ERROR


class Recorder(ManagedNode):
    """Notes which hooks run; raises where the test says so."""

    def __init__(self, stop: StopSignal | None = None) -> None:
        self.calls: list[str] = []
        self.states: list[str] = []
        self.faults: dict[str, BaseException] = {}
        super().__init__('recorder', stop)

    def _run(self, hook: str) -> None:
        self.calls.append(hook)
        if hook in self.faults:
            raise self.faults[hook]

    def _setup(self) -> None:
        self._run('setup')

    def _arm(self) -> None:
        self._run('arm')

    def _disarm(self) -> None:
        self._run('disarm')

    def _teardown(self) -> None:
        self._run('teardown')

    def _state_changed(self) -> None:
        self.states.append(self.lifecycle_state)

    @property
    def rcl_state(self) -> str:
        """What the state machine itself says."""
        return self._state_machine.current_state[1]


@pytest.fixture
def node():
    made = Recorder()
    yield made
    made.faults.clear()
    made.close()


def test_full_cycle_runs_each_hook_once_and_can_be_repeated(node):
    for _ in range(2):
        assert node.trigger_configure() == SUCCESS
        assert node.trigger_activate() == SUCCESS
        assert node.trigger_deactivate() == SUCCESS
        assert node.trigger_cleanup() == SUCCESS
    assert node.calls == ['setup', 'arm', 'disarm', 'teardown'] * 2
    assert node.states[:8] == [
        'configuring',
        'inactive',
        'activating',
        'active',
        'deactivating',
        'inactive',
        'cleaningup',
        'unconfigured',
    ]


def test_mistake_of_the_user_in_configure_leaves_the_node_unconfigured(node):
    node.faults['setup'] = Pi05Error('checkpoint is empty')
    assert node.trigger_configure() == FAILURE
    assert node.calls == ['setup', 'teardown']
    assert (node.lifecycle_state, node.rcl_state) == ('unconfigured', 'unconfigured')
    assert node.last_error == 'configure: checkpoint is empty'
    node.faults.clear()
    assert node.trigger_configure() == SUCCESS
    assert node.last_error == ''


def test_unexpected_error_in_configure_goes_through_error_processing(node):
    node.faults['setup'] = ZeroDivisionError('division by zero')
    node.trigger_configure()
    assert node.calls == ['setup', 'teardown', 'disarm', 'teardown']
    assert (node.lifecycle_state, node.rcl_state) == ('unconfigured', 'unconfigured')
    assert node.last_error == 'configure: ZeroDivisionError: division by zero'


def test_first_error_is_kept_when_cleaning_up_fails_too(node):
    node.faults['setup'] = Pi05Error('no memory')
    node.faults['teardown'] = RuntimeError('cannot free')
    node.trigger_configure()
    assert node.last_error == 'configure: no memory'


def test_refused_activation_stays_inactive_and_is_disarmed(node):
    node.trigger_configure()
    node.faults['arm'] = Pi05Error('somebody else drives the arm')
    assert node.trigger_activate() == FAILURE
    assert node.calls == ['setup', 'arm', 'disarm']
    assert (node.lifecycle_state, node.rcl_state) == ('inactive', 'inactive')


def test_error_while_active_frees_everything_and_allows_a_new_configure(node):
    node.trigger_configure()
    node.trigger_activate()
    node.calls.clear()
    node.fail(RuntimeError('CUDA error'))
    assert node.calls == ['disarm', 'disarm', 'teardown']
    assert (node.lifecycle_state, node.rcl_state) == ('unconfigured', 'unconfigured')
    assert node.last_error == 'act: RuntimeError: CUDA error'
    assert node.trigger_configure() == SUCCESS
    assert node.trigger_activate() == SUCCESS


def test_node_that_cannot_be_freed_after_an_error_is_finalized(node):
    node.trigger_configure()
    node.trigger_activate()
    node.faults['teardown'] = RuntimeError('cannot free')
    node.fail(RuntimeError('CUDA error'))
    assert (node.lifecycle_state, node.rcl_state) == ('finalized', 'finalized')


def test_shutdown_frees_everything_even_if_disarming_fails(node):
    node.trigger_configure()
    node.trigger_activate()
    node.faults['disarm'] = RuntimeError('stuck')
    node.trigger_shutdown()
    assert node.calls[-2:] == ['disarm', 'teardown']
    assert node.rcl_state == 'finalized'


@pytest.mark.parametrize('state', ['unconfigured', 'inactive', 'active'])
def test_close_goes_down_every_step_that_is_left(state):
    node = Recorder()
    if state != 'unconfigured':
        node.trigger_configure()
    if state == 'active':
        node.trigger_activate()
    node.calls.clear()
    node.close()
    expected = {'active': ['disarm', 'teardown'], 'inactive': ['teardown'], 'unconfigured': []}
    assert node.calls == [*expected[state], 'disarm', 'teardown']
    assert node.states[-1] == 'finalized'


def test_publishers_are_enabled_before_arming_and_until_after_disarming(node):
    from std_msgs.msg import String

    publisher = node.create_lifecycle_publisher(String, 'last_word', 1)
    enabled: list[bool] = []
    node._arm = lambda: enabled.append(publisher.is_activated)
    node._disarm = lambda: enabled.append(publisher.is_activated)
    node.trigger_configure()
    assert not publisher.is_activated
    node.trigger_activate()
    node.trigger_deactivate()
    assert enabled == [True, True]
    assert not publisher.is_activated


def test_stop_signal_breaks_off_a_configure():
    stop = StopSignal()
    node = Recorder(stop)

    def wait_for_cameras() -> None:
        stop._on_signal(2, None)

    node._setup = wait_for_cameras
    assert node.trigger_configure() == FAILURE
    assert node.rcl_state == 'unconfigured'
    assert stop.requested
    assert node.trigger_configure() == FAILURE  # the process is on its way out
    node.close()


def test_stop_signal_outside_of_a_configure_only_notes_it():
    stop = StopSignal()
    stop._on_signal(2, None)
    assert stop.requested
    with pytest.raises(StopRequested), stop.interruptible():
        pytest.fail('must not begin')

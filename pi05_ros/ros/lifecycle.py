"""One discipline for every lifecycle transition; nodes fill in four hooks.

rclpy swallows an exception in a transition without a word. Here each is logged with its cause,
and the node ends up in a state from which it can be configured again.

===========  =====================  ============================================================
transition   hook                   if the hook raises
===========  =====================  ============================================================
configure    ``_setup``             ``_teardown``; a user's mistake leaves it unconfigured at
                                    once, any other error through error processing
activate     ``_arm``               ``_disarm``; stays inactive, or error processing
deactivate   ``_disarm``            error processing
cleanup      ``_teardown``          error processing
shutdown     ``_disarm, _teardown`` finalized all the same
error        ``_disarm, _teardown`` finalized; unconfigured if both worked
===========  =====================  ============================================================

The order within a transition matters: managed publishers are enabled before ``_arm`` and disabled
after ``_disarm``, so that ``_disarm`` can still publish the last command.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from pi05_ros.control.device import first_line
from pi05_ros.model.errors import Pi05Error

from .signals import StopRequested, StopSignal

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE
ERROR = TransitionCallbackReturn.ERROR


class ManagedNode(LifecycleNode):
    """A lifecycle node whose transitions are all defined here.

    Attributes:
        lifecycle_state: the state's label, also while a transition runs (``configuring``, ...).
        last_error: why the newest transition failed; empty after one that worked.
    """

    def __init__(self, node_name: str, stop: StopSignal | None = None, **kwargs: Any) -> None:
        self.lifecycle_state = 'unconfigured'
        self.last_error = ''
        self._stop = stop or StopSignal()
        self._fatal: BaseException | None = None
        super().__init__(node_name, **kwargs)

    def _setup(self) -> None:
        """Allocate everything; raise to refuse."""

    def _arm(self) -> None:
        """Begin to act; managed publishers are enabled already."""

    def _disarm(self) -> None:
        """Stop acting; must work when :meth:`_arm` did not finish."""

    def _teardown(self) -> None:
        """Free everything; must work when :meth:`_setup` did not finish."""

    def _state_changed(self) -> None:
        """Hear of a new ``lifecycle_state`` or ``last_error``."""

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run ``_setup``; what it left behind is torn down if it raises."""
        self._enter('configuring')
        outcome = self._attempt('configure', self._setup_or_stop)
        if outcome is not SUCCESS:
            self._attempt('clean up after configure', self._teardown, keep_error=True)
        return self._leave(outcome, 'inactive', 'unconfigured')

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Enable the publishers, then run ``_arm``."""
        self._enter('activating')
        super().on_activate(state)
        outcome = self._attempt('activate', self._arm)
        if outcome is not SUCCESS:
            self._attempt('disarm after activate', self._disarm, keep_error=True)
            super().on_deactivate(state)
        return self._leave(outcome, 'active', 'inactive')

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run ``_disarm``, then disable the publishers."""
        self._enter('deactivating', keep_error=self._fatal is not None)
        outcome = self._attempt('deactivate', self._disarm, keep_error=True)
        super().on_deactivate(state)
        if self._fatal is not None:
            outcome = ERROR
        return self._leave(outcome, 'inactive', 'active')

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run ``_teardown``."""
        self._enter('cleaningup')
        return self._leave(self._attempt('clean up', self._teardown), 'unconfigured', 'inactive')

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run ``_disarm`` and ``_teardown``, each whatever the other did."""
        self._enter('shuttingdown', keep_error=True)
        self._attempt('disarm for shutdown', self._disarm, keep_error=True)
        self._attempt('clean up for shutdown', self._teardown, keep_error=True)
        return self._leave(SUCCESS, 'finalized', 'finalized')

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Secure and free everything; the node can be configured again if that worked."""
        self._enter('errorprocessing', keep_error=True)
        disarmed = self._attempt('disarm after the error', self._disarm, keep_error=True)
        freed = self._attempt('clean up after the error', self._teardown, keep_error=True)
        self._fatal = None
        worked = disarmed is SUCCESS and freed is SUCCESS
        return self._leave(SUCCESS if worked else FAILURE, 'unconfigured', 'finalized')

    def fail(self, cause: BaseException) -> None:
        """Leave the active state through error processing: what runs cannot go on."""
        self._fatal = cause
        self._report('act', cause)
        self.trigger_deactivate()

    def close(self) -> None:
        """Go down every step that is left, then free the node: the end of the process."""
        if self.lifecycle_state == 'active':
            self.trigger_deactivate()
        if self.lifecycle_state == 'inactive':
            self.trigger_cleanup()
        if self.lifecycle_state != 'finalized':
            self.trigger_shutdown()
        self.destroy_node()

    def _setup_or_stop(self) -> None:
        with self._stop.interruptible():
            self._setup()

    def _attempt(
        self, what: str, hook: Callable[[], None], keep_error: bool = False
    ) -> TransitionCallbackReturn:
        """Run one hook. A user's mistake or a stop is FAILURE, any other exception ERROR."""
        try:
            hook()
        except StopRequested:
            self.get_logger().info(f'{what}: broken off, the process was asked to stop')
            return FAILURE
        except Exception as error:
            self._report(what, error, keep_error)
            return FAILURE if isinstance(error, Pi05Error) else ERROR
        return SUCCESS

    def _report(self, what: str, error: BaseException, keep_error: bool = False) -> None:
        known = isinstance(error, Pi05Error)
        cause = str(error) if known else f'{type(error).__name__}: {first_line(error)}'
        self.get_logger().error(f'{what} failed: {cause}')
        self.get_logger().debug(''.join(traceback.format_exception(error)))
        if not (keep_error and self.last_error):
            self.last_error = f'{what}: {cause}'

    def _enter(self, label: str, keep_error: bool = False) -> None:
        self.lifecycle_state = label
        if not keep_error:
            self.last_error = ''
        self._state_changed()

    def _leave(
        self, outcome: TransitionCallbackReturn, reached: str, otherwise: str
    ) -> TransitionCallbackReturn:
        """Note the state that the outcome leads to; ERROR leads on to :meth:`on_error`."""
        if outcome is not ERROR:
            self.lifecycle_state = reached if outcome is SUCCESS else otherwise
            self._state_changed()
        return outcome

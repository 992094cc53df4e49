"""The node ``pi05_policy``: newest observation in, action out, on every control tick.

Wiring only. The way of the data is :meth:`.ros.session.Session.tick`: ``ros/subscriptions.py``
takes the newest messages, ``control/core.py`` decides and calls the policy, ``ros/outputs.py``
publishes. This file ties it to lifecycle, parameters, the tick timer and the diagnostics.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, NoReturn

from rclpy.timer import Timer

from pi05_ros.control import status
from pi05_ros.control.clock import ClockWatch
from pi05_ros.control.device import DeviceWatch, first_line
from pi05_ros.control.limits import needs_description, with_limits
from pi05_ros.control.loading import check_settings, load
from pi05_ros.control.parameter_file import NODE_NAME
from pi05_ros.control.parameters import NodeSettings
from pi05_ros.control.reasons import Skip
from pi05_ros.ros.bridge import RosLogHandler, environment, find_converter, hardware_id
from pi05_ros.ros.description import receive_description
from pi05_ros.ros.diagnostics import DiagnosticsPublisher
from pi05_ros.ros.doctor import DoctorService
from pi05_ros.ros.estop import EstopServices
from pi05_ros.ros.lifecycle import ManagedNode
from pi05_ros.ros.outputs import check_carries, check_rows
from pi05_ros.ros.parameters import NodeParameters
from pi05_ros.ros.run import leave, run
from pi05_ros.ros.session import LoadPolicy, Session
from pi05_ros.ros.signals import StopSignal

# A tick is rehearsed so long before it is due, as the rehearsal takes from cold caches at most,
# and not if it is due within the time that it takes from warm ones.
REHEARSAL_LEAD_S = 0.002
REHEARSAL_MIN_S = 0.001


class PolicyNode(ManagedNode):
    """Runs one policy on one robot.

    Args:
        stop: breaks off a configure that is under way.
        load_policy: loads the policy for the settings and the cameras' (height, width).
        options: passed on to :class:`rclpy.lifecycle.LifecycleNode`.
    """

    def __init__(
        self,
        stop: StopSignal | None = None,
        load_policy: LoadPolicy = load,
        **options: Any,
    ) -> None:
        super().__init__(
            NODE_NAME, stop, automatically_declare_parameters_from_overrides=True, **options
        )
        self._load_policy = load_policy
        self._session: Session | None = None
        self._tick_timer: Timer | None = None
        self._rehearsal_timer: Timer | None = None
        self._estopped = False
        self._estop_lock = threading.Lock()  # between the services' thread and the transitions
        self._last_skip: Skip | None = None
        self._progress = ''
        self._clock_watch = ClockWatch()
        self._device_watch = DeviceWatch()
        self._converter = find_converter()
        self._environment = environment(self, self._converter)
        self._log_handler = RosLogHandler(self.get_logger())
        log = logging.getLogger('pi05_ros')
        log.addHandler(self._log_handler)
        log.setLevel(logging.DEBUG)  # the node's own level decides
        self._node_parameters = NodeParameters(
            self, self._change_settings, lambda: self.lifecycle_state in ('activating', 'active')
        )
        self._diagnostics = DiagnosticsPublisher(self, self._statuses)
        self._doctor = DoctorService(self, self._node_parameters, self._statuses)
        self._estop_services = EstopServices(self, self._latch)

    def destroy_node(self) -> None:
        """Free the node; its logger is gone afterwards."""
        self._estop_services.destroy()
        logging.getLogger('pi05_ros').removeHandler(self._log_handler)
        super().destroy_node()

    def _setup(self) -> None:
        settings = self._node_parameters.settings()
        self._report_progress('checking the files')
        self._device_watch.check(settings.device)
        robot = check_settings(settings)
        check_carries(settings.action_interface, robot)
        check_rows(settings.action_interface, settings.execute_horizon)
        robot, limits_from = with_limits(robot, settings, self._description(settings))
        self.get_logger().info(f'limits: {limits_from}')
        self._session = Session(self, settings, robot, self._converter.decode, limits_from)
        try:
            self._session.open(self._load_policy, self._report_progress)
        except Exception as error:
            raise self._device_watch.explain(error) from None
        assert self._session.running is not None
        with self._estop_lock:
            self._session.set_estop(self._estopped)
        self._diagnostics.hardware_id = hardware_id(self._session.running.policy.info.device)

    def _description(self, settings: NodeSettings) -> bytes:
        if not needs_description(settings):
            return b''
        self._report_progress('waiting for the robot description')
        return receive_description(self, settings.input_timeout_s)

    def _arm(self) -> None:
        assert self._session is not None
        self._session.check_ready()
        self._session.start()
        self._last_skip = None
        # On the ROS clock, so that the ticks of a simulation or a bag follow /clock.
        settings = self._session.settings
        period_s = settings.period_ns / 1e9
        if self._session.can_rehearse and not self.get_parameter('use_sim_time').value:
            # Two timers of one period on one clock keep the distance at which they were made.
            self._rehearsal_timer = self.create_timer(period_s, self._rehearse)
            time.sleep(REHEARSAL_LEAD_S)
        self._tick_timer = self.create_timer(period_s, self._tick)
        self.get_logger().info(f'active: {self._session.aim} at {settings.rate_hz:g} Hz')

    def _disarm(self) -> None:
        for timer in (self._rehearsal_timer, self._tick_timer):
            if timer is not None:
                self.destroy_timer(timer)
        self._rehearsal_timer = self._tick_timer = None
        if self._session is not None:
            self._session.stop()

    def _teardown(self) -> None:
        with self._estop_lock:
            session, self._session = self._session, None
        if session is None:
            return
        try:
            session.close()
        except Exception as error:
            # Freeing may be the first call that CUDA answers with the cause of a failed tick.
            explained = self._device_watch.explain(error)
            if not self._device_watch.lost:
                raise
            # The driver frees the memory when the process ends, and not before.
            self.get_logger().warning(f'not freed: {first_line(explained)}')

    def _rehearse(self) -> None:
        """Go through the tick that is due soon; where it is due at once, the tick itself runs."""
        session, timer = self._session, self._tick_timer
        if session is None or session.running is None or timer is None:
            return  # as in _tick
        until_tick_ns = timer.time_until_next_call()
        if until_tick_ns is None or until_tick_ns < REHEARSAL_MIN_S * 1e9:
            return
        try:
            session.rehearse()
        except Exception as error:  # the tick would meet it, too
            self.fail(self._device_watch.explain(error))

    def _tick(self) -> None:
        session = self._session
        if session is None or session.running is None:
            return  # the timer fired once more while the node failed
        core = session.running.core
        health = core.health
        try:
            result = session.tick()
        except Exception as error:  # e.g. the middleware: the node must not go on half-working
            self.fail(error)
            return
        self._log_change(result.skip)
        if result.error is not None:
            self.fail(self._device_watch.explain(result.error))
            return
        if core.health != health:
            self._diagnostics.publish()
        self._diagnostics.tick_ended(session.settings.period_ns / 1e9)

    def _latch(self, estopped: bool) -> bool:
        """Latch or release the emergency stop, in every state of the node, from any thread."""
        with self._estop_lock:
            was_latched, self._estopped = self._estopped, estopped
            if self._session is not None:
                self._session.set_estop(estopped)
        if was_latched != estopped:
            self.get_logger().warning(f'emergency stop {"latched" if estopped else "released"}')
        return was_latched

    def _log_change(self, skip: Skip | None) -> None:
        """Log when ticks begin to be skipped, for another reason, and when they act again."""
        before, self._last_skip = self._last_skip, skip
        if skip is None and before is not None:
            self.get_logger().info(f'acting again after {before.reason}')
        elif skip is not None and (
            before is None or (skip.reason, skip.input_name) != (before.reason, before.input_name)
        ):
            self.get_logger().warning(f'no action: {skip}')

    def _change_settings(self, settings: NodeSettings) -> None:
        if self._session is not None:
            self._session.update(settings)

    def _report_progress(self, what: str) -> None:
        self._progress = what
        self.get_logger().info(f'configure: {what}')
        self._diagnostics.publish()

    def _state_changed(self) -> None:
        self._diagnostics.publish()

    def _statuses(self) -> list[status.Status]:
        """Return every status; the parts that do not exist yet say so."""
        view = self._lifecycle_view()
        statuses = [status.lifecycle_status(view)]
        if self._session is None:
            return statuses + [status.not_configured(part) for part in status.CONFIGURED_PARTS]
        return statuses + self._session.statuses(
            self.lifecycle_state == 'active', view.clock_stopped
        )

    def _lifecycle_view(self) -> status.LifecycleView:
        now_ns = self.get_clock().now().nanoseconds
        simulated = bool(self.get_parameter('use_sim_time').value)
        return status.LifecycleView(
            state=self.lifecycle_state,
            progress=self._progress if self.lifecycle_state == 'configuring' else '',
            last_error=self.last_error,
            clock='simulated' if simulated else 'system',
            clock_stopped=self._clock_watch.is_stopped(now_ns, time.monotonic_ns()),
            environment=self._environment,
        )


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node until it is stopped; the process ends with exit code 0 then."""
    leave(run(PolicyNode, args))


if __name__ == '__main__':
    main()

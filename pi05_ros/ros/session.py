"""Everything that exists while the node is configured: inputs, policy, control core, outputs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rclpy.lifecycle import LifecycleNode

from pi05_ros.control import status
from pi05_ros.control.core import ControlCore, TickResult
from pi05_ros.control.gates import NS_PER_MS
from pi05_ros.control.gpu import GpuMonitor
from pi05_ros.control.images import ForeignDecoder
from pi05_ros.control.inputs import Inputs
from pi05_ros.control.loading import WARM_UP_PROMPT, self_check, warm_up
from pi05_ros.control.parameters import NodeSettings
from pi05_ros.control.reasons import InputFault, Reason, Skip
from pi05_ros.control.safety import HoldError
from pi05_ros.control.statistics import TickStatistics
from pi05_ros.control.watchdog import Watchdog
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import RobotSpec
from pi05_ros.policy.types import Observation

from .direct_take import DirectTakeError
from .outputs import ActionOutput, Provenance
from .subscriptions import InputSubscriptions
from .take_check import checked_rcl
from .timing import TickTimes, TimingOutput

if TYPE_CHECKING:
    from pi05_ros.policy.policy import Policy

# Activation waits this long for inputs that stutter.
READY_TIMEOUT_S = 1.0

LoadPolicy = Callable[[NodeSettings, Mapping[str, tuple[int, int]]], 'Policy']


class NotReadyError(Pi05Error):
    """The node must not act now."""


@dataclass(frozen=True)
class Running:
    """The part of a session that needs the loaded model."""

    policy: Policy
    core: ControlCore
    output: ActionOutput
    timing: TimingOutput
    gpu: GpuMonitor


class Session:
    """One configuration of the node, from the first subscription to the last free.

    Args:
        node: owner of the subscriptions and publishers.
        robot: has been checked against the settings.
        foreign_decoder: for image encodings that are not read natively.
        limits_from: where the robot's limits come from, in words.
    Attributes:
        running: None until :meth:`open` has finished.
    """

    def __init__(
        self,
        node: LifecycleNode,
        settings: NodeSettings,
        robot: RobotSpec,
        foreign_decoder: ForeignDecoder | None,
        limits_from: str,
    ) -> None:
        self.settings = settings
        self.robot = robot
        self.limits_from = limits_from
        self.running: Running | None = None
        self.statistics = TickStatistics()
        self._node = node
        self._policy: Policy | None = None
        self._watchdog: Watchdog | None = None
        self._inputs = Inputs(robot, settings, foreign_decoder)
        self._feeds = InputSubscriptions(node, self._inputs.topics, self._inputs.push)
        self._image_take = status.UNKNOWN

    def open(self, load_policy: LoadPolicy, report: Callable[[str], None]) -> None:
        """Wait for the inputs, load the policy for their sizes, warm it up, make the outputs.

        Args:
            report: told of every step that can take long.
        Raises:
            Pi05Error: an input does not come, or the policy cannot be loaded, does not compute
                what the oracle does, or does not act.
                What exists until then is freed by :meth:`close`.
        """
        node, settings = self._node, self.settings
        observation = self._first_observation(report)
        report('loading the model')
        self._policy = policy = load_policy(settings, self._inputs.fix_sizes())
        policy.while_computing = self._rehearse_answer
        self._take_directly(policy)
        report('checking every stage against the oracle')
        node.get_logger().info(self_check(policy, observation, settings))
        report('warming up')
        act_ms = warm_up(policy, observation, settings)
        node.get_logger().info(f'{settings.checkpoint} is warm: {act_ms:.1f} ms per inference')
        backend = '/'.join(dict.fromkeys(policy.info.stage_backends.values()))
        origin = Provenance(
            policy.info.checkpoint_sha256, backend, policy.info.precision, self.robot.action_units
        )
        self.running = Running(
            policy,
            ControlCore(self._inputs, policy, settings),
            ActionOutput(node, self.robot, settings.action_interface, origin, settings.dry_run),
            TimingOutput(node, backend),
            GpuMonitor(policy.info.device),
        )
        # What was loaded stays until close: a collection that walks it (hundreds of thousands of
        # objects with PyTorch) would make a tick late.
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Free everything, the device memory, too; works on a session that is half open."""
        self._feeds.destroy()
        if self.running is not None:
            self.running.output.destroy()
            self.running.timing.destroy()
            self.running.gpu.close()
        if self._policy is not None:
            self._policy.while_computing = None  # who holds the policy does not hold this, too
            self._policy.close()
        self.running = self._policy = None
        gc.unfreeze()
        gc.collect()  # models hold reference cycles; their memory is to be free now

    def check_ready(self) -> None:
        """Refuse to act while another node commands the robot, or an input is not there.

        Raises:
            NotReadyError: names who publishes on the action topic, the input, or the clock.
        """
        running = self._running()
        others = [] if self.settings.dry_run else running.output.other_publishers()
        if others:
            raise NotReadyError(
                f'{running.output.topic} is already published by {", ".join(others)}; '
                'stop it, or remap'
            )
        skip: Skip | None = None

        def is_ready() -> bool:
            nonlocal skip
            now_ns = self._node.get_clock().now().nanoseconds
            running.core.advance(now_ns)
            skip = running.core.unready(now_ns)
            return skip is None

        if not self._feeds.wait(is_ready, READY_TIMEOUT_S):
            if not self._node.get_clock().now().nanoseconds:
                raise NotReadyError(
                    'use_sim_time is true, but nothing comes on /clock; '
                    'start the simulator, or play with --clock'
                )
            raise NotReadyError(f'an input is not ready: {skip}')

    @property
    def aim(self) -> str:
        """In words, where the actions go."""
        return status.aim(self.settings, self._running().output.topic)

    def start(self) -> None:
        """Count ticks and times from zero, and watch that actions come."""
        self._running().core.start()
        self.statistics = TickStatistics()
        self._watchdog = Watchdog(self.settings.watchdog_timeout_s, self._on_stall)

    def stop(self) -> None:
        """Make the robot hold; works on a session that was not started."""
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.stop()
            self._feeds.poll()
            self._hold('the node stops acting')

    def set_estop(self, latched: bool) -> None:
        """Latch the emergency stop and make the robot hold, or release it; from any thread."""
        if self.running is None:
            return
        self.running.core.estopped = latched
        if latched:
            self.running.core.interrupt()
            self._hold('emergency stop')

    def update(self, settings: NodeSettings) -> None:
        """Take settings that changed while the node runs."""
        self.settings = settings
        if self.running is not None:
            self.running.core.update(settings)

    def tick(self) -> TickResult:
        """Take the newest inputs, decide, act, publish."""
        began_ns = time.perf_counter_ns()
        running = self._running()
        now_ns = self._node.get_clock().now().nanoseconds
        running.core.advance(now_ns)
        self._feeds.poll()
        polled_ns = time.perf_counter_ns()
        result = running.core.tick(now_ns)
        if result.chunk is not None:
            decided_ns = time.perf_counter_ns()
            running.output.publish(result.chunk)
            done_ns = time.perf_counter_ns()
            if running.core.estopped:  # since the core looked: the hold has to be the last
                self._hold('emergency stop')
            if self._watchdog is not None:
                self._watchdog.feed()
            times = TickTimes(
                transport_ms=result.transport_ms,
                wait_ms=result.wait_ms,
                inputs_ms=(polled_ns - began_ns) / NS_PER_MS + result.gate_ms,
                publish_ms=(done_ns - decided_ns) / NS_PER_MS,
                tick_ms=(done_ns - began_ns) / NS_PER_MS,
            )
            running.timing.publish(result.chunk, times)
            self.statistics.record(result.chunk, times.tick_ms, times.sensor_to_action_ms)
            running.core.prepare()  # after the action is out: it makes no action late
        return result

    @property
    def can_rehearse(self) -> bool:
        """Tell whether :meth:`rehearse` is short: no image is compressed, or copied twice."""
        return self._image_take == 'direct' and all(
            self.settings.camera(name).transport == 'raw' for name in self.robot.camera_names
        )

    def rehearse(self) -> None:
        """Take what has come, and go through the next tick up to the model; see the core."""
        running = self._running()
        now_ns = self._node.get_clock().now().nanoseconds
        running.core.advance(now_ns)
        self._feeds.poll()
        running.core.rehearse(now_ns)

    def statuses(self, is_active: bool, clock_stopped: bool) -> list[status.Status]:
        """Return what there is to say about inputs, pipeline, actions, model and GPU."""
        inputs, settings = self._inputs, self.settings
        now_ns = self._node.get_clock().now().nanoseconds
        if self.running is not None:
            # Ages as of now, not of the last tick; and while inactive no tick looks at the inputs.
            self.running.core.advance(now_ns)
            self._feeds.poll()
            inputs.observation(settings.stamp_source)
        feeds = self._feeds.by_name.items()
        lost = {name: feed.lost for name, feed in feeds}
        faults = {name: feed.fault for name, feed in feeds if feed.fault}
        of_inputs = status.inputs_status(
            inputs, settings, now_ns, lost, faults, self._describe_take()
        )
        if self.running is None:
            return [of_inputs, *map(status.not_configured, status.MODEL_PARTS)]
        info, core = self.running.policy.info, self.running.core
        output = self.running.output
        return [
            of_inputs,
            status.pipeline_status(self.statistics, settings, info.stage_backends, info.device),
            status.action_status(
                core,
                self.statistics,
                status.OutputView(output.topic, output.listeners, self.limits_from),
                is_active,
                now_ns,
                clock_stopped,
            ),
            status.model_status(info.as_dict(), settings, inputs.prompt.text),
            self.running.gpu.status(),
        ]

    def _running(self) -> Running:
        assert self.running is not None, 'the session is not open'
        return self.running

    def _rehearse_answer(self) -> None:
        """Go through what follows the model with the last actions, while the device computes."""
        if self.running is not None:
            chunk = self.running.core.rehearse_answer()
            if chunk is not None:
                self.running.output.rehearse(chunk)

    def _on_stall(self) -> None:
        """Act for the watchdog, in its thread."""
        running, settings = self._running(), self.settings
        running.core.counters.watchdog_trips += 1
        if not settings.dry_run:  # in a dry run nothing moves that an old action could disturb
            running.core.interrupt()
        why = f'watchdog: no action in {settings.watchdog_timeout_s:g} s'
        if settings.watchdog_action == 'hold':
            self._hold(why)
        else:
            running.output.release()
        self._node.get_logger().warning(why)

    def _hold(self, why: str) -> None:
        log = self._node.get_logger()
        try:
            if self._running().output.hold(self._inputs.joint_positions()):
                log.info(f'{why}: the robot is commanded to hold its measured position')
        except HoldError as fault:
            log.error(f'{why}: no hold is sent: {fault}')

    def _take_directly(self, policy: Policy) -> None:
        """Have images written into the policy's memory, if that works with the ROS 2 here."""
        if not self._feeds.has_raw_images():
            self._image_take = 'no raw images'
            return
        try:
            rcl = checked_rcl(self._node)
        except DirectTakeError as fault:
            self._image_take = f'{status.SLOW_TAKE}{fault}'
            self._node.get_logger().warning(
                f'images are taken through rclpy, which costs two more copies: {fault}'
            )
            return
        self._feeds.take_directly(rcl, policy.image_buffer)
        self._image_take = 'direct'

    def _describe_take(self) -> str:
        if self._feeds.is_delivered():
            return f'{status.SLOW_TAKE}the executor takes them, and does not heed callback groups'
        return self._image_take

    def _first_observation(self, report: Callable[[str], None]) -> Observation:
        """Wait for one usable message of every sensor: it tells the image sizes.

        Raises:
            InputFault: names the inputs that did not come, or cannot be used, and why.
        """
        inputs, settings = self._inputs, self.settings
        topics = ', '.join(self._feeds.by_name[name].resolved_topic for name in inputs.sensors)
        report(f'waiting up to {settings.input_timeout_s:g} s for {topics}')
        newest: Observation | Skip = Skip(Reason.MISSING_INPUT, '', '')

        def is_complete() -> bool:
            nonlocal newest
            prompt = inputs.prompt.text.strip() or WARM_UP_PROMPT
            newest = inputs.missing() or inputs.observation(settings.stamp_source, prompt)
            return isinstance(newest, Observation)

        self._feeds.wait(is_complete, settings.input_timeout_s)
        if isinstance(newest, Skip):
            raise self._explain(newest)
        return newest

    def _explain(self, skip: Skip) -> InputFault:
        if skip.reason is not Reason.MISSING_INPUT:
            return InputFault(skip.reason, skip.detail)
        reasons = [
            f'{slot.title}: {self._feeds.explain(name)}'
            for name, slot in self._inputs.sensors.items()
            if slot.is_empty
        ]
        waited_s = self.settings.input_timeout_s
        return InputFault(skip.reason, f'nothing came in {waited_s:g} s of {"; ".join(reasons)}')

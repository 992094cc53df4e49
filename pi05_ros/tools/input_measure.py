"""For ``pi05-ros bench-inputs``: what a tick costs the host, from the middleware to the actions.

Cameras and joint states are sent by another process. This one takes them with the node's own
classes, once per tick, and lets a policy act that computes nothing, so that all that remains is
the node's own work. The two ways to take an image are measured by turns, on the same stream.
"""

from __future__ import annotations

import argparse
import array
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import torch
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import get_rmw_implementation_identifier

from pi05_ros.control.core import ControlCore
from pi05_ros.control.inputs import Inputs
from pi05_ros.control.parameters import settings_from_values
from pi05_ros.control.topics import JOINT_STATES
from pi05_ros.engine.pipeline import PipelineShape, StageTimes
from pi05_ros.engine.preprocess import InputBuffers
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import CAMERA_SLOTS, Cameras, RobotSpec, load_robot
from pi05_ros.policy.types import ActionChunk, Observation
from pi05_ros.ros.outputs import ActionOutput, Provenance
from pi05_ros.ros.subscriptions import InputSubscriptions
from pi05_ros.ros.take_check import checked_rcl
from pi05_ros.transport import DEFAULT_PROFILE, profile_environment

from .bench_sensors import JOINT_RATE_HZ
from .demo import private_network
from .processes import Children, children

# How the images are taken.
WAYS = ('direct', 'rclpy')
PARTS = ('take', 'gates, observation', 'into the staging buffer', 'inputs together',
         'guard, encode, publish', 'whole tick')  # fmt: skip
PERCENTS = (50, 95, 99, 100)
# Each way runs this often: changes of the machine's load hit both. Not oftener, as every change of
# the way takes new buffers, which fragments the heap and would look like a leak.
_ROUNDS = 4
_WARM_UP_TICKS = 30
_START_TIMEOUT_S = 20.0
_HORIZON, _PROMPT_TOKENS = 50, 200


class BenchError(Pi05Error):
    """The benchmark cannot run."""


@dataclass
class Received:
    """Messages of one input: the publisher's count of them, and how many a tick got."""

    taken: int = 0
    first: int | None = None
    last: int = 0
    lost: int | None = 0

    @property
    def sent(self) -> int:
        """Messages that the publisher sent between the first and the last that was taken."""
        return 0 if self.first is None else self.last - self.first + 1


@dataclass
class InputsReport:
    """Times in ms by way and part, of every tick that acted; memory in MiB, now and then."""

    subject: dict[str, str]
    times_ms: dict[str, dict[str, array.array]]
    received: dict[str, Received]
    skipped: dict[str, int] = field(default_factory=dict)
    rss_mib: list[float] = field(default_factory=list)

    def percentile_ms(self, way: str, part: str, percent: float) -> float:
        """Return a percentile; NaN if no tick acted."""
        values = self.times_ms[way][part]
        return float(np.percentile(values, percent)) if values else float('nan')

    def as_json(self) -> dict[str, Any]:
        """Return plain data, with percentiles instead of every tick."""
        plain = asdict(self)
        plain['times_ms'] = {
            way: {part: {p: self.percentile_ms(way, part, p) for p in PERCENTS} for part in parts}
            for way, parts in self.times_ms.items()
        }
        return plain


class IdlePolicy:
    """Brings a call's inputs to where the GPU reads them, and moves no joint."""

    def __init__(self, robot: RobotSpec, size_px: tuple[int, int], device: str) -> None:
        config = Pi05Config.full()
        shape = PipelineShape((size_px,) * len(robot.camera_names), _PROMPT_TOKENS, _HORIZON)
        self.buffers = InputBuffers(config, shape, torch.device(device))
        self.staging_ms = 0.0
        self._robot = robot
        self._times = StageTimes(*[0.0] * 7)

    def prepare(self, *, tick: int, seed: int) -> None:
        """Do nothing: the noise is always the same."""

    def rehearse(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> None:
        """Do nothing: each way's first copy of the inputs is what is measured."""

    def act(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> ActionChunk:
        """Return a chunk of the measured state."""
        began_ns = time.perf_counter_ns()
        images = [observation.images[name] for name in self._robot.camera_names]
        self.buffers.place_images(images)
        self.staging_ms = (time.perf_counter_ns() - began_ns) / 1e6
        row = np.resize(observation.state, self._robot.action_dim).astype(np.float32)
        return ActionChunk(
            actions=np.tile(row, (_HORIZON, 1)),
            names=self._robot.action_names,
            step_s=self._robot.step_s,
            stamp_ns=observation.oldest_stamp_ns,
            stamps_ns=dict(observation.stamps_ns),
            tick=tick,
            seed=seed,
            num_steps=num_steps or 10,
            prompt=observation.prompt,
            times=self._times,
        )


class Subject:
    """The parts of the node that a tick runs through, with a policy that does nothing."""

    def __init__(self, node: LifecycleNode, robot: RobotSpec, args: argparse.Namespace) -> None:
        # A busy machine is late now and then; here it is to be measured, not to be refused.
        patient = dict.fromkeys(('max_image_age_ms', 'max_joint_age_ms', 'max_skew_ms'), 60_000.0)
        values = {'checkpoint': 'none', 'prompt': 'measure', 'rate_hz': args.rate_hz, **patient}
        self.settings = settings_from_values(values, robot.camera_names)
        self.node = node
        self.inputs = Inputs(robot, self.settings)
        self.received = {name: Received() for name in self.inputs.sensors}
        self.feeds = InputSubscriptions(node, self.inputs.topics, self._push)
        self.policy = IdlePolicy(robot, args.image_size, args.device)
        self.core = ControlCore(self.inputs, self.policy, self.settings)
        origin = Provenance('0' * 64, 'none', 'none', robot.action_units)
        self.output = ActionOutput(node, robot, 'action_chunk', origin, dry_run=True)
        self.rcl = checked_rcl(node)

    def choose(self, way: str) -> None:
        """Take images directly, or through rclpy."""
        if way == 'direct':
            self.feeds.take_directly(self.rcl, self.policy.buffers.image_buffer)
        else:
            self.feeds.take_through_rclpy()

    def tick(self) -> dict[str, float] | None:
        """Tick as the node does; return the ms of each part, or None if it did not act."""
        began_ns = time.perf_counter_ns()
        now_ns = self.node.get_clock().now().nanoseconds
        self.core.advance(now_ns)
        self.feeds.poll()
        taken_ns = time.perf_counter_ns()
        result = self.core.tick(now_ns)
        if result.chunk is None:
            return None
        self.output.publish(result.chunk)
        whole_ms = (time.perf_counter_ns() - began_ns) / 1e6
        take_ms = (taken_ns - began_ns) / 1e6
        inputs_ms = take_ms + result.gate_ms + self.policy.staging_ms
        values = (take_ms, result.gate_ms, self.policy.staging_ms, inputs_ms,
                  whole_ms - inputs_ms, whole_ms)  # fmt: skip
        return dict(zip(PARTS, values, strict=True))

    def close(self) -> None:
        """Remove everything from the node."""
        self.feeds.destroy()
        self.output.destroy()

    def _push(
        self, name: str, raw: bytes | memoryview, receive_ns: int, sequence: int | None = None
    ) -> None:
        self.inputs.push(name, raw, receive_ns, sequence)
        if name in self.received and sequence is not None:
            count = self.received[name]
            count.taken += 1
            count.first = sequence if count.first is None else count.first
            count.last = sequence


def measure(args: argparse.Namespace) -> InputsReport:
    """Run senders and ticks for ``args.duration_s``.

    Raises:
        Pi05Error: nothing arrives, or images cannot be taken directly.
    """
    robot = _robot(args.views)
    os.environ.update(private_network() | profile_environment(DEFAULT_PROFILE))
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)  # Ctrl-C is to end this
    # Nobody else's cameras.
    node = LifecycleNode('bench_inputs', namespace=f'bench_{os.getpid()}')
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    node.trigger_configure()
    node.trigger_activate()  # its publishers send nothing before
    try:
        with tempfile.TemporaryDirectory() as folder, children() as group:
            subject = Subject(node, robot, args)
            _start_senders(group, node.get_namespace(), robot, args, Path(folder) / 'sensors.log')
            report = _measure(subject, executor, group, args)
            subject.close()
            return report
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


def _measure(
    subject: Subject, executor: SingleThreadedExecutor, group: Children, args: argparse.Namespace
) -> InputsReport:
    _wait_for_inputs(subject, group)
    ticker = Ticker(subject, executor, args.rate_hz)
    for way in WAYS:
        ticker.run(way, _WARM_UP_TICKS / args.rate_hz)
    ticker.times_ms = _no_times()
    subject.core.start()
    for count in subject.received.values():
        count.taken, count.first = 0, None
    report = InputsReport(_describe(args), ticker.times_ms, subject.received)
    report.rss_mib.append(_rss_mib())
    lost = {name: subject.feeds.by_name[name].lost for name in subject.received}
    for _ in range(_ROUNDS):
        for way in WAYS:
            ticker.run(way, args.duration_s / (_ROUNDS * len(WAYS)))
            group.running[0].check()
        report.rss_mib.append(_rss_mib())
    for name, count in subject.received.items():
        now_lost, before = subject.feeds.by_name[name].lost, lost[name]
        count.lost = None if now_lost is None or before is None else now_lost - before
    report.skipped = {str(why): n for why, n in subject.core.counters.skips.items()}
    return report


class Ticker:
    """Ticks at a steady rate and keeps the times of the ticks that acted."""

    def __init__(self, subject: Subject, executor: SingleThreadedExecutor, rate_hz: float) -> None:
        self.times_ms = _no_times()
        self._subject = subject
        self._executor = executor
        self._period_s = 1.0 / rate_hz

    def run(self, way: str, duration_s: float) -> None:
        """Tick for a while with one way to take images."""
        self._subject.choose(way)
        due_s = time.monotonic()
        end_s = due_s + duration_s
        while due_s < end_s:
            time.sleep(max(0.0, due_s - time.monotonic()))
            times_ms = self._subject.tick()
            for part, value_ms in (times_ms or {}).items():
                self.times_ms[way][part].append(value_ms)
            self._executor.spin_once(timeout_sec=0)  # the events that count what is lost
            due_s = max(due_s + self._period_s, time.monotonic())


def _no_times() -> dict[str, dict[str, array.array]]:
    return {way: {part: array.array('d') for part in PARTS} for way in WAYS}


def _robot(views: int) -> RobotSpec:
    """Return the Franka with as many cameras."""
    if views > len(CAMERA_SLOTS):
        raise BenchError(f'{views} views, but the model has {len(CAMERA_SLOTS)}; ask for fewer')
    cameras = {slot: f'camera_{index}' for index, slot in enumerate(CAMERA_SLOTS[:views])}
    return load_robot('franka').model_copy(update={'cameras': Cameras(**cameras)})


def _start_senders(
    group: Children, namespace: str, robot: RobotSpec, args: argparse.Namespace, log_path: Path
) -> None:
    height, width = args.image_size
    command = [
        sys.executable, '-m', 'pi05_ros.tools.bench_sensors',
        '--robot', robot.name, '--cameras', *robot.camera_names, '--transport', 'raw',
        '--width', str(width), '--height', str(height), '--encoding', args.encoding,
        '--camera-rate-hz', str(args.rate_hz), '--prefix', namespace,
    ]  # fmt: skip
    group.start('senders', command, os.environ, log_path)


def _wait_for_inputs(subject: Subject, group: Children) -> None:
    def has_come() -> bool:
        group.running[0].check()
        return subject.inputs.missing() is None

    if not subject.feeds.wait(has_come, _START_TIMEOUT_S):
        raise BenchError(f'{subject.inputs.missing()} in {_START_TIMEOUT_S:g} s')
    subject.inputs.fix_sizes()


def _describe(args: argparse.Namespace) -> dict[str, str]:
    height, width = args.image_size
    images = f'{args.views} x {width}x{height} {args.encoding} at {args.rate_hz:g} Hz'
    return {
        'inputs': f'{images}, {JOINT_STATES} at {JOINT_RATE_HZ:g} Hz',
        'ticks': f'{args.rate_hz:g} Hz for {args.duration_s:g} s, both ways by turns',
        'staging': 'page-locked' if args.device.startswith('cuda') else 'plain memory (no GPU)',
        'middleware': f'{get_rmw_implementation_identifier()}, profile {DEFAULT_PROFILE}',
        'machine': f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start',
    }


def _rss_mib() -> float:
    """Return the memory of this process that is in RAM."""
    pages = int(Path('/proc/self/statm').read_text(encoding='ascii').split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20

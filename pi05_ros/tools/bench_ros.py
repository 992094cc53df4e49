"""``pi05-ros bench --ros``: from the camera's stamp to the action in a subscriber.

Sensors and node are two further processes, as on a robot; this one drives the node's lifecycle
and receives its actions. Topics are remapped below ``/pi05_bench``, so that no robot hears them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pi05_ros import __version__
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import RobotSpec, load_robot
from pi05_ros.resources import config_dir
from pi05_ros.transport import DEFAULT_PROFILE, profile_environment

from .demo import CPU_RATE_HZ, private_network
from .processes import children
from .terminal import make_console, positive

PREFIX = '/pi05_bench'
TASK = 'pick up the cup'
ALL_SIZES = ((224, 224), (480, 640), (720, 1280))  # (height, width)
TRANSPORTS = ('raw', 'compressed')
GPU_RATE_HZ = 60.0
CONFIGURE_PATIENCE_S = 300.0
# Random actions of the full model jump further than the tiny one's, and the time since the action
# before is short here: a tenth of the shipped statistics keeps the limits of the robot file.
ACTION_SCALE = 0.1
_FULL_CHECKPOINT_BYTES = 8e9
# Options of ``bench`` that have no meaning with --ros, and those that have none without it.
_ENGINE_ONLY = ('cases', 'views', 'prompt_tokens', 'iterations', 'horizon', 'image_size',
                'no_oracle', 'no_sweep')  # fmt: skip
_ROS_ONLY = ('sizes', 'transports', 'duration_s', 'rates', 'window_s', 'camera_rate_hz',
             'action_interface', 'fastdds_profile', 'robot', 'time_limit_s',
             'ros_args')  # fmt: skip


class BenchError(Pi05Error):
    """The measurement cannot be made as asked for, or its figures contradict each other."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--ros`` and what belongs to it, and the rate, which means the same without it."""
    parser.add_argument('--rate-hz', type=_rates, default=(), metavar='HZ,...',
                        help='control ticks per second: measure calls at these rates, too; '
                        'with --ros the tick of the node, one (full: 60; tiny: 5)')  # fmt: skip
    group = parser.add_argument_group('the running node, with cameras and a subscriber')
    group.add_argument('--ros', action='store_true', help='measure from camera to action instead')
    group.add_argument('--sizes', type=_sizes, metavar='WxH,...', help='of the camera images '
                       '(full: 640x480; tiny: 224x224,640x480,1280x720)')  # fmt: skip
    group.add_argument('--transports', type=_transports, metavar='NAME,...',
                       help='of raw, compressed (full: raw; tiny: both)')  # fmt: skip
    for name, default, text in (
        ('duration-s', 10.0, 'how long it acts at --rate-hz'),
        ('window-s', 5.0, 'how long it acts at each of --rates'),
        ('camera-rate-hz', 30.0, 'images per second and camera'),
        ('time-limit-s', 900.0, 'begin nothing new after so long'),
    ):
        group.add_argument(f'--{name}', type=positive, default=default, metavar='X',
                           help=f'{text} ({default:g})')  # fmt: skip
    group.add_argument('--rates', type=_rates, default=(), metavar='HZ,...',
                       help='then find the highest of these with < 1 %% skips')  # fmt: skip
    group.add_argument('--action-interface', choices=('joint_trajectory', 'action_chunk'),
                       default='joint_trajectory', help='joint_trajectory')  # fmt: skip
    group.add_argument('--fastdds-profile', default=DEFAULT_PROFILE, metavar='NAME',
                       help='of all processes: large_images (default), large_data, default, or '
                       'the path of an XML profile')  # fmt: skip
    group.add_argument('--robot', default='franka', help='robot file (franka)')
    group.add_argument('--ros-args', nargs=argparse.REMAINDER, default=[],
                       help='last: ROS arguments for the node, e.g. -p seed:=3')  # fmt: skip


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would be ignored.

    Raises:
        BenchError: names them.
    """
    from .cli import build_parser

    defaults = build_parser(('bench',)).parse_args(['bench'])
    useless = _ENGINE_ONLY if args.ros else _ROS_ONLY
    given = [name for name in useless if getattr(args, name) != getattr(defaults, name)]
    if given:
        options = ', '.join(f'--{name.replace("_", "-")}' for name in given)
        raise BenchError(f'{options}: {"not used with" if args.ros else "only used with"} --ros')
    if args.ros and len(args.rate_hz) > 1:
        raise BenchError(f'{len(args.rate_hz)} values of --rate-hz: the node of --ros ticks at '
                         'one rate; list further ones with --rates')  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure every size and transport that was asked for; return the exit status.

    It is 1 where something could not be measured, or counts contradict each other.
    """
    console = make_console()
    robot = load_robot(args.robot)
    if args.checkpoint:
        open_checkpoint(args.checkpoint)
    os.environ.update(private_network() | profile_environment(args.fastdds_profile))
    with children() as group, _work_directory(args) as directory:
        bench = RosBench(args, robot, directory, group, console)
        try:
            return bench.run()
        finally:
            group.stop()  # the node reads the checkpoint in that directory


class RosBench:
    """One run: what is started, what was measured so far.

    Args:
        directory: for the checkpoint, parameters and logs.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        robot: RobotSpec,
        directory: Path,
        group: Any,
        console: Console,
    ) -> None:
        self.args = args
        self.size = args.size or ('full' if _has_cuda() else 'tiny')
        self._is_small = self.size == 'tiny' and not args.checkpoint
        self._robot = robot
        self._directory = directory
        self._group = group
        self._console = console
        self._end_s = time.monotonic() + args.time_limit_s
        self.windows: list[Any] = []
        self.failures: list[Any] = []
        self.subject: dict[str, str] = {'version': f'pi05_ros {__version__}'}

    def run(self) -> int:
        """Measure one configuration after the other; print and write after each window."""
        import rclpy
        from rclpy.signals import SignalHandlerOptions

        from .latency_report import Failure

        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        try:
            for inputs in self._inputs():
                try:
                    self._measure(inputs)
                except Pi05Error as error:
                    self.failures.append(Failure(str(inputs), str(error)))
                    self._say(f'{inputs}: {error}')
                    self._say_tail()
                    self._write()
                finally:
                    self._group.stop()
        finally:
            rclpy.try_shutdown()
        return self._conclude()

    def _inputs(self) -> list[Any]:
        from .latency_probe import Inputs

        sizes = self.args.sizes or (ALL_SIZES if self._is_small else ((480, 640),))
        transports = self.args.transports or (TRANSPORTS if self._is_small else ('raw',))
        return [Inputs(size, transport) for size in sizes for transport in transports]

    def _measure(self, inputs: Any) -> None:
        """Start sensors and node for these inputs, and run every window on them."""
        import rclpy

        from .latency_probe import LatencyProbe

        self._check_time(inputs)
        self._start_sensors(inputs)
        self._start_node(inputs)
        self._make_checkpoint()
        node = rclpy.create_node('pi05_bench', enable_rosout=False, start_parameter_services=False)
        probe = LatencyProbe(node, self.args.action_interface, PREFIX)
        try:
            probe.monitor.idle_calls.append(self._check_children)
            began_s = time.monotonic()
            probe.configure(min(CONFIGURE_PATIENCE_S, max(self._end_s - began_s, 1.0)))
            self._describe(probe.monitor)
            self._say(f'{inputs}: configured in {time.monotonic() - began_s:.1f} s')
            self._run_windows(probe, inputs)
        finally:
            probe.close()

    def _run_windows(self, probe: Any, inputs: Any) -> None:
        from .latency_report import parts_table

        window = probe.run(inputs, self._rate_hz, self.args.duration_s)
        self._keep(window)
        self._console.print(parts_table(window))
        for rate_hz in self.args.rates:
            self._check_time(inputs)
            window = probe.run(inputs, rate_hz, self.args.window_s)
            self._keep(window)

    @property
    def _rate_hz(self) -> float:
        default_hz = CPU_RATE_HZ if self._is_small else GPU_RATE_HZ
        return self.args.rate_hz[0] if self.args.rate_hz else default_hz

    def _keep(self, window: Any) -> None:
        self.windows.append(window)
        self._say(window.line())
        for problem in window.problems():
            self._say(f'{window.inputs}: {problem}')
        self._write()

    def _conclude(self) -> int:
        from .latency_report import highest_rates, save_plot

        if self.args.rates:
            for inputs, rate_hz in highest_rates(self.windows).items():
                held = 'none' if rate_hz is None else f'{rate_hz:g} Hz'
                self._say(f'{inputs}: highest rate with less than 1 % skipped: {held}')
        if self.args.plot:
            save_plot(self.subject, self.windows, self.args.plot)
        problems = [problem for window in self.windows for problem in window.problems()]
        return 1 if self.failures or problems else 0

    def _start_sensors(self, inputs: Any) -> None:
        height, width = inputs.size_px
        command = [
            sys.executable, '-m', 'pi05_ros.tools.bench_sensors', '--robot', self.args.robot,
            '--width', str(width), '--height', str(height), '--transport', inputs.transport,
            '--camera-rate-hz', str(self.args.camera_rate_hz), '--prefix', PREFIX,
        ]  # fmt: skip
        self._start('sensors', command)

    def _start_node(self, inputs: Any) -> None:
        args = self.args
        cameras = {name: {'transport': inputs.transport} for name in self._robot.camera_names}
        parameters: dict[str, Any] = {
            'checkpoint': str(self._checkpoint), 'robot': args.robot, 'prompt': TASK,
            'dry_run': False, 'action_interface': args.action_interface,
            'rate_hz': self._rate_hz, 'num_steps': args.steps, 'backend': args.backend,
            'device': args.device, 'precision': args.precision or 'auto', 'cameras': cameras,
        }  # fmt: skip
        file = self._directory / 'parameters.yaml'
        file.write_text(yaml.safe_dump({'/**': {'ros__parameters': parameters}}))
        remaps = []
        for topic in _relative_topics(self._robot):
            remaps += ['-r', f'{topic}:={PREFIX}/{topic}']
        command = [
            sys.executable, '-m', 'pi05_ros.policy_node', '--ros-args',
            '--params-file', str(config_dir() / 'policy.yaml'), '--params-file', str(file),
            *remaps, *args.ros_args,
        ]  # fmt: skip
        self._start('policy node', command)

    def _start(self, name: str, command: list[str]) -> None:
        log = self._directory / f'{name.replace(" ", "_")}.log'
        self._group.start(name, command, os.environ | {'PYTHONUNBUFFERED': '1'}, log)

    @property
    def _checkpoint(self) -> Path:
        given = self.args.checkpoint
        return Path(given).resolve() if given else self._directory / 'checkpoint'

    def _make_checkpoint(self) -> None:
        """Make a random checkpoint, once; the processes start meanwhile."""
        if self.args.checkpoint or self._checkpoint.exists():
            return
        from .random_checkpoint import make_checkpoint

        began_s = time.monotonic()
        make_checkpoint(self.size, self._checkpoint, seed=0)
        _scale_actions(self._checkpoint, ACTION_SCALE)
        self._say(f'made a {self.size} checkpoint of random weights in '
                  f'{time.monotonic() - began_s:.1f} s: the actions mean nothing')  # fmt: skip

    def _describe(self, monitor: Any) -> None:
        """Take down what runs."""
        monitor.wait(lambda: monitor.value('Model', 'device') != '', 2.0)
        weights = str(self._checkpoint) if self.args.checkpoint else f'random ({self.size})'
        gpu = monitor.value('GPU', 'name')
        self.subject |= {
            'weights': weights,
            'device': gpu if gpu and gpu != 'n/a' else monitor.value('Model', 'device'),
            'backend': monitor.value('Pipeline', 'denoise backend'),
            'precision': monitor.value('Model', 'precision'),
            'steps': f'{monitor.value("Model", "num_steps")} steps',
            'cameras': f'cameras at {self.args.camera_rate_hz:g} Hz',
            'middleware': f'{monitor.value("Lifecycle", "RMW")}, {self.args.fastdds_profile}',
            'action': self.args.action_interface,
        }
        if not self.windows:
            self._say(', '.join(self.subject.values()))

    def _write(self) -> None:
        from .latency_report import write_json

        if self.args.json:
            write_json(self.args.json, self.subject, self.windows, self.failures)

    def _check_time(self, inputs: Any) -> None:
        if time.monotonic() > self._end_s:
            raise BenchError(
                f'--time-limit-s {self.args.time_limit_s:g} is over; what is left of {inputs} '
                'was not measured'
            )

    def _check_children(self) -> None:
        for child in self._group.running:
            child.check()

    def _say_tail(self) -> None:
        """Show the end of what the node said, if it was started."""
        for child in self._group.running:
            if child.name == 'policy node':
                self._say(f'the end of its log:\n{child.tail()}')

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _work_directory(args: argparse.Namespace) -> Iterator[Path]:
    """Return a directory that is gone afterwards; in memory where a full checkpoint fits there."""
    memory = Path('/dev/shm')
    is_full = not args.checkpoint and (args.size == 'full' or (not args.size and _has_cuda()))
    parent = memory if is_full and _free_bytes(memory) > 2 * _FULL_CHECKPOINT_BYTES else None
    with tempfile.TemporaryDirectory(prefix='pi05_bench_', dir=parent) as name:
        yield Path(name)


def _free_bytes(directory: Path) -> int:
    if not directory.is_dir():
        return 0
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize


def _scale_actions(checkpoint: Path, factor: float) -> None:
    """Make the random actions of a checkpoint smaller by a factor."""
    for file in checkpoint.glob('assets/*/norm_stats.json'):
        stats = json.loads(file.read_text(encoding='utf-8'))
        actions = stats['norm_stats']['actions']
        for name, values in actions.items():
            actions[name] = [factor * value for value in values]
        file.write_text(json.dumps(stats, indent=2) + '\n', encoding='utf-8')


def _relative_topics(robot: RobotSpec) -> list[str]:
    """Return every relative topic of the node: what it hears, and what it commands."""
    topics = ['joint_states', 'eef_pose', 'task_prompt', 'joint_trajectory', 'commands']
    for camera in robot.camera_names:
        image = f'camera/{camera}/image_raw'
        topics += [image, f'{image}/compressed']
    return topics


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Read WxH,WxH into ((height, width), ...)."""
    sizes = []
    for part in text.lower().split(','):
        width, _, height = part.partition('x')
        if not (width.isdigit() and height.isdigit() and min(int(width), int(height)) > 0):
            raise argparse.ArgumentTypeError(f'{part!r} is not WIDTHxHEIGHT, e.g. 640x480')
        sizes.append((int(height), int(width)))
    return tuple(sizes)


def _transports(text: str) -> tuple[str, ...]:
    names = tuple(text.split(','))
    for name in names:
        if name not in TRANSPORTS:
            raise argparse.ArgumentTypeError(f'{name!r} is not one of {", ".join(TRANSPORTS)}')
    return names


def _rates(text: str) -> tuple[float, ...]:
    return tuple(positive(part) for part in text.split(','))

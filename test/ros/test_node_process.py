"""The node as a process of its own with a real (tiny) checkpoint; the sensors are in this one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rclpy
from helpers import TASK, CameraScript, Observer, ProcessBench, Sensors
from lifecycle_msgs.msg import Transition

from pi05_ros.tools.random_checkpoint import make_checkpoint

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

CONFIGURE = Transition.TRANSITION_CONFIGURE
ACTIVATE = Transition.TRANSITION_ACTIVATE
DEADLINE_S = 30.0
STOP_DEADLINE_S = 10.0


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('checkpoint') / 'tiny'
    make_checkpoint('tiny', out, seed=0)
    return out


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ProcessBench]]:
    """Start the node's process with some parameters; killed after the test if it still runs."""
    benches: list[ProcessBench] = []

    def start_node(*arguments: str, **parameters: object) -> ProcessBench:
        command = [sys.executable, '-m', 'pi05_ros.policy_node', '--ros-args', *arguments]
        for name, value in parameters.items():
            command += ['-p', f'{name.replace("__", ".")}:={value}']
        log = tmp_path / f'node{len(benches)}.log'
        with log.open('wb') as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        observer = Observer(rclpy.create_node('test_observer')).listen()
        benches.append(ProcessBench(process, log, Sensors(), observer))
        return benches[-1]

    yield start_node
    for made in benches:
        made.process.kill()
        made.process.wait()
        made.close()


def stop(b: ProcessBench, number: signal.Signals = signal.SIGINT) -> int:
    b.process.send_signal(number)
    return b.process.wait(timeout=STOP_DEADLINE_S)


def test_real_checkpoint_acts_and_sigint_ends_the_active_node(start, checkpoint):
    b = start(checkpoint=checkpoint, prompt=f'"{TASK}"', rate_hz=5.0, max_image_age_ms=1000.0)
    assert b.change_state(CONFIGURE)
    assert b.change_state(ACTIVATE)
    assert 'active: dry run on /pi05_policy/dry_run/action_chunk at 5 Hz' in b.log_text()
    b.until(lambda: len(b.observer.chunks) >= 3)
    chunk = b.observer.chunks[-1]
    assert chunk.prompt == TASK
    assert (chunk.backend, chunk.precision) == ('eager', 'float32')
    assert len(chunk.checkpoint_sha256) == 64
    assert len(chunk.actions) == chunk.horizon * len(chunk.names)
    b.until(lambda: b.observer.message('Inputs') == 'all inputs fresh')
    b.until(lambda: 'tick' in b.observer.message('Pipeline'))
    assert float(b.observer.values('Pipeline')['vision p50 (ms)']) > 0.0
    assert stop(b) == 0
    assert 'Traceback' not in b.log_text()


def test_sigint_breaks_off_a_configure_that_waits_for_a_camera(start, checkpoint):
    b = start(checkpoint=checkpoint, input_timeout_s=300.0)
    b.sensors.cameras['wrist'].running = False
    b.request_state(CONFIGURE)
    b.until(lambda: 'waiting up to 300 s' in b.observer.message('Lifecycle'))
    assert stop(b) == 0
    assert 'broken off, the process was asked to stop' in b.log_text()
    assert 'Traceback' not in b.log_text()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_unconfigured_node(start, number):
    b = start()
    b.until(lambda: b.observer.message('Lifecycle') == 'unconfigured')
    assert stop(b, number) == 0
    assert 'Traceback' not in b.log_text()


def test_unknown_parameter_is_refused_and_the_node_lives_on(start):
    b = start(promt='typo')
    assert not b.change_state(CONFIGURE)
    assert 'configure failed: unknown parameter promt; did you mean prompt?' in b.log_text()
    assert b.process.poll() is None


def test_camera_topic_of_another_type_is_named(start, checkpoint):
    b = start(
        '-r',
        'camera/wrist/image_raw/compressed:=camera/wrist/image_raw',
        checkpoint=checkpoint,
        input_timeout_s=2.0,
        cameras__wrist__transport='compressed',
    )
    assert not b.change_state(CONFIGURE)
    assert (
        '/test_sensors publishes sensor_msgs/msg/Image on /camera/wrist/image_raw, '
        'not sensor_msgs/msg/CompressedImage'
    ) in b.log_text()


def test_faults_of_a_camera_in_another_process_are_named(start, checkpoint):
    b = start(checkpoint=checkpoint, prompt=f'"{TASK}"', rate_hz=5.0, max_image_age_ms=500.0)
    assert b.change_state(CONFIGURE)
    assert b.change_state(ACTIVATE)
    b.until(lambda: b.observer.chunks)
    b.sensors.cameras['wrist'] = CameraScript(size_px=(48, 64))
    b.until(lambda: b.observer.counts().get('bad_image_size'))
    b.sensors.cameras['wrist'] = CameraScript(running=False)
    b.until(lambda: b.observer.counts().get('stale_input'))
    b.sensors.cameras['wrist'] = CameraScript()
    count = len(b.observer.chunks)
    b.until(lambda: len(b.observer.chunks) > count)
    counts = b.observer.counts()
    by_reason = sum(n for name, n in counts.items() if name not in ('ticks', 'actions', 'skipped'))
    assert counts['ticks'] == counts['actions'] + counts['skipped']
    assert counts['skipped'] == by_reason


@pytest.mark.parametrize(
    ('arguments', 'folder', 'said'),
    [
        (['--ros-args', '-p', 'rate_hz'], 'logs', 'rate_hz'),
        ([], 'file/logs', 'log directory'),
    ],
)
def test_why_ros_does_not_start_is_said_without_a_traceback(tmp_path, arguments, folder, said):
    (tmp_path / 'file').touch()
    result = subprocess.run(
        [sys.executable, '-m', 'pi05_ros.policy_node', *arguments],
        env={**os.environ, 'ROS_LOG_DIR': str(tmp_path / folder)},
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.match(f'pi05_ros: ROS 2 does not start: .*{said}', last)
    assert 'Traceback' not in result.stderr

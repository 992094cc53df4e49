"""The launch files under the real `ros2 launch`, with the real node and a recording as cameras.

Skipped, not passed, where launch_ros is not installed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pi05_ros.launch_arguments import ARGUMENTS, DEMO_ARGUMENTS
from pi05_ros.resources import demo_bag
from pi05_ros.transport import DEFAULT_PROFILE, profile_environment

pytest.importorskip('launch_ros', reason='launch_ros is not installed')
ROS2 = shutil.which('ros2', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
if ROS2 is None:
    pytest.skip('ros2 (ros2cli) is not installed', allow_module_level=True)

PATIENCE_S = 60.0
NODE = '/pi05_policy'


def environment() -> dict[str, str]:
    env = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    del env['FASTDDS_BUILTIN_TRANSPORTS']
    env.setdefault('AMENT_PREFIX_PATH', sys.prefix)
    return env


class Process:
    """A child in a process group of its own, which a signal reaches as Ctrl-C would."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self._log = log
        with log.open('w') as stream:
            self.child = subprocess.Popen(
                command, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def interrupt(self) -> int:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGINT)
        return self.child.wait(timeout=PATIENCE_S)

    def kill(self) -> None:
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.child.wait()


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start processes that do not outlive the test."""
    running: list[Process] = []

    def start_one(*command: str, **env: str) -> Process:
        log = tmp_path / f'{len(running)}.log'
        running.append(Process(list(command), log, {**environment(), **env}))
        return running[-1]

    yield start_one
    for process in running:
        process.kill()


@pytest.fixture
def camera(start: Start) -> Process:
    return start(
        sys.executable, '-m', 'pi05_ros.tools.cli', 'play', str(demo_bag()), '--loop',
        **profile_environment(DEFAULT_PROFILE),
    )  # fmt: skip


def ros2(*arguments: str) -> str:
    result = subprocess.run(
        [ROS2, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return result.stdout + result.stderr


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    """Ask again and again: without its daemon, ros2 looks only briefly for a node or a topic."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.child.poll() is None, process.output
        assert time.monotonic() < deadline, process.output


def state() -> str:
    return ros2('lifecycle', 'get', '--no-daemon', NODE).split(' ')[0].strip()


@pytest.mark.parametrize(('name', 'arguments'), [('policy', ARGUMENTS), ('demo', DEMO_ARGUMENTS)])
def test_launch_shows_the_arguments(name, arguments):
    shown = ros2('launch', 'pi05_ros', f'{name}.launch.py', '--show-args')
    names = re.findall(r"^ {4}'(\w+)':$", shown, flags=re.MULTILINE)
    assert set(names) >= {argument.name for argument in arguments}


def test_autostart_takes_the_node_to_active_and_ctrl_c_ends_it_cleanly(
    start, camera, tiny_checkpoint
):
    launch = start(
        ROS2, 'launch', 'pi05_ros', 'policy.launch.py', f'checkpoint:={tiny_checkpoint}'
    )
    wait_for(lambda: state() == 'active', launch)
    diagnostics = ('topic', 'echo', '--no-daemon', '--once', '/diagnostics')
    wait_for(lambda: 'pi05_policy: Pipeline' in ros2(*diagnostics), launch)
    parameters = ('param', 'dump', '--no-daemon', NODE)
    wait_for(lambda: f'checkpoint: {tiny_checkpoint}' in ros2(*parameters), launch)
    assert launch.interrupt() == 0
    assert 'process has finished cleanly' in launch.output
    assert 'Traceback' not in launch.output
    assert camera.interrupt() == 0


def test_without_autostart_the_node_waits_and_a_manual_configure_does_not_activate_it(
    start, camera, tiny_checkpoint
):
    launch = start(
        ROS2, 'launch', 'pi05_ros', 'policy.launch.py', 'autostart:=false',
        f'checkpoint:={tiny_checkpoint}',
    )  # fmt: skip
    wait_for(lambda: state() == 'unconfigured', launch)
    configure = ('lifecycle', 'set', '--no-daemon', NODE, 'configure')
    wait_for(lambda: 'successful' in ros2(*configure), launch)
    seen: list[str] = []
    wait_for(lambda: seen.append(state()) or seen[-1] in ('inactive', 'active'), launch)
    assert seen[-1] == 'inactive'
    assert launch.interrupt() == 0


def test_a_failed_configure_leaves_the_node_there_and_says_why(start, tmp_path):
    launch = start(
        ROS2, 'launch', 'pi05_ros', 'policy.launch.py', f'checkpoint:={tmp_path / "nothing"}'
    )
    for said in ('Failed to make transition', str(tmp_path / 'nothing')):
        wait_for(lambda said=said: said in launch.output, launch)
    wait_for(lambda: state() == 'unconfigured', launch)
    assert launch.interrupt() == 0


@pytest.mark.skipif(
    'diagnostic_aggregator' not in ros2('pkg', 'list').split(),
    reason='diagnostic_aggregator is not installed',
)
def test_the_aggregator_groups_the_diagnostics_of_the_node(start):
    launch = start(
        ROS2, 'launch', 'pi05_ros', 'policy.launch.py', 'autostart:=false',
        'diagnostics_aggregator:=true', 'namespace:=left',
    )  # fmt: skip
    echo = ('topic', 'echo', '--no-daemon', '--once', '/diagnostics_agg')
    wait_for(lambda: '/Robot/π0.5 policy/Lifecycle' in ros2(*echo), launch)
    assert launch.interrupt() == 0


def test_the_demo_acts_on_the_recording(start):
    launch = start(ROS2, 'launch', 'pi05_ros', 'demo.launch.py')
    wait_for(lambda: state() == 'active', launch)
    timing = ('topic', 'echo', '--no-daemon', '--once', f'{NODE}/timing')
    wait_for(lambda: 'vision_ms' in ros2(*timing), launch)
    assert launch.interrupt() == 0

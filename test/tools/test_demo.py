"""The demo as a user starts it: bag player, real node and watcher in three processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from timing_rows import run_report

from pi05_ros.tools.demo import find_problems, private_network

DEADLINE_S = 100
STAGES = ('preprocess', 'vision', 'KV prefill', 'denoise', 'other', 'inference')


def demo_command(out: Path, *arguments: object) -> list[str]:
    command = [sys.executable, '-m', 'pi05_ros.tools.cli', 'demo', '--out', out, *arguments]
    return [str(word) for word in command]


def children_of(pid: int) -> list[int]:
    path = Path(f'/proc/{pid}/task/{pid}/children')
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes of a test; killed after it if they still run."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.ros
@pytest.mark.timeout(150)
def test_demo_ends_by_itself_with_a_table_and_a_picture(tmp_path):
    # Two ticks per second: enough to see everything, and any machine keeps up.
    result = subprocess.run(
        demo_command(tmp_path, '--seconds', 4, '--ros-args', '-p', 'rate_hz:=2.0'),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for stage in STAGES:
        assert f' {stage} ' in result.stdout
    assert 'robot franka, backend eager, device cpu, precision float32' in result.stdout
    assert 'Hz of 2 Hz; skipped: ' in result.stdout
    with Image.open(tmp_path / 'stages.png') as picture:
        picture.verify()


@pytest.mark.ros
def test_a_node_that_refuses_ends_the_demo_with_its_reason(tmp_path):
    empty = tmp_path / 'empty_checkpoint'
    empty.mkdir()
    result = subprocess.run(
        demo_command(tmp_path / 'out', '--checkpoint', empty),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert result.returncode == 1
    assert f'demo failed: configure: no model.safetensors in {empty}' in result.stdout
    assert 'Traceback' not in result.stdout + result.stderr


@pytest.mark.ros
@pytest.mark.timeout(150)
def test_ctrl_c_leaves_no_process_behind(tmp_path, started):
    demo = subprocess.Popen(
        demo_command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    started.append(demo)
    log = tmp_path / 'node.log'
    deadline_s = time.monotonic() + DEADLINE_S
    while not (log.exists() and 'configure' in log.read_text()):
        assert demo.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.05)
    family = children_of(demo.pid)
    assert len(family) == 2
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=DEADLINE_S)
    assert demo.returncode == 130, output
    assert 'Traceback' not in output
    assert [pid for pid in family if is_running(pid)] == []


def test_network_settings_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', '77')
    monkeypatch.delenv('ROS_AUTOMATIC_DISCOVERY_RANGE', raising=False)
    settings = private_network()
    assert settings['ROS_DOMAIN_ID'] == '77'
    assert settings['ROS_AUTOMATIC_DISCOVERY_RANGE'] == 'LOCALHOST'


def test_a_run_without_an_incomplete_observation_has_no_problem():
    assert find_problems(run_report()) == []


def test_ticks_before_all_inputs_came_and_a_rare_overrun_are_no_problem():
    skips = {'missing_input': 8, 'stale_input': 1, 'overrun': 1}
    assert find_problems(run_report(ticks=100, actions=90, received=90, skips=skips)) == []


@pytest.mark.parametrize(
    ('changes', 'complaint'),
    [
        (
            {'actions': 0, 'skips': {'missing_input': 10}},
            'no action in 10 ticks; skipped: mis',
        ),
        (
            {'actions': 9, 'skips': {'inference_failed': 1}},
            'without an action: inference_fail',
        ),
        ({'actions': 9, 'skips': {'overrun': 1}}, 'inference took too long (100 ms for a period'),
        ({'actions': 5, 'skips': {'stale_input': 5}}, 'too few complete observations: stale_inp'),
        ({'actions': 9}, '10 ticks are not 9 actions and 0 skips'),
        ({'received': 8}, 'only 8 of 10 actions arrived here'),
    ],
    ids=['no_action', 'broken', 'too_slow', 'too_few_inputs', 'miscounted', 'not_received'],
)
def test_what_kept_the_node_from_acting_is_named(changes, complaint):
    report = run_report(**{'received': changes.get('actions', 10), **changes})
    assert any(complaint in problem for problem in find_problems(report))

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pi05_ros.tools import processes
from pi05_ros.tools.processes import ProcessError, children, wait_until

DEADLINE_S = 20
STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print('ready', flush=True)
time.sleep(600)
"""


def exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def python(code: str) -> list[str]:
    return [sys.executable, '-c', textwrap.dedent(code)]


def test_a_polite_child_ends_by_sigint_and_may_say_goodbye(tmp_path):
    code = """
        import time
        print('ready', flush=True)
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print('goodbye')
    """
    with children() as group:
        child = group.start('polite', python(code), os.environ, tmp_path / 'log')
        assert wait_until(lambda: 'ready' in child.tail(), DEADLINE_S)
    assert child.exit_code == 0
    assert child.tail().endswith('goodbye')


def test_a_child_that_ignores_signals_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    ladder = tuple((number, 0.2) for number, _ in processes.STOP_LADDER[:2])
    monkeypatch.setattr(processes, 'STOP_LADDER', (*ladder, processes.STOP_LADDER[2]))
    with children() as group:
        child = group.start('stubborn', python(STUBBORN), os.environ, tmp_path / 'log')
        assert wait_until(lambda: 'ready' in child.tail(), DEADLINE_S)
    assert child.exit_code == -signal.SIGKILL
    assert not exists(child.pid)


def test_children_are_stopped_when_the_block_raises(tmp_path):
    def fail_with_a_child() -> None:
        with children() as group:
            started.append(
                group.start('sleeper', python('import time; time.sleep(600)'), os.environ, log)
            )
            raise RuntimeError('something else broke')

    started: list = []
    log = tmp_path / 'log'
    with pytest.raises(RuntimeError, match='something else broke'):
        fail_with_a_child()
    assert not exists(started[0].pid)


def test_a_child_that_ended_is_reported_with_its_last_words(tmp_path):
    with children() as group:
        code = 'import sys; print("no such checkpoint"); sys.exit(3)'
        child = group.start('node', python(code), os.environ, tmp_path / 'log')
        assert wait_until(lambda: child.exit_code is not None, DEADLINE_S)
        with pytest.raises(ProcessError, match='(?s)node ended with exit code 3.*no such check'):
            child.check()


def start_command_with_a_child(tmp_path: Path) -> tuple[subprocess.Popen, int]:
    """Return a running command and the process id of its child."""
    code = f"""
        import os, sys, time
        from pathlib import Path
        from pi05_ros.tools.processes import children
        log = Path({str(tmp_path)!r}, 'log')
        try:
            with children() as group:
                child = group.start('sleeper', ['sleep', '600'], os.environ, log)
                print(child.pid, flush=True)
                time.sleep(600)
        except KeyboardInterrupt:
            sys.exit(130)
    """
    command = subprocess.Popen(
        python(code), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert command.stdout is not None
    pid = int(command.stdout.readline())
    assert exists(pid)
    return command, pid


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_command_leaves_no_process_behind(tmp_path, number):
    command, pid = start_command_with_a_child(tmp_path)
    command.send_signal(number)
    command.communicate(timeout=DEADLINE_S)
    assert command.returncode == 130
    assert not exists(pid)


def test_killing_the_command_outright_leaves_no_process_behind(tmp_path):
    command, pid = start_command_with_a_child(tmp_path)
    command.kill()
    command.communicate(timeout=DEADLINE_S)
    assert wait_until(lambda: not exists(pid), DEADLINE_S)

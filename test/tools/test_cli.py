from __future__ import annotations

import subprocess
import sys

import pytest

from pi05_ros import __version__
from pi05_ros.model.errors import Pi05Error
from pi05_ros.tools import checkpoint, cli


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(['--help'])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f'\n    {command} ' in shown for command in cli.COMMANDS)


@pytest.mark.parametrize('argv', [[], ['fly'], ['parity'], ['checkpoint'], ['checkpoint', 'make']])
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert 'usage: pi05-ros' in capsys.readouterr().err


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(['--version'])
    assert capsys.readouterr().out == f'pi05_ros {__version__}\n'


def test_an_error_that_the_user_can_mend_is_one_message_and_status_2(
    capsys: pytest.CaptureFixture[str],
):
    assert cli.main(['checkpoint', 'inspect', '/nowhere']) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.startswith('pi05-ros checkpoint: checkpoint /nowhere does not exist')


@pytest.mark.parametrize('error,status', [(Pi05Error('no'), 2), (KeyboardInterrupt(), 130)])
def test_status_says_how_a_command_ended(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
):
    def fail(directory: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, 'report_on', fail)
    assert cli.main(['checkpoint', 'inspect', '/nowhere']) == status


def test_an_error_in_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(directory: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, 'report_on', fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(['checkpoint', 'inspect', '/nowhere'])


def test_a_command_imports_no_other():
    """``play`` must not wait for PyTorch, and ``parity`` must not need ROS."""
    program = """
import sys
from pi05_ros.tools import cli
cli.build_parser(['parity'])
assert 'pi05_ros.tools.parity' in sys.modules
assert not any(name in sys.modules for name in ('rclpy', 'pi05_ros.tools.play'))
"""
    subprocess.run([sys.executable, '-c', program], check=True)


def test_the_module_runs_as_the_command():
    run = subprocess.run(
        [sys.executable, '-m', 'pi05_ros.tools', '--version'], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, f'pi05_ros {__version__}\n')

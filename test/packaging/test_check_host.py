"""The set-up says all that a machine lacks, at once and before it downloads anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / 'requirements' / 'check_host.sh'
SHELL = shutil.which('sh')


def check_host(python: str, **env: str) -> tuple[int, str]:
    result = subprocess.run(
        [SHELL, str(SCRIPT), python], env=env, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stderr


@pytest.fixture
def old_python(tmp_path: Path) -> str:
    path = tmp_path / 'python'
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.18\nexit 1\n')
    path.chmod(0o755)
    return str(path)


def test_a_machine_with_everything_passes(tmp_path):
    # Its compilers are stand-ins: the tests also run where the package came as a wheel.
    compiler = shutil.which('true')
    code, message = check_host(sys.executable, PATH='', CC=compiler, CXX=compiler)
    if 'Python.h' in message or 'ensurepip' in message:
        pytest.skip('this Python itself has no headers or no ensurepip')
    assert (code, message) == (0, '')


def test_all_that_is_missing_is_named_with_the_packages_that_have_it():
    code, message = check_host('python-of-nowhere', PATH='')
    assert code == 1
    assert 'python-of-nowhere: not found' in message
    assert 'cc: not found' in message
    assert 'c++: not found' in message
    assert message.endswith('apt install python3 build-essential\n')


def test_an_old_python_is_named_with_its_version(old_python):
    code, message = check_host(old_python, PATH='', CC=SHELL, CXX=SHELL)
    assert code == 1
    assert 'is Python 3.8.18; 3.10 or later is needed' in message
    assert 'apt install' not in message

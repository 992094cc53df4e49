"""Child processes that never outlive the command that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pi05_ros.model.errors import Pi05Error

# What a child is told, and how long it then has to go.
STOP_LADDER: tuple[tuple[signal.Signals, float], ...] = (
    (signal.SIGINT, 5.0),
    (signal.SIGTERM, 3.0),
    (signal.SIGKILL, 5.0),
)
_POLL_S = 0.02

# Loaded here: between fork and exec nothing may be imported.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ProcessError(Pi05Error):
    """A child process ended although it should not have."""


class Child:
    """One process in its own group, so that Ctrl-C reaches it from here and in order only.

    Args:
        name: how people call it.
        log_path: where its stdout and stderr go.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log_path: Path
    ) -> None:
        self.name = name
        self.log_path = log_path
        with log_path.open('wb') as log:
            self._process = subprocess.Popen(
                list(command),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def check(self) -> None:
        """Raise a :class:`ProcessError` with the end of the log if it is not running."""
        if self.exit_code is not None:
            raise ProcessError(
                f'{self.name} ended with exit code {self.exit_code}:\n{self.tail()}'
            )

    def tail(self, lines: int = 15) -> str:
        """Return the last lines of the log."""
        text = self.log_path.read_text(errors='replace')
        return '\n'.join(text.splitlines()[-lines:]) or '(no output)'

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the process and everything that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def group_exists(self) -> bool:
        """Tell whether the process or anything that it started is left."""
        self._process.poll()  # reaps the process itself
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class Children:
    """The processes of one command; stopped together."""

    def __init__(self) -> None:
        self.running: list[Child] = []

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log_path: Path
    ) -> Child:
        """Start a process that is stopped with the others."""
        child = Child(name, command, env, log_path)
        self.running.append(child)
        return child

    def stop(self) -> None:
        """Ask all to stop, then insist; returns when every process group is gone."""
        for number, patience_s in STOP_LADDER:
            self.running = [child for child in self.running if child.group_exists()]
            for child in self.running:
                child.signal_group(number)
            wait_until(lambda: not any(c.group_exists() for c in self.running), patience_s)
        self.running = [child for child in self.running if child.group_exists()]


def _end_with_parent() -> None:
    """Have Linux end this process if its parent is killed and cannot stop it any more."""
    if hasattr(_LIBC, 'prctl'):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def children() -> Iterator[Children]:
    """Start processes inside of this block; all are gone when it is left, however it is left.

    SIGTERM and SIGHUP (a closed terminal) leave the block as Ctrl-C does. While the processes
    stop, further signals wait.
    """
    previous = {
        number: signal.signal(number, _raise_interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    group = Children()
    try:
        yield group
    finally:
        ours = {signal.SIGINT: signal.getsignal(signal.SIGINT), **previous}
        for number in ours:
            signal.signal(number, signal.SIG_IGN)
        try:
            group.stop()
        finally:
            for number, handler in ours.items():
                signal.signal(number, handler)


def wait_until(condition: Callable[[], bool], patience_s: float) -> bool:
    """Poll until the condition holds; False if it does not in time."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt

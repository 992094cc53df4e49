"""Showing progress: redrawn in place on a terminal, plain lines now and then anywhere else."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live

REDRAWS_PER_S = 4
PLAIN_LINE_PERIOD_S = 5.0
# A pipe has no width; rich would assume 80 columns and cut tables.
PIPE_COLUMNS = 110


def make_console() -> Console:
    """Return a console on stdout that is wide enough for tables where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


class Progress:
    """A view that is redrawn while something runs.

    Args:
        draw: returns what a terminal shows.
        line: returns the same as one plain line, for pipes and logs.
    """

    def __init__(
        self,
        console: Console,
        draw: Callable[[], RenderableType],
        line: Callable[[], str],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._line = line
        self._now_s = now_s
        self._next_s = now_s() + PLAIN_LINE_PERIOD_S
        self._live = (
            Live(
                console=console,
                get_renderable=draw,
                refresh_per_second=REDRAWS_PER_S,
                transient=True,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self) -> None:
        """Call often; prints a plain line when one is due. A terminal redraws by itself."""
        if self._live is None and self._now_s() >= self._next_s:
            self._next_s = self._now_s() + PLAIN_LINE_PERIOD_S
            self._console.print(self._line(), highlight=False, markup=False, soft_wrap=True)


def positive(text: str) -> float:
    """Read a command line value that must be a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return value


def positive_count(text: str) -> int:
    """Read a command line value that must be a whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive whole number')
    return value


def image_size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT into (height, width)."""
    try:
        width, height = (int(part) for part in text.lower().split('x'))
    except ValueError:
        width = height = 0
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not WIDTHxHEIGHT, e.g. 640x480')
    return height, width


def output_file(text: str) -> Path:
    """Read a file to write; refuse one that cannot be written before the work, not after it."""
    path = Path(text)
    reason = None
    if not path.parent.is_dir():
        reason = f'{path.parent} is not a directory'
    elif path.is_dir():
        reason = 'it is a directory'
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = 'permission denied'
    if reason:
        raise argparse.ArgumentTypeError(f'cannot write {path}: {reason}')
    return path

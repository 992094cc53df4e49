"""A long fuzzing run of one target, or of all: ``python test/fuzz/campaign.py --seconds 300``.

With atheris installed (``pip install atheris``) the run is guided by coverage; without it, valid
inputs and the corpus are mutated at random. What breaks a target is written to ``--out`` and
reported; a regression test is made of it by moving it into ``test/data/fuzz/<target>/`` under a
name that says what it is.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'test' / 'fuzz')]

MAX_INPUT_BYTES = 32_768
SLOW_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--target', default='all')
    parser.add_argument('--seconds', type=int, default=60, help='per target')
    parser.add_argument('--out', type=Path, default=ROOT / 'build' / 'fuzz')
    parser.add_argument('--plain', action='store_true', help='mutate at random, without atheris')
    options = parser.parse_args()
    if options.target == 'all':
        return _run_all(options)
    guided = not options.plain and _has_atheris()
    campaign = Campaign(options.target, options.out)
    run = campaign.run_guided if guided else campaign.run_plain
    run(options.seconds)
    return 0


def _run_all(options: argparse.Namespace) -> int:
    """Run every target in a process of its own: a crash ends only one."""
    from targets import TARGETS

    worst = 0
    for name in TARGETS:
        command = [sys.executable, __file__, '--target', name, '--seconds', str(options.seconds)]
        command += ['--out', str(options.out), *(['--plain'] if options.plain else [])]
        status = subprocess.run(command).returncode
        if status:
            print(f'{name}: ended with status {status}', flush=True)
        worst = max(worst, abs(status))
    return worst


def _has_atheris() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


class Campaign:
    """Runs one target on many inputs and keeps one input of every kind of failure."""

    def __init__(self, name: str, out: Path) -> None:
        self.name = name
        self.out = out / name
        self.cases = 0
        self.accepted = 0
        self.slowest_s = 0.0
        self.failures: dict[str, str] = {}
        self.deadline = 0.0
        self.started = time.monotonic()

    def load(self) -> list[bytes]:
        """Import the target and return where to start from."""
        from target import corpus_files
        from targets import TARGETS

        self.target = TARGETS[self.name]
        return [*self.target.seeds(), *(path.read_bytes() for path in corpus_files(self.name))]

    def run_plain(self, seconds: int) -> None:
        """Mutate at random."""
        from mutation import mutate

        seeds = self.load()
        randomness = random.Random(time.time_ns())
        self._start(seconds)
        while time.monotonic() < self.deadline:
            data = mutate(randomness, randomness.choice(seeds), seeds)
            self.try_one(data)
        self.report()

    def run_guided(self, seconds: int) -> None:
        """Let libFuzzer choose the inputs; does not return."""
        import atheris

        with atheris.instrument_imports(
            include=['pi05_ros', 'yaml', 'rosbags', 'json'],
            enable_loader_override=False,
        ):
            seeds = self.load()
        corpus = self.out / 'corpus'
        corpus.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)

        def one(data: bytes) -> None:
            if time.monotonic() > self.deadline:
                self.report()
                sys.stdout.flush()
                os._exit(0)
            self.try_one(data)

        arguments = [sys.argv[0], str(corpus), f'-max_len={MAX_INPUT_BYTES}', '-timeout=30']
        arguments += [f'-artifact_prefix={self.out}/', '-rss_limit_mb=6000', '-verbosity=0']
        atheris.Setup(arguments, one)
        self._start(seconds)
        atheris.Fuzz()

    def try_one(self, data: bytes) -> None:
        """Run one input, and note what is neither taken nor refused as documented."""
        began = time.monotonic()
        try:
            self.accepted += self.target.accepts(data)
        except Exception as error:
            self._keep(data, error)
        elapsed_s = time.monotonic() - began
        self.cases += 1
        if elapsed_s > max(SLOW_S, self.slowest_s):
            self._write(f'slow_{elapsed_s:.0f}s', data)
        self.slowest_s = max(self.slowest_s, elapsed_s)

    def report(self) -> None:
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(
            f'{self.name}: {self.cases} cases in {time.monotonic() - self.started:.0f} s, '
            f'{self.accepted} accepted, {len(self.failures)} kinds of failure, slowest '
            f'{self.slowest_s * 1e3:.0f} ms, peak {peak_mib} MiB (at start {self.base_mib} MiB)'
        )
        for where, path in self.failures.items():
            print(f'  {where}  {path}')

    def _start(self, seconds: int) -> None:
        self.base_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self.started = time.monotonic()
        self.deadline = self.started + seconds

    def _keep(self, data: bytes, error: Exception) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if 'pi05_ros' in f.filename]
        place = ours[-1] if ours else frame
        where = f'{type(error).__name__} at {Path(place.filename).name}:{place.lineno}'
        if where not in self.failures:
            name = where.replace(' ', '_').replace(':', '_')
            self.failures[where] = f'{str(error)[:150]!r} {self._write(name, data)}'

    def _write(self, name: str, data: bytes) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / name
        path.write_bytes(data)
        return path


if __name__ == '__main__':
    sys.exit(main())

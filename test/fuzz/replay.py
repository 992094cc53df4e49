"""Run inputs that were worth keeping: ``python test/fuzz/replay.py [TARGET [FILE ...]]``.

Without a file: the corpus of the target; without a target: of all. Exit status 1 where an input
is neither taken nor refused as documented, or takes too much memory; the process ends hard, with
every thread's stack, where one takes too long.
"""

from __future__ import annotations

import faulthandler
import resource
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from target import corpus_files  # noqa: E402 (needs the path)
from targets import TARGETS  # noqa: E402

# Above what the process has after one valid input; a 5000x5000 image takes 75 MiB of it.
MAX_EXTRA_MEMORY_BYTES = 256 << 20
MAX_SECONDS = 60


def limit_memory() -> None:
    """Make every further allocation beyond the limit fail."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    limit_bytes = pages * resource.getpagesize() + MAX_EXTRA_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, resource.RLIM_INFINITY))


def replay(name: str, path: Path) -> str:
    """Run one input and return 'accepted', 'refused', or what went wrong."""
    data = path.read_bytes()
    faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
    try:
        return 'accepted' if TARGETS[name].accepts(data) else 'refused'
    except Exception as error:
        return f'FAILED: {type(error).__name__}: {error}'
    finally:
        faulthandler.cancel_dump_traceback_later()


def main(arguments: list[str]) -> int:
    names = arguments[:1] or list(TARGETS)
    for name in names:
        for seed in TARGETS[name].seeds():  # so that everything is imported and made
            TARGETS[name].accepts(seed)
    limit_memory()
    failed = 0
    for name in names:
        for path in [Path(text) for text in arguments[1:]] or corpus_files(name):
            outcome = replay(name, path)
            failed += outcome.startswith('FAILED')
            print(f'{name}/{path.name}: {outcome}', flush=True)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

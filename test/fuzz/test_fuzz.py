"""Whatever comes from outside is taken or refused with the documented error: no crash, no bomb."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutation import mutate
from target import CORPUS, corpus_files
from targets import TARGETS

FUZZ = Path(__file__).parent
MAX_CORPUS_BYTES = 300_000
# Valid, or not judged by the target; everything else in the corpus has to be refused.
ACCEPTED = {
    'cdr_image/big_endian_valid.cdr',
    'cdr_image/unknown_encoding.cdr',  # left to cv_bridge
    'cdr_prompt/control_characters.cdr',
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=110
    )


@pytest.mark.parametrize('name', TARGETS)
def test_a_target_takes_valid_input(name):
    target = TARGETS[name]
    assert any([target.accepts(seed) for seed in target.seeds()])


@pytest.mark.parametrize('name', TARGETS)
def test_damaged_input_raises_nothing_but_the_documented_error(name):
    seeds = TARGETS[name].seeds() + [path.read_bytes() for path in corpus_files(name)]

    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**64 - 1))
    def check(number: int) -> None:
        randomness = random.Random(number)
        TARGETS[name].accepts(mutate(randomness, randomness.choice(seeds), seeds))

    check()


def test_every_kept_input_is_handled_within_little_memory():
    """In a process of its own, whose memory is limited to 256 MiB more than it begins with."""
    result = python(str(FUZZ / 'replay.py'))
    lines = dict(line.split(': ', 1) for line in result.stdout.splitlines())
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(lines) == {f'{name}/{path.name}' for name in TARGETS for path in corpus_files(name)}
    assert {name for name, outcome in lines.items() if outcome == 'accepted'} == ACCEPTED


def test_the_replay_notices_an_allocation_and_an_undocumented_error(tmp_path):
    (tmp_path / 'input').write_bytes(b'')
    result = python(
        '-c',
        f"""
import sys
sys.path.insert(0, {str(FUZZ)!r})
import replay
from target import Target
from pathlib import Path
hog = Target(lambda data: bytearray(1 << 30), (KeyError,), list)
crash = Target(lambda data: 1 / 0, (KeyError,), list)
replay.TARGETS.update(hog=hog, crash=crash)
replay.limit_memory()
print(replay.replay('hog', Path({str(tmp_path / 'input')!r})))
print(replay.replay('crash', Path({str(tmp_path / 'input')!r})))
""",
    )
    assert 'FAILED: MemoryError' in result.stdout, result.stderr
    assert 'FAILED: ZeroDivisionError' in result.stdout


def test_the_corpus_is_small_and_belongs_to_targets():
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
    sizes = [path.stat().st_size for path in CORPUS.rglob('*') if path.is_file()]
    assert sum(sizes) < MAX_CORPUS_BYTES


def test_a_campaign_counts_its_cases(tmp_path):
    script, out = str(FUZZ / 'campaign.py'), str(tmp_path)
    result = python(script, '--plain', '--target', 'cdr_pose', '--seconds', '1', '--out', out)
    assert result.returncode == 0, result.stderr
    assert ' 0 kinds of failure' in result.stdout and ' cases in ' in result.stdout

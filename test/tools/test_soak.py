"""The verdict of the soak on made-up samples; the run itself takes minutes."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / 'scripts' / 'soak.py'
RATE_HZ = 20.0


@pytest.fixture(scope='module')
def soak():
    spec = importlib.util.spec_from_file_location('soak', PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules['soak'] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules['soak']


def samples(soak, growth_mib: float = 0.0) -> list:
    """Half an hour; the memory grows by so much from the end of the warm-up to the end."""
    return [
        soak.Sample(
            at_s=at_s,
            rss_mib=400.0 + growth_mib * at_s / 1800.0 + (50.0 if at_s < 60 else 0.0),
            threads=20,
            files=14,
            ticks=round(RATE_HZ * at_s),
            actions=round(RATE_HZ * at_s) - at_s,
            skips={'overrun': at_s - 1, 'stale_input': 1},
            lost=0,
        )
        for at_s in range(10, 1801, 10)
    ]


def failed(soak, taken: list) -> list[str]:
    verdicts = soak.judge(taken, RATE_HZ, active_s=1800.0)
    return [verdict.criterion for verdict in verdicts if not verdict.passed]


def test_steady_node_passes_whatever_the_warm_up_took(soak):
    assert failed(soak, samples(soak)) == []


def test_memory_that_grows_fails(soak):
    assert failed(soak, samples(soak, growth_mib=7.0)) == []
    assert failed(soak, samples(soak, growth_mib=12.0)) == ['memory (MiB) flat within 2%']


@pytest.mark.parametrize(
    ('change', 'criterion'),
    [
        ({'threads': 21}, 'threads flat within 0%'),
        ({'files': 15}, 'open files flat within 0%'),
    ],
)
def test_thread_or_file_that_stays_fails(soak, change, criterion):
    taken = samples(soak)
    taken[120:] = [replace(sample, **change) for sample in taken[120:]]
    assert failed(soak, taken) == [criterion]


def test_tick_without_a_reason_fails(soak):
    taken = samples(soak)
    taken[50] = replace(taken[50], actions=taken[50].actions - 1)
    assert failed(soak, taken) == ['every tick is an action or a skip with a reason']


def test_ticks_that_were_never_counted_fail(soak):
    taken = samples(soak)
    last = taken[-1]
    taken[-1] = replace(last, ticks=last.ticks - 21, actions=last.actions - 21)
    assert failed(soak, taken) == ['no tick is missing without a reason']

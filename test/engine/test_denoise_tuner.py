"""The search for block sizes, with invented times: what it keeps, what it skips, when it stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from pi05_ros.engine import denoise_tuner
from pi05_ros.engine.denoise_tuner import CANDIDATES, STARTS, programs, tune
from pi05_ros.engine.denoise_tuning import DenoiseTuning


class FakeStage:
    """Takes tunings as a stage does, without kernels."""

    def __init__(self) -> None:
        self.use_tuning(DenoiseTuning())

    def use_tuning(self, tuning: DenoiseTuning) -> None:
        self.tuning = tuning
        wrong = tuning.gate_up.depth == 256
        self.actions = torch.full((3, 2), float('nan')) if wrong else torch.ones(3, 2)

    def eager(self, num_steps: int) -> torch.Tensor:
        return torch.ones(3, 2)


@pytest.fixture
def stage(monkeypatch):
    """A stage that is faster without prefetch, with wide tiles and deep blocks.

    Six stages of the down projection do not fit, and the deepest gate/up gives no numbers.
    """

    def time_run_us(stage, num_steps):
        tuning = stage.tuning
        if tuning.down.stages == 6:
            raise OutOfResources(300_000, 232_448, 'shared memory')
        faster = (
            20 * (tuning.pdl and not tuning.prefetch) + tuning.qkv.columns + tuning.gate_up.depth
        )
        return num_steps * (900 - faster)

    monkeypatch.setattr(denoise_tuner, 'time_run_us', time_run_us)
    return FakeStage()


def test_the_fastest_right_choices_are_kept_and_what_does_not_fit_is_reported(stage):
    tried = []
    best = tune(stage, lambda change, outcome: tried.append((change, outcome)))
    assert best == stage.tuning
    assert (best.pdl, best.prefetch, best.qkv.columns) == (True, False, 64)
    assert best.down == DenoiseTuning().down
    unfit = {outcome.split(':')[0] for _, outcome in tried if isinstance(outcome, str)}
    assert unfit == {'OutOfResources', 'wrong actions'}
    assert best.gate_up.depth == 128
    fastest = min(outcome for _, outcome in tried if not isinstance(outcome, str))
    assert fastest == 900 - 20 - 64 - 128


def test_nothing_is_tried_after_the_deadline(stage):
    tried = []
    assert tune(stage, lambda *args: tried.append(args), seconds=-1.0) == DenoiseTuning()
    assert [outcome for _, outcome in tried] == ['no time left for this and the rest']


def test_every_candidate_is_compiled_beforehand_for_every_start_with_overlap():
    base, found = DenoiseTuning(), programs(DenoiseTuning())
    starts = [start for start in STARTS if start['pdl']]
    assert all(replace(base, **s, **change) in found for s in starts for change in CANDIDATES)

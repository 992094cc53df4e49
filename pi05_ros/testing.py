"""Pin a recording as a regression test, in three lines::

    from pi05_ros.testing import check_golden
    def test_cup():
        check_golden('cup.npz', bag='bags/cup', checkpoint='checkpoints/cup')

``pi05-ros replay bags/cup --checkpoint checkpoints/cup --record-golden cup.npz`` makes the file.
It holds the actions and every setting that they were made with, so that the test needs no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pi05_ros.tools.action_log import ActionLog, ActionLogError
from pi05_ros.tools.bag import open_bag
from pi05_ros.tools.compare import Comparison, compare, summary
from pi05_ros.tools.remapping import Remapping
from pi05_ros.tools.replay import installed_decoder
from pi05_ros.tools.replay_report import origin_of
from pi05_ros.tools.replayer import Replay, Setup


def check_golden(
    golden: str | Path,
    *,
    bag: str | Path,
    checkpoint: str | Path,
    max_abs_error: float | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Comparison:
    """Replay a recording and compare its actions with a golden file.

    Args:
        golden: written by ``pi05-ros replay --record-golden``.
        bag: the recording, MCAP or sqlite3.
        checkpoint: the same weights, wherever they are.
        max_abs_error: largest allowed difference of any action, in its unit. None demands every
            bit, which holds on one kind of machine, backend and precision only.
        parameters: full parameter name -> value, in place of the recorded one, e.g.
            ``{'device': 'cpu'}``.
    Raises:
        AssertionError: other ticks acted or other actions came out; says where they part.
        Pi05Error: the golden file, the recording or the checkpoint cannot be used.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    reference = ActionLog.load(Path(golden))
    overrides = {**(parameters or {}), 'checkpoint': str(checkpoint)}
    found = replay(bag, setup_of(reference, Path(golden), overrides))
    expected, ran = (log.origin['model']['checkpoint_sha256'] for log in (reference, found))
    assert ran == expected, (
        f'{golden} was recorded with other weights: checkpoint {expected[:12]}, '
        f'{checkpoint} is {ran[:12]}'
    )
    comparison = compare(reference, found)
    assert _agrees(comparison, max_abs_error), '\n'.join(
        [
            f'{bag} no longer gives the actions of {golden}',
            *summary(comparison),
            f'largest difference: {comparison.max_abs_error:.3g}; allowed: {max_abs_error or 0:g}',
            f'golden: {_describe(reference)}; now: {_describe(found)}',
        ]
    )
    return comparison


def replay(bag: str | Path, setup: Setup) -> ActionLog:
    """Replay a recording and return its actions.

    Raises:
        Pi05Error: it cannot be replayed, or not to its end.
    """
    run = Replay(setup.settings(), setup.remapping, foreign_decoder=installed_decoder())
    with open_bag(bag) as opened:
        run.run(opened)
    return run.action_log(origin_of(run))


def setup_of(reference: ActionLog, path: Path, overrides: Mapping[str, Any]) -> Setup:
    """Return the settings and topics that a golden file was made with.

    Raises:
        ActionLogError: the file does not say how it was made.
    """
    try:
        settings = dict(reference.origin['settings'])
        relative, topics = reference.origin['relative_topics'], reference.origin['topics']
        rules = tuple((relative[name], topic) for name, topic in topics.items())
        for camera, values in settings.pop('cameras').items():
            settings |= {f'cameras.{camera}.{name}': value for name, value in values.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ActionLogError(
            f'{path} does not say how it was made ({error}); '
            'record it again with "pi05-ros replay --record-golden"'
        ) from error
    return Setup(None, settings | dict(overrides), Remapping(rules))


def _agrees(comparison: Comparison, max_abs_error: float | None) -> bool:
    if comparison.is_identical:
        return True
    same_ticks = not (comparison.only_reference or comparison.only_other)
    return max_abs_error is not None and same_ticks and comparison.max_abs_error <= max_abs_error


def _describe(log: ActionLog) -> str:
    facts = log.origin['model']
    return ' '.join(str(facts[name]) for name in ('denoise_backend', 'precision', 'device'))

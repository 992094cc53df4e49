"""One bay of processes per test file, and the table of all faults of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_bench import TASK, Bay, FaultTable, open_bay

_TABLE = pytest.StashKey[FaultTable]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> FaultTable:
    """Every test adds a row; ``--fault-table FILE`` writes them."""
    return request.config.stash.setdefault(_TABLE, FaultTable())


@pytest.fixture(scope='module')
def bay(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Bay]:
    # Two Euler steps at 10 Hz: two cores that also run the sensors keep up.
    parameters = {
        'checkpoint': str(tiny_checkpoint),
        'prompt': TASK,
        'rate_hz': 10.0,
        'num_steps': 2,
        'max_image_age_ms': 400.0,
        'max_joint_age_ms': 400.0,
        'max_skew_ms': 300.0,
        'action_interface': 'forward_command',
        'dry_run': False,
    }
    with open_bay(tmp_path_factory.mktemp('faults'), parameters) as made:
        yield made


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table, if that was asked for."""
    path = session.config.getoption('--fault-table')
    table = session.config.stash.get(_TABLE, None)
    if path and table:
        text = Path(path).read_text(encoding='utf-8')
        head, _, _ = text.partition(TABLE_MARK)
        Path(path).write_text(f'{head}{TABLE_MARK}\n{table.markdown()}', encoding='utf-8')


TABLE_MARK = '<!-- written by pytest test/ros/faults --fault-table docs/faults.md -->'

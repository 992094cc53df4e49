"""The names under which the node reports on /diagnostics."""

from __future__ import annotations

import pytest
from helpers import Sensors, bench

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]


def test_diagnostics_of_an_unconfigured_node_list_every_part():
    with bench() as b:
        b.until(lambda: b.observer.diagnostics, send=False)
        names = [status.name for status in b.observer.diagnostics[-1].status]
        parts = ('Lifecycle', 'Inputs', 'Pipeline', 'Action', 'Model', 'GPU')
        assert names == [f'pi05_policy: {part}' for part in parts]
        assert {status.hardware_id for status in b.observer.diagnostics[-1].status} == {'none'}


def test_namespace_is_part_of_the_names():
    sensors = Sensors(namespace='left')
    with bench(sensors=sensors, namespace='left') as b:
        assert b.configure()
        b.until(lambda: b.observer.diagnostics)
        assert b.observer.diagnostics[-1].status[0].name == 'left/pi05_policy: Lifecycle'

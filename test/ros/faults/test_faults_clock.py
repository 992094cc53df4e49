"""The simulated clock stops, goes back and leaps: nothing acts on what is not of now."""

from __future__ import annotations

import pytest
from fault_bench import FaultBench, SensorsProcess


@pytest.fixture(scope='module')
def world(bay) -> SensorsProcess:
    """Clock and sensors of one simulator."""
    return bay.sensors('simulator', 'clock', 'camera:base', 'camera:wrist', 'joints')


@pytest.fixture(scope='module')
def node(bay, world) -> FaultBench:
    bench = bay.node(use_sim_time=True)
    bench.start()
    return bench


def test_clock_that_stands_still_stops_the_ticks_and_is_said(node, world, table):
    world.change('clock', running=False)
    said = node.until_said('Lifecycle', 'the ROS clock stands still: nothing ticks')
    node.until(node.is_holding)
    ticks = node.seen().counts['ticks']
    assert node.seen().counts['ticks'] == ticks
    world.change('clock', running=True)
    node.until_acting()
    node.until_said('Lifecycle', '^active$')
    table.add('/clock stops', 'no tick; held', said, 'yes, with the clock')


@pytest.mark.parametrize('seconds', [-30, -7200])
def test_clock_that_goes_back_drops_every_input(seconds, node, world, table):
    before = node.seen()
    jumps = int(node.observer.values('Action')['clock jumps'])
    world.change('clock', jump_s=seconds)
    node.until(lambda: int(node.observer.values('Action')['clock jumps']) == jumps + 1)
    node.until_acting()
    said = f'clock jumps: {jumps + 1}'
    table.add(f'/clock jumps {seconds:+,} s', node.deed(before), said, 'yes, with new inputs')


@pytest.mark.parametrize('seconds', [5, 7200])
def test_clock_that_leaps_makes_every_input_old(seconds, node, world, table):
    before = node.seen()
    world.change('wrist', running=False)
    world.change('clock', jump_s=seconds)
    message = node.until_said('Action', r'stale_input: \D+ \d{4,} ms old > 400 ms')
    node.until(node.is_holding)
    deed = node.deed(before)
    world.change('wrist', running=True)
    node.until_acting()
    said = message.partition('; ')[2]
    table.add(f'/clock jumps {seconds:+,} s', deed, said, 'yes, with new inputs')

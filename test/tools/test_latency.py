"""The parts of an action's way add up, whatever arrives and in whatever order."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timing_rows import timing

from pi05_ros.tools.latency import PARTS, SUMS, Arrival, decompose, match, spreads
from pi05_ros.tools.latency_report import Failure, Window, highest_rates, save_plot, write_json

MS = 1_000_000
STAMP_NS = 1_760_000_000_123_456_789
MILLISECONDS = st.floats(0.0, 1000.0)


def tick(stamp_ns: int = STAMP_NS, **changed_ms: float) -> dict[str, float]:
    """Return one tick: transport 4, wait 15, tick 101 ms, of which 98.5 in stages."""
    return timing(**changed_ms) | {'stamp_ns': stamp_ns}


def window(**changed) -> Window:
    ticks = [tick()] * 99
    columns = decompose(ticks, [Arrival(STAMP_NS, STAMP_NS + 121 * MS)] * 99)
    made = Window(
        inputs='640x480 raw', rate_hz=5.0, seconds=20.0, ticks=100, actions=99,
        skips={'overrun': 1}, timings=99, arrivals=99, matched=99, spreads=spreads(columns),
        diagnostics={'Inputs': {'base lost': '0'}},
    )  # fmt: skip
    return replace(made, **changed)


def test_parts_of_a_known_tick():
    columns = decompose([tick()], [Arrival(STAMP_NS, STAMP_NS + 121 * MS)])
    found = {name: values.item() for name, values in columns.items()}
    assert found == pytest.approx(
        {
            'transport': 4.0, 'wait': 15.0, 'inputs': 0.3, 'policy': 0.2, 'model host': 1.5,
            'model': 98.5, 'publish': 0.5, 'delivery': 1.0, 'sensor to action': 121.0,
            'tick to publish': 101.0, 'beside model and wait': 7.5,
            'until published': 6.5,
        }
    )  # fmt: skip
    assert set(found) == {*PARTS, *SUMS}


@given(
    parts=st.fixed_dictionaries(
        {
            name: MILLISECONDS
            for name in ('transport_ms', 'wait_ms', 'inputs_ms', 'publish_ms', 'vision_ms')
        }
    ),
    host_ms=MILLISECONDS,
    policy_ms=MILLISECONDS,
    delivery_ns=st.integers(-MS, 100 * MS),
)
def test_parts_add_up_to_what_the_subscriber_sees(parts, host_ms, policy_ms, delivery_ns):
    row = dict.fromkeys(tick(), float('nan')) | parts  # a stage that was not measured is NaN
    row['total_ms'] = row['vision_ms'] + host_ms
    row['tick_ms'] = row['inputs_ms'] + row['total_ms'] + policy_ms + row['publish_ms']
    row['sensor_to_action_ms'] = row['transport_ms'] + row['wait_ms'] + row['tick_ms']
    row['stamp_ns'] = STAMP_NS
    way_ns = round(row['sensor_to_action_ms'] * MS) + delivery_ns
    columns = decompose([row], [Arrival(STAMP_NS, STAMP_NS + way_ns)])
    assert sum(columns[name].item() for name in PARTS) == pytest.approx(way_ns / MS)
    assert columns['policy'].item() == pytest.approx(policy_ms, abs=1e-6)
    assert columns['model host'].item() == pytest.approx(host_ms, abs=1e-6)
    assert columns['delivery'].item() == pytest.approx(delivery_ns / MS, abs=1e-5)


def test_ticks_on_the_same_image_are_told_apart_by_time():
    ticks = [tick(sensor_to_action_ms=age_ms) for age_ms in (20.0, 36.0)]
    late, early = (Arrival(STAMP_NS, STAMP_NS + age_ms * MS) for age_ms in (37, 21))
    assert match(ticks, [late, early]) == [(ticks[0], early), (ticks[1], late)]


def test_what_has_no_counterpart_is_left_out():
    lost, found = tick(STAMP_NS + 1), tick()
    arrival, strange = Arrival(STAMP_NS, STAMP_NS + 121 * MS), Arrival(5, 6)
    assert match([lost, found], [strange, arrival]) == [(found, arrival)]


def test_nothing_measured_gives_no_figures():
    found = spreads(decompose([], []))
    assert set(found) == {*PARTS, *SUMS}
    assert np.isnan(found['sensor to action'].p50_ms)


@pytest.mark.parametrize(
    ('changes', 'problem'),
    [
        ({}, []),
        ({'ticks': 101}, ['101 ticks are not 99 actions and 1 skips']),
        (
            {'matched': 98, 'arrivals': 98},
            ['of 99 actions 98 arrived here, with 99 timings; 98 are measured'],
        ),
    ],
)
def test_counts_that_contradict_each_other_are_named(changes, problem):
    assert window(**changes).problems() == problem


def test_a_rate_is_held_with_less_than_one_percent_of_skips():
    held = window(ticks=101, actions=100)
    assert held.holds
    assert not window(rate_hz=10.0).holds  # exactly one of a hundred
    assert not window(ticks=0, actions=0, skips={}).holds
    lost = window(inputs='1280x720 raw', skips={'stale_input': 50})
    windows = [held, replace(held, rate_hz=8.0), window(rate_hz=10.0), lost]
    assert highest_rates(windows) == {'640x480 raw': 8.0, '1280x720 raw': None}


def test_file_and_picture_hold_every_window(tmp_path):
    windows = [window(), window(inputs='1280x720 raw')]
    subject = {'device': 'cpu'}
    write_json(tmp_path / 'x.json', subject, windows, [Failure('224x224 raw', 'refused')])
    document = json.loads((tmp_path / 'x.json').read_text())
    assert [w['inputs'] for w in document['windows']] == ['640x480 raw', '1280x720 raw']
    assert document['windows'][0]['spreads']['delivery']['p99_ms'] == pytest.approx(1.0)
    assert document['failures'] == [{'inputs': '224x224 raw', 'reason': 'refused'}]
    save_plot(subject, windows, tmp_path / 'x.png')
    with Image.open(tmp_path / 'x.png') as picture:
        picture.verify()

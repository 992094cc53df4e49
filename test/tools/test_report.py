import math
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from timing_rows import run_report, timing, timing_log

from pi05_ros.msg import StageTiming
from pi05_ros.tools.plots import COLOURS, save_stage_plot
from pi05_ros.tools.report import (
    OTHER,
    STAGE_LABELS,
    TIMING_FIELDS,
    Spread,
    TimingLog,
    format_counts,
    stage_table,
    summary_lines,
)

pytestmark = pytest.mark.ros


def printed(log: TimingLog) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(stage_table(log))
    return capture.get()


def test_every_figure_of_the_report_is_a_field_of_the_message():
    assert set(TIMING_FIELDS) <= set(StageTiming.get_fields_and_field_types())


def test_no_duration_of_the_message_is_left_out_of_the_report():
    fields = StageTiming.get_fields_and_field_types()
    assert {name for name in fields if name.endswith('_ms')} == set(TIMING_FIELDS)


def test_spread_of_known_values():
    spread = Spread.of([1.0, 2.0, 3.0, math.nan, 4.0])
    assert (spread.last_ms, spread.mean_ms, spread.p50_ms, spread.max_ms) == (4.0, 2.5, 2.5, 4.0)
    assert spread.count == 4


def test_percentages_add_up_to_the_whole_inference():
    rows = timing_log().rows()
    assert [row.label for row in rows] == [*STAGE_LABELS.values(), OTHER]
    assert sum(row.percent for row in rows) == pytest.approx(100)
    assert rows[-1].spread.mean_ms == pytest.approx(1.5)


def test_a_stage_that_was_not_measured_is_shown_as_a_dash_and_its_time_as_other():
    log = TimingLog()
    log.add(timing(preprocess_ms=math.nan))
    rows = {row.label: row for row in log.rows()}
    assert math.isnan(rows['preprocess'].percent)
    assert rows[OTHER].spread.mean_ms == pytest.approx(1.5 + 2.0)
    line = next(line for line in printed(log).splitlines() if 'preprocess' in line)
    assert line.split() == ['preprocess', '-', '-', '-', '-', '-']


def test_table_of_known_times():
    words = [line.split() for line in printed(timing_log()).splitlines()]
    assert ['KV', 'prefill', '50.00', '50.00', '50.00', '50.00', '50.0'] in words
    assert ['inference', '100.00', '100.00', '100.00', '100.00', '100.0'] in words


def test_a_log_without_ticks_still_makes_a_table():
    assert 'KV prefill' in printed(TimingLog())


def test_counts_are_listed_the_most_frequent_first_without_zeros():
    assert format_counts({'stale_input': 1, 'overrun': 7, 'bad_step': 0}) == (
        'overrun 7, stale_input 1'
    )
    assert format_counts({}) == 'none'


def test_summary_says_what_ran_how_fast_and_what_was_skipped():
    lines = summary_lines(run_report(ticks=12, actions=10, skips={'stale_input': 2}))
    assert lines[0] == 'robot franka, backend eager'
    assert lines[1].startswith('inference mean / std / P50 / P95: 100.00 / 0.00 / 100.00 / 100.00')
    assert lines[1].endswith('over 10, at most 10.0 Hz')
    assert lines[2] == '12 ticks, 10 actions (10 received), 5.0 Hz of 5 Hz; skipped: stale_input 2'


@pytest.mark.parametrize('log', [timing_log(1), timing_log(50, preprocess_ms=math.nan)])
def test_picture_is_written_for_one_tick_and_for_stages_that_were_not_measured(tmp_path, log):
    path: Path = tmp_path / 'stages.png'
    save_stage_plot(run_report(log=log), path)
    with Image.open(path) as picture:
        picture.verify()
        assert picture.width > 1000


def test_every_stage_has_a_colour():
    assert set(COLOURS) == {*STAGE_LABELS.values(), OTHER}

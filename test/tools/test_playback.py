import threading

import pytest
from bag_files import LIBERO_BAG, START_NS, header_cdr, string_cdr, write_bag

from pi05_ros.control.cdr import parse_header
from pi05_ros.tools.bag import open_bag
from pi05_ros.tools.playback import (
    MAX_LATE_NS,
    Pacer,
    read_ahead,
    read_stamp,
    timeline,
    with_stamp,
    write_stamp,
)

S = 1_000_000_000


class FakeClock:
    """A steady clock that moves only when somebody waits or works."""

    def __init__(self) -> None:
        self.now_ns = 5 * S

    def wait(self, seconds: float) -> bool:
        self.now_ns += round(seconds * S)
        return False


@pytest.mark.parametrize('order', ['<', '>'], ids=['little_endian', 'big_endian'])
def test_restamping_changes_the_stamp_and_no_other_byte(order):
    raw = header_cdr(1_234_567_890_123, order)
    moved = with_stamp(raw, 1_700_000_001_000_000_002)
    assert read_stamp(raw) == parse_header(raw).stamp_ns == 1_234_567_890_123
    assert parse_header(moved).stamp_ns == 1_700_000_001_000_000_002
    assert (moved[:4], moved[12:]) == (raw[:4], raw[12:])


@pytest.mark.parametrize('order', ['<', '>'], ids=['little_endian', 'big_endian'])
def test_stamping_in_place_gives_the_bytes_of_restamping(order):
    raw = header_cdr(1_234_567_890_123, order)
    memory = bytearray(raw)
    write_stamp(memoryview(memory), 1_700_000_001_000_000_002)
    assert bytes(memory) == with_stamp(raw, 1_700_000_001_000_000_002)


def test_a_message_without_room_for_a_stamp_counts_as_unstamped():
    assert read_stamp(b'') == 0
    assert read_stamp(header_cdr(1_234_567_890_123)[:11]) == 0


@pytest.mark.parametrize('stamp_ns', [-1, 2**31 * S])
def test_a_stamp_that_a_header_cannot_hold_is_not_written(stamp_ns):
    raw = header_cdr(5)
    assert with_stamp(raw, stamp_ns) == raw


@pytest.mark.parametrize('rate', [0.5, 1.0, 4.0])
def test_messages_are_due_at_the_recorded_intervals_divided_by_the_rate(rate):
    clock = FakeClock()
    pacer = Pacer(rate, clock.wait, lambda: clock.now_ns)
    due_ns = []
    for bag_ns in (START_NS, START_NS + 10_000_000, START_NS + S):
        assert pacer.wait_until(bag_ns)
        due_ns.append(clock.now_ns - 5 * S)
    assert due_ns == pytest.approx([0, 10_000_000 / rate, S / rate], abs=2)
    assert pacer.behind_ns == 0


def test_lost_time_is_reported_and_not_made_up_for_in_a_burst():
    clock = FakeClock()
    pacer = Pacer(1.0, clock.wait, lambda: clock.now_ns)
    pacer.wait_until(START_NS)
    clock.now_ns += S  # something blocked for a second; the next message was due after 10 ms
    pacer.wait_until(START_NS + 10_000_000)
    before_ns = clock.now_ns
    pacer.wait_until(START_NS + 20_000_000)
    assert clock.now_ns - before_ns == 10_000_000
    assert pacer.behind_ns == S - 10_000_000


def test_a_small_delay_does_not_shift_the_messages_behind_it():
    clock = FakeClock()
    pacer = Pacer(1.0, clock.wait, lambda: clock.now_ns)
    pacer.wait_until(START_NS)
    clock.now_ns += MAX_LATE_NS // 2
    pacer.wait_until(START_NS + 1)
    pacer.wait_until(START_NS + S)
    assert clock.now_ns == 6 * S
    assert pacer.behind_ns == 0


def test_waiting_ends_when_the_playback_is_stopped():
    stop = threading.Event()
    stop.set()
    assert not Pacer(1.0, stop.wait).wait_until(START_NS)


def bag_of_two(tmp_path):
    rows = [('/a', 'std_msgs/msg/String', ns, string_cdr(str(ns))) for ns in (0, 25)]
    return write_bag(tmp_path / 'bag', rows)


def test_a_clock_tick_comes_before_the_message_of_the_same_instant(tmp_path):
    with open_bag(bag_of_two(tmp_path)) as bag:
        events = list(timeline(bag, ['/a'], loop=False, clock_ns=10))
    kinds = [(e.due_ns - START_NS, 'clock' if e.message is None else 'message') for e in events]
    assert kinds == [(0, 'clock'), (0, 'message'), (10, 'clock'), (20, 'clock'), (25, 'message')]


def test_in_a_loop_due_times_go_on_while_the_clock_jumps_back(tmp_path):
    with open_bag(bag_of_two(tmp_path)) as bag:
        events = timeline(bag, ['/a'], loop=True, clock_ns=25)
        pass_of_four = [next(events) for _ in range(8)]
    due = [event.due_ns - START_NS for event in pass_of_four]
    clock = [event.clock_ns for event in pass_of_four if event.clock_ns is not None]
    assert due == [0, 0, 25, 25, 50, 50, 75, 75]
    assert clock == [START_NS, START_NS + 25] * 2
    assert pass_of_four[-1].lap_ns == 50


def test_reading_ahead_keeps_order_and_hands_over_what_was_raised():
    def numbers():
        yield from range(100)
        raise ValueError('damaged')

    seen = []
    with pytest.raises(ValueError, match='damaged'):
        for number in read_ahead(numbers(), depth=3):
            seen.append(number)
    assert seen == list(range(100))


def test_reading_ahead_ends_its_thread_when_the_reader_stops_early():
    before = threading.active_count()
    with open_bag(LIBERO_BAG) as bag:
        events = read_ahead(timeline(bag, ['/joint_states'], loop=True, clock_ns=None))
        next(events)
        events.close()
    assert threading.active_count() == before

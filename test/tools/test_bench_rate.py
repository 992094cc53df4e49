"""``pi05-ros bench --rate-hz``: calls on a schedule, and the GPU's readings between them."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.control.gpu import GpuReading, NvmlMissing
from pi05_ros.engine.pipeline import StageTimes
from pi05_ros.tools import bench_rate
from pi05_ros.tools.bench_rate import GpuProbe, Slots, measure_at, summarise
from pi05_ros.tools.cli import main
from pi05_ros.tools.measure import Inputs, percentiles

READ_NS = 20_000  # how far a look at the clock moves it
CPU, GPU = torch.device('cpu'), torch.device('cuda', 0)
READING = GpuReading('GPU', '1', sm_clock_mhz=1980, power_mw=300_000, power_limit_mw=700_000)
durations_ns = st.lists(st.integers(0, 100_000_000), min_size=1, max_size=30)


class Clock:
    """A clock that moves when it is read, and by what a sleep takes."""

    def __init__(self, late_ns: list[int]) -> None:
        self.ns, self.late_ns, self.woken_ns = 1_000_000, late_ns, []

    def now_ns(self) -> int:
        self.ns += READ_NS
        return self.ns

    def sleep_s(self, duration_s: float) -> None:
        self.ns += round(duration_s * 1e9)
        self.woken_ns.append(self.ns)
        self.ns += self.late_ns[len(self.woken_ns) % len(self.late_ns)]


@given(rate_hz=st.floats(50, 500), calls_ns=durations_ns, late_ns=durations_ns)
def test_calls_begin_at_slots_and_every_slot_is_met_or_counted(rate_hz, calls_ns, late_ns):
    clock, period_ns = Clock([late // 20 for late in late_ns]), 1e9 / rate_hz
    slots = Slots(rate_hz, clock.now_ns, clock.sleep_s)
    start_ns, met = clock.ns, []
    for call_ns in calls_ns:
        slots.wait()
        slot, after_ns = divmod(clock.ns - start_ns + 1, period_ns)
        assert after_ns <= 3 * READ_NS  # in time, however late those before it were
        met.append(round(slot))
        clock.ns += call_ns
    assert met == sorted(set(met)) and met[0] >= 1
    assert slots.missed + len(met) == met[-1]


@given(rate_hz=st.floats(50, 500), busy=st.lists(st.floats(0, 0.9), min_size=1, max_size=30))
def test_only_the_last_two_milliseconds_before_a_slot_are_spun(rate_hz, busy):
    clock = Clock([0])
    slots = Slots(rate_hz, clock.now_ns, clock.sleep_s)
    for share in busy:
        begin_ns, sleeps = clock.ns, len(clock.woken_ns)
        slots.wait()
        slept = len(clock.woken_ns) > sleeps
        spun_ns = clock.ns - (clock.woken_ns[-1] if slept else begin_ns)
        assert abs(spun_ns - 2_000_000) <= 3 * READ_NS if slept else spun_ns <= 2_100_000
        clock.ns += int(share * 1e9 / rate_hz)
    assert slots.missed == 0


class SleepyPipeline:
    """A pipeline whose calls only take their time."""

    def __init__(self, call_s: float) -> None:
        self.call_s, self.calls, self.rehearsals = call_s, 0, 0

    def rehearse(self, *call: object) -> None:
        self.rehearsals += 1

    def infer(self, *call: object) -> SimpleNamespace:
        self.calls += 1
        time.sleep(self.call_s)
        return SimpleNamespace(times=StageTimes(*[self.call_s * 1e3] * 7))


def times_of_ms(value: float):
    return percentiles([StageTimes(*[value] * 7)])


INPUTS = Inputs([], np.zeros(1, np.int64), np.zeros((1, 1), np.float32))


def test_calls_that_take_longer_than_before_miss_slots_that_are_counted():
    pipeline = SleepyPipeline(0.025)
    found = measure_at(100, pipeline, INPUTS, 1, 4, times_of_ms(1.0), GpuProbe(CPU))
    assert found.timing.calls == 4 and found.missed >= 4 * 2
    assert found.timing.p50_ms('total') == 25.0


def test_a_call_is_rehearsed_once_before_its_slot():
    pipeline = SleepyPipeline(0.001)
    found = measure_at(20, pipeline, INPUTS, 1, 5, times_of_ms(1.0), GpuProbe(CPU))
    assert pipeline.calls == 10  # with those that warm up
    assert pipeline.calls - found.missed <= pipeline.rehearsals <= pipeline.calls


def test_a_rehearsal_that_takes_too_long_misses_the_slot():
    clock = Clock([0])
    slots = Slots(100, clock.now_ns, clock.sleep_s)
    slots.wait(lambda: clock.sleep_s(0.005))
    assert slots.missed == 1


def test_a_period_shorter_than_a_call_is_refused_without_calls():
    pipeline = SleepyPipeline(0.0)
    found = measure_at(50, pipeline, INPUTS, 1, 4, times_of_ms(20.5), GpuProbe(CPU))
    assert found.timing is None and pipeline.calls == 0
    assert found.refused == 'the period, 20.000 ms, is shorter than a call, 20.500 ms (p50)'


def test_a_reading_lies_between_calls_and_follows_some():
    events = []

    def read(nvml, handle):
        events.append('read')
        return READING

    probe = GpuProbe(CPU)
    probe.fault, patch = '', pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(bench_rate, 'read_gpu', read)
        load = probe.load(lambda count: events.extend(['call'] * count), 30)
    assert events == ['call', 'call', 'call', 'read'] * 10
    assert (load.sm_clock_mhz, load.power_w, load.power_limit_w) == (1980, 300, 700)


def test_a_load_is_medians_and_all_reasons_and_makes_nothing_up():
    clocks = [1500, 1980, 1620]
    bits = [0x4, 0, 0x1]
    readings = [
        GpuReading('GPU', '1', sm_clock_mhz=clock, throttle_bits=bit)
        for clock, bit in zip(clocks, bits, strict=True)
    ]
    load = summarise(readings)
    assert (load.sm_clock_mhz, load.lowest_sm_clock_mhz) == (1620, 1500)
    assert load.throttle_reasons == ['gpu_idle', 'sw_power_cap']
    assert load.power_w is None and load.power_limit_w is None


def test_without_nvml_no_calls_are_made_and_the_reason_is_kept(monkeypatch):
    def missing():
        raise NvmlMissing('pynvml is not installed; pip install nvidia-ml-py')

    monkeypatch.setattr(bench_rate, 'open_nvml', missing)
    monkeypatch.setattr(bench_rate, 'uuid_of', lambda device: 'GPU-1')
    probe = GpuProbe(GPU)
    assert probe.fault == 'pynvml is not installed; pip install nvidia-ml-py'
    assert probe.load(lambda count: pytest.fail('called'), 10) is None


OPTIONS = [
    'bench', '--size', 'tiny', '--device', 'cpu', '--backend', 'eager', '--precision', 'float32',
    '--image-size', '32x24', '--no-oracle', '--no-sweep',
]  # fmt: skip
SMALL = ['--views', '1', '--prompt-tokens', '5', '--horizon', '4', '--steps', '1']


def run(tmp_path, *arguments: str) -> tuple[int, dict]:
    file = tmp_path / 'bench.json'
    status = main([*OPTIONS, *arguments, '--json', str(file)])
    return status, json.loads(file.read_text())


def test_a_rate_is_measured_beside_calls_back_to_back(tmp_path, capsys):
    picture = tmp_path / 'bench.png'
    status, report = run(
        tmp_path, *SMALL, '--iterations', '3', '--rate-hz', '4,8', '--plot', str(picture)
    )
    printed = capsys.readouterr().out
    assert status == 0
    (case,) = report['cases']
    assert [found['rate_hz'] for found in case['at_rates']] == [4.0, 8.0]
    for found in case['at_rates']:
        assert found['timing'].keys() == case['timing'].keys() and found['timing']['calls'] == 3
        stages = found['timing']['percentiles_ms']
        assert stages.keys() == case['timing']['percentiles_ms'].keys()
        assert all(value > 0 for values in stages.values() for value in values.values())
        assert found['refused'] == '' and found['gpu'] is None
        assert f'{found["missed"]} of {3 + found["missed"]} slots missed' in printed
    for word in ('1 step, at 4 Hz', '1 step, at 8 Hz', 'back to back p50 ms'):
        assert word in printed
    assert 'clock and power  not read: not a GPU' in printed
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_the_standard_cases_are_measured_at_a_rate(tmp_path):
    status, report = run(tmp_path, '--cases', '--iterations', '1', '--rate-hz', '1')
    rates = [found for case in report['cases'] for found in case['at_rates']]
    assert [found['rate_hz'] for found in rates] == [1.0] * 4
    assert status == any(found['refused'] for found in rates)  # by a machine that is slower


def test_a_rate_that_is_too_high_leaves_the_others_and_the_status_says_so(tmp_path, capsys):
    status, report = run(tmp_path, *SMALL, '--iterations', '1', '--rate-hz', '1e6,4')
    refused, measured = report['cases'][0]['at_rates']
    assert status == 1
    assert refused['timing'] is None and 'shorter than a call' in refused['refused']
    assert measured['timing']['calls'] == 1
    assert 'not measured at 1e+06 Hz: the period, 0.001 ms,' in capsys.readouterr().out


@pytest.mark.parametrize('wrong', ['0', '-3', 'nan', 'inf', '30,', '30,fast', ''])
def test_a_bad_rate_is_a_usage_error(wrong, capsys):
    with pytest.raises(SystemExit):
        main([*OPTIONS, f'--rate-hz={wrong}'])
    assert 'is not a positive number' in capsys.readouterr().err

"""The GPU status, from readings in the form and units in which NVML gives them.

The readings are written by hand, not recorded; the driver's side is a stand-in with NVML's own
error types and constants.
"""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest

from pi05_ros.control import gpu
from pi05_ros.control.gpu import GpuMonitor, GpuReading, gpu_status
from pi05_ros.control.status import OK, WARN

UUID = 'GPU-5a3c1f6e-0000-1111-2222-333344445555'
BUSY = GpuReading(
    name='NVIDIA H200',
    driver='580.82.07',
    memory_used_bytes=10_485_760_000,
    memory_total_bytes=150_754_820_096,
    sm_clock_mhz=1980,
    memory_clock_mhz=3201,
    temperature_c=41,
    power_mw=312_400,
    power_limit_mw=700_000,
    throttle_bits=0x4,
)


def nvml_of(reading: GpuReading, lacking: tuple[str, ...] = ()) -> SimpleNamespace:
    """Return what stands in for the initialised module pynvml on a machine with one GPU."""
    clocks = {
        pynvml.NVML_CLOCK_SM: reading.sm_clock_mhz,
        pynvml.NVML_CLOCK_MEM: reading.memory_clock_mhz,
    }

    def find(uuid: str) -> str:
        if uuid != UUID:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return 'handle'

    def refuse(*args: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    memory = SimpleNamespace(used=reading.memory_used_bytes, total=reading.memory_total_bytes)
    queries = {
        'nvmlDeviceGetMemoryInfo': lambda handle: memory,
        'nvmlDeviceGetName': lambda handle: reading.name,
        'nvmlSystemGetDriverVersion': lambda: reading.driver.encode(),
        'nvmlDeviceGetClockInfo': lambda handle, kind: clocks[kind],
        'nvmlDeviceGetTemperature': lambda handle, sensor: reading.temperature_c,
        'nvmlDeviceGetPowerUsage': lambda handle: reading.power_mw,
        'nvmlDeviceGetEnforcedPowerLimit': lambda handle: reading.power_limit_mw,
        'nvmlDeviceGetCurrentClocksThrottleReasons': lambda handle: reading.throttle_bits,
    }
    queries.update(dict.fromkeys(lacking, refuse))
    return SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        NVML_CLOCK_SM=pynvml.NVML_CLOCK_SM,
        NVML_CLOCK_MEM=pynvml.NVML_CLOCK_MEM,
        NVML_TEMPERATURE_GPU=pynvml.NVML_TEMPERATURE_GPU,
        nvmlDeviceGetHandleByUUID=find,
        nvmlShutdown=lambda: None,
        **queries,
    )


def assert_text(found, expected: str) -> None:
    assert found.text() == textwrap.dedent(expected).strip('\n')


def test_gpu_text():
    assert_text(
        gpu_status('cuda:0', BUSY),
        """
        [OK] GPU: NVIDIA H200
          name: NVIDIA H200
          device: cuda:0
          memory used (MiB): 10000
          memory total (MiB): 143771
          SM clock (MHz): 1980
          memory clock (MHz): 3201
          temperature (°C): 41
          power (W): 312
          power limit (W): 700
          throttle reasons: sw_power_cap
          driver: 580.82.07
        """,
    )


def test_what_a_gpu_does_not_tell_is_not_made_up():
    found = gpu_status('cuda:0', GpuReading('NVIDIA Thor', '580.00'))
    values = dict(found.values)
    assert list(values) == [key for key, _ in gpu_status('cuda:0', BUSY).values]
    known = {'name': 'NVIDIA Thor', 'device': 'cuda:0', 'driver': '580.00'}
    assert values == dict.fromkeys(values, 'n/a') | known


@pytest.mark.parametrize(
    ('bits', 'level', 'message', 'shown'),
    [
        (0x0, OK, 'NVIDIA H200', 'none'),
        (0x1, OK, 'NVIDIA H200', 'gpu_idle'),
        (
            0x24,
            WARN,
            'NVIDIA H200 slows itself down: sw_thermal_slowdown',
            'sw_power_cap, sw_thermal_slowdown',
        ),
        (
            0x48,
            WARN,
            'NVIDIA H200 slows itself down: hw_slowdown, hw_thermal_slowdown',
            'hw_slowdown, hw_thermal_slowdown',
        ),
        (0x200, OK, 'NVIDIA H200', '0x200'),
    ],
)
def test_throttle_reasons_are_named_and_heat_is_a_warning(bits, level, message, shown):
    found = gpu_status('cuda:0', GpuReading('NVIDIA H200', '580', throttle_bits=bits))
    assert (found.level, found.message) == (level, message)
    assert dict(found.values)['throttle reasons'] == shown


def test_throttle_bits_have_the_names_of_nvml():
    for bit, name in gpu.THROTTLE_REASONS.items():
        constant = 'nvmlClocksThrottleReason' + name.title().replace('_', '')
        assert getattr(pynvml, constant) == bit


def test_a_cpu_has_no_figures():
    assert_text(GpuMonitor('cpu').status(), '[OK] GPU: runs on the CPU')


def test_every_figure_of_nvml_reaches_the_status(monkeypatch):
    monkeypatch.setattr(gpu, 'open_nvml', lambda: nvml_of(BUSY))
    monkeypatch.setattr(gpu, 'uuid_of', lambda device: UUID)
    assert GpuMonitor('cuda:0').status() == gpu_status('cuda:0', BUSY)


def test_a_query_that_a_gpu_does_not_support_leaves_the_others(monkeypatch):
    lacking = ('nvmlDeviceGetMemoryInfo', 'nvmlDeviceGetPowerUsage')
    monkeypatch.setattr(gpu, 'open_nvml', lambda: nvml_of(BUSY, lacking))
    monkeypatch.setattr(gpu, 'uuid_of', lambda device: UUID)
    values = dict(GpuMonitor('cuda:0').status().values)
    assert values['memory used (MiB)'] == values['power (W)'] == 'n/a'
    assert values['SM clock (MHz)'] == '1980'


def until(is_true: Callable[[], bool], deadline_s: float = 30.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not is_true():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def test_the_driver_is_asked_again_for_every_status(monkeypatch):
    nvml = nvml_of(BUSY)
    monkeypatch.setattr(gpu, 'open_nvml', lambda: nvml)
    monkeypatch.setattr(gpu, 'uuid_of', lambda device: UUID)
    monitor = GpuMonitor('cuda:0')
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: 77
    until(lambda: dict(monitor.status().values)['temperature (°C)'] == '77')
    monitor.close()


def test_a_driver_that_hangs_holds_nobody_up_and_is_said(monkeypatch):
    nvml, answered, now_s = nvml_of(BUSY), threading.Event(), 100.0
    monkeypatch.setattr(gpu, 'open_nvml', lambda: nvml)
    monkeypatch.setattr(gpu, 'uuid_of', lambda device: UUID)
    monkeypatch.setattr(gpu, 'time', SimpleNamespace(monotonic=lambda: now_s))
    monitor = GpuMonitor('cuda:0')
    nvml.nvmlDeviceGetPowerUsage = lambda handle: answered.wait() and 1000
    assert monitor.status() == gpu_status('cuda:0', BUSY)
    now_s += 10.0
    assert monitor.status().message == 'cuda:0; no figures: NVML has not answered for 10 s'
    answered.set()
    until(lambda: dict(monitor.status().values).get('power (W)') == '1')
    monitor.close()


def test_a_gpu_that_nvml_does_not_know_is_said(monkeypatch):
    monkeypatch.setattr(gpu, 'open_nvml', lambda: nvml_of(BUSY))
    monkeypatch.setattr(gpu, 'uuid_of', lambda device: 'GPU-0')
    found = GpuMonitor('cuda:0').status()
    assert found.level == OK
    assert found.message.startswith('cuda:0; no figures: NVML does not know GPU-0: ')
    assert found.values == ()


def test_a_machine_without_a_driver_is_said(monkeypatch):
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, 'nvmlInit', fail)
    monkeypatch.setattr(gpu, 'uuid_of', lambda device: UUID)
    monitor = GpuMonitor('cuda:0')
    assert_text(
        monitor.status(),
        '[OK] GPU: cuda:0; no figures: NVML cannot be used: NVML Shared Library Not Found',
    )
    monitor.close()

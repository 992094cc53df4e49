"""What NVML says about the GPU that runs the model, as a status.

Read-only queries of the driver; a figure that a GPU or driver does not give is ``n/a``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .status import OK, UNKNOWN, WARN, Status

MIB = 1 << 20
# Longer than a driver takes under load; then it hangs, and old figures would be a lie.
_PATIENCE_S = 5.0
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons, as nvml.h names them.
THROTTLE_REASONS = {
    0x001: 'gpu_idle',
    0x002: 'applications_clocks_setting',
    0x004: 'sw_power_cap',
    0x008: 'hw_slowdown',
    0x010: 'sync_boost',
    0x020: 'sw_thermal_slowdown',
    0x040: 'hw_thermal_slowdown',
    0x080: 'hw_power_brake_slowdown',
    0x100: 'display_clock_setting',
}
# The others are normal: idle, a setting, or the power limit that a busy GPU works at.
SLOWDOWNS = {
    'hw_slowdown',
    'sw_thermal_slowdown',
    'hw_thermal_slowdown',
    'hw_power_brake_slowdown',
}


@dataclass(frozen=True)
class GpuReading:
    """One look at a GPU; None for what this GPU or driver does not tell.

    Args:
        throttle_bits: why the clocks are what they are, see :data:`THROTTLE_REASONS`.
    """

    name: str
    driver: str
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_mw: int | None = None
    power_limit_mw: int | None = None
    throttle_bits: int | None = None

    @property
    def throttle_reasons(self) -> tuple[str, ...]:
        """Names of the reasons; a bit that has none here is shown as a number."""
        bits = self.throttle_bits or 0
        named = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
        rest = bits & ~sum(THROTTLE_REASONS)
        return (*named, *([f'0x{rest:x}'] if rest else []))


def gpu_status(device: str, reading: GpuReading | str) -> Status:
    """Say how the GPU is.

    Args:
        device: what the model runs on, e.g. ``cuda:0`` or ``cpu``.
        reading: or why there is none.
    """
    if not device.startswith('cuda'):
        return Status('GPU', OK, f'runs on the {device.upper()}')
    if isinstance(reading, str):
        return Status('GPU', OK, f'{device}; no figures: {reading}')
    reasons = reading.throttle_reasons
    slow = [reason for reason in reasons if reason in SLOWDOWNS]
    level, message = OK, reading.name
    if slow:
        level, message = WARN, f'{reading.name} slows itself down: {", ".join(slow)}'
    throttled = UNKNOWN if reading.throttle_bits is None else ', '.join(reasons) or 'none'
    values = (
        ('name', reading.name),
        ('device', device),
        ('memory used (MiB)', _scaled(reading.memory_used_bytes, MIB)),
        ('memory total (MiB)', _scaled(reading.memory_total_bytes, MIB)),
        ('SM clock (MHz)', _scaled(reading.sm_clock_mhz)),
        ('memory clock (MHz)', _scaled(reading.memory_clock_mhz)),
        ('temperature (°C)', _scaled(reading.temperature_c)),
        ('power (W)', _scaled(reading.power_mw, 1000)),
        ('power limit (W)', _scaled(reading.power_limit_mw, 1000)),
        ('throttle reasons', throttled),
        ('driver', reading.driver),
    )
    return Status('GPU', level, message, values)


class GpuMonitor:
    """Reads the GPU of a device through NVML; makes nothing up where it cannot.

    A thread asks the driver, which can take longer than there is time between two ticks.

    Args:
        device: what the model runs on. For a CPU, NVML is not even loaded.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._nvml: Any = None
        self._handle: Any = None
        self._fault = ''
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix='gpu')
        self._asked: Future[GpuReading] | None = None
        self._asked_s = 0.0
        if device.startswith('cuda'):
            self._open(uuid_of(device))
        self._latest: GpuReading | str = self._fault or 'not a GPU'
        if self._handle is not None:
            self._latest = self._read()

    def status(self) -> Status:
        """Return the ``GPU`` status as of the call before, and ask the driver anew."""
        if self._handle is None:
            return gpu_status(self.device, self._latest)
        now_s = time.monotonic()
        if self._asked is not None and self._asked.done():
            self._latest, self._asked = self._asked.result(), None
        if self._asked is None:
            self._asked, self._asked_s = self._thread.submit(self._read), now_s
        elif now_s - self._asked_s > _PATIENCE_S:
            self._latest = f'NVML has not answered for {now_s - self._asked_s:.0f} s'
        return gpu_status(self.device, self._latest)

    def close(self) -> None:
        """Let go of NVML; what was opened is counted there."""
        self._thread.shutdown()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
        self._nvml = self._handle = None
        self._latest = 'closed'

    def _read(self) -> GpuReading:
        return read_gpu(self._nvml, self._handle)

    def _open(self, uuid: str) -> None:
        try:
            self._nvml = open_nvml()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except NvmlMissing as error:
            self._fault = str(error)
        except self._nvml.NVMLError as error:
            self._fault = f'NVML does not know {uuid}: {error}'


class NvmlMissing(Exception):
    """NVML cannot be used here; the text says why."""


def open_nvml() -> Any:
    """Return pynvml, initialised; ``nvmlShutdown`` undoes it.

    Raises:
        NvmlMissing: no Python package, no NVIDIA driver, or no permission.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NvmlMissing('pynvml is not installed; pip install nvidia-ml-py') from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlMissing(f'NVML cannot be used: {error}') from error
    return pynvml


def read_gpu(nvml: Any, handle: Any) -> GpuReading:
    """Ask for everything; each figure on its own, as GPUs differ in what they tell.

    Args:
        nvml: the module pynvml, initialised.
    """

    def ask(query: Callable[..., Any], *args: Any) -> Any:
        try:
            return query(*args)
        except nvml.NVMLError:
            return None

    memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    return GpuReading(
        name=_text(ask(nvml.nvmlDeviceGetName, handle)),
        driver=_text(ask(nvml.nvmlSystemGetDriverVersion)),
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_total_bytes=None if memory is None else int(memory.total),
        sm_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        temperature_c=ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        power_mw=ask(nvml.nvmlDeviceGetPowerUsage, handle),
        power_limit_mw=ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle),
        throttle_bits=ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
    )


def uuid_of(device: str) -> str:
    """Return the GPU's UUID as NVML writes it: PyTorch's numbering may leave some out."""
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    return f'GPU-{properties.uuid}'


def _text(value: str | bytes | None) -> str:
    # bytes: pynvml before version 11.5
    if isinstance(value, bytes):
        return value.decode(errors='replace')
    return UNKNOWN if value is None else value


def _scaled(value: int | None, unit: int = 1) -> str:
    return UNKNOWN if value is None else f'{value / unit:.0f}'

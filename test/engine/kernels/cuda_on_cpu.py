"""Compile CUDA kernels for the CPU, where every thread is a fiber (blocks_on_cpu.h)."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from pi05_ros.engine import kernels

_HERE = Path(__file__).parent
_HEADERS = Path(kernels.__file__).parent
_KERNEL = re.compile(r'__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s+)?(\w+)\(')
_INCLUDED = re.compile(r'^#include "(.*)"', re.MULTILINE)


class TensorMap(ctypes.Structure):
    """A bfloat16 matrix of which kernels load tiles of some rows and 64 columns, or 16."""

    _fields_ = [
        ('base', ctypes.c_void_p), ('rows', ctypes.c_int), ('columns', ctypes.c_int),
        ('stride', ctypes.c_int), ('box_rows', ctypes.c_int), ('box_columns', ctypes.c_int),
    ]  # fmt: skip

    def __init__(self, matrix: torch.Tensor, box_rows: int, box_columns: int = 64) -> None:
        assert matrix.dtype == torch.bfloat16 and matrix.stride(1) == 1
        box = box_rows, box_columns
        super().__init__(matrix.data_ptr(), *matrix.shape, matrix.stride(0), *box)
        self.matrix = matrix  # lives as long as its map


class CpuModule:
    """The ``extern "C"`` kernels of a source and of the headers beside it.

    Args:
        source: the CUDA source.
        macros: sizes that it is compiled with.
        library: the file to build.
    """

    def __init__(
        self, source: Path, macros: Mapping[str, int | str | float], library: Path
    ) -> None:
        command = ['c++', '-std=c++17', '-O2', '-w', '-shared', '-fPIC', '-o', str(library)]
        command.append(f'-I{_HEADERS}')
        command += [f'-D{name}={value}' for name, value in macros.items()]
        exports = ''.join(f'EXPORT({name})' for name in _kernels(source))
        command += [f'-DSOURCE="{source}"', f'-DKERNELS={exports}']
        subprocess.run([*command, str(_HERE / 'cuda_on_cpu_main.cpp')], check=True)
        self._library = ctypes.CDLL(str(library))

    def launch(
        self, name: str, blocks: int, threads: int, cluster: int,
        *arguments: torch.Tensor | float | int | ctypes.Structure,
    ) -> None:  # fmt: skip
        """Run a kernel.

        Raises:
            RuntimeError: it waits for ever or does what a GPU leaves undefined.
        """
        values = [_value(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values)
        )
        kernel = getattr(self._library, f'on_cpu_{name}')
        kernel.restype = ctypes.c_char_p
        wrong = kernel(blocks, threads, cluster, addresses)
        if wrong is not None:
            raise RuntimeError(f'{name}: {wrong.decode()}')


def _kernels(source: Path) -> list[str]:
    if not source.exists():
        return []  # a header that has its own version for the CPU
    text = source.read_text()
    headers = [source.with_name(name) for name in _INCLUDED.findall(text)]
    found = [*_KERNEL.findall(text), *(name for header in headers for name in _kernels(header))]
    return list(dict.fromkeys(found))


def _value(argument: torch.Tensor | float | int | ctypes.Structure):
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return argument if isinstance(argument, ctypes.Structure) else ctypes.c_int(argument)

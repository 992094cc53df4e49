"""Compile CUDA C++ when a stage is built, and launch it on PyTorch's current stream."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi05_ros.engine.pipeline import BackendError

from .image_cache import cached_image

_INCLUDED = re.compile(r'^#include "(.*)"', re.MULTILINE)


def has_bindings() -> bool:
    """Return whether the package cuda-bindings is there; PyTorch's CUDA packages bring it."""
    return find_spec('cuda') is not None and find_spec('cuda.bindings') is not None


@cache
def compile_module(
    source: Path, macros: tuple[tuple[str, int | str], ...], device: torch.device
) -> Any:
    """Return the driver's module of a source, loaded once per process, device and macros.

    The headers that it includes lie beside it. What was compiled before comes from the disk
    (:mod:`.image_cache`).

    Raises:
        BackendError: the package cuda-bindings is missing, or the source does not compile.
    """
    driver, _ = _bindings()
    major, minor = torch.cuda.get_device_capability(device)
    image = _image(source, macros, f'sm_{major}{minor}')
    torch.cuda.synchronize(device)  # makes PyTorch's context current; the module is loaded there
    with torch.cuda.device(device):
        return _checked(driver.cuModuleLoadData(image), f'loading {source.name}')


def _image(source: Path, macros: tuple[tuple[str, int | str], ...], architecture: str) -> bytes:
    _, nvrtc = _bindings()
    version = _checked(nvrtc.nvrtcVersion(), 'NVRTC')
    texts = [path.read_bytes() for path in (source, *included_files(source))]
    inputs = [repr((version, architecture, source.name, macros)).encode(), *texts]
    return cached_image(inputs, lambda: compile_image(source, macros, architecture)[0])


def compile_image(
    source: Path, macros: Sequence[tuple[str, int | str]], architecture: str,
    options: Sequence[str] = (),
) -> tuple[bytes, str]:  # fmt: skip
    """Return a source compiled for an architecture such as 'sm_90', and what the compiler says.

    It needs no GPU.

    Args:
        options: more options of the compiler.
    Raises:
        BackendError: the package cuda-bindings is missing, or the source does not compile.
    """
    _, nvrtc = _bindings()
    headers = included_files(source)
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            source.read_bytes(), source.name.encode(), len(headers),
            [header.read_bytes() for header in headers],
            [header.name.encode() for header in headers],
        ),
        'NVRTC',
    )  # fmt: skip
    # The a: instructions that only this generation has.
    all_options = [f'--gpu-architecture={architecture}a', '--std=c++17', *options]
    all_options += [f'-D{name}={value}' for name, value in macros]
    encoded = [option.encode() for option in all_options]
    failed = int(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]) != 0
    log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program), 'NVRTC'))
    nvrtc.nvrtcGetProgramLog(program, log)
    said = log.decode(errors='replace').rstrip('\0')
    if failed:
        raise BackendError(f'{source.name} does not compile: {said}')
    image = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program), 'NVRTC'))
    _checked(nvrtc.nvrtcGetCUBIN(program, image), 'NVRTC')
    nvrtc.nvrtcDestroyProgram(program)
    return image, said


def included_files(source: Path) -> list[Path]:
    """Return the files that a source includes, and those that they include."""
    found = [source.with_name(name) for name in _INCLUDED.findall(source.read_text())]
    further = [path for header in found for path in included_files(header)]
    return list(dict.fromkeys(found + further))


class CudaKernel:
    """One kernel of a module with its launch shape; ``cluster`` divides ``blocks``."""

    def __init__(
        self, module: Any, name: str, blocks: int, threads: int, shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:  # fmt: skip
        driver, _ = _bindings()
        self._driver, self._name = driver, name
        self._function = _checked(driver.cuModuleGetFunction(module, name.encode()), name)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(
            driver.cuFuncSetAttribute(self._function, attribute, shared_bytes),
            f'{name}: {shared_bytes} bytes of shared memory',
        )
        if cluster > 8:
            larger = (
                driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            )
            _checked(driver.cuFuncSetAttribute(self._function, larger, 1), name)
        # All kernels of a chain want the same split of L1 and shared memory: a multiprocessor
        # changes it only when it is empty, so kernels could not overlap.
        carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _checked(driver.cuFuncSetAttribute(self._function, carveout, 100), name)
        shape = (blocks, threads, shared_bytes, cluster)
        self._configs = {early: self._config(*shape, early) for early in (False, True)}

    def launch(
        self, arguments: Sequence[TensorTiles | Tensor | float | int], *, early: bool
    ) -> None:
        """Enqueue the kernel on the current stream.

        Args:
            arguments: tensors as pointers, tiles by value, floats as float, integers as int.
            early: it may start before the kernel before it has completed, for which it waits
                itself (programmatic dependent launch).
        """
        values, kinds = zip(*map(_argument, arguments), strict=True)
        config = self._configs[early]
        config.hStream = self._driver.CUstream(torch.cuda.current_stream().cuda_stream)
        _checked(
            self._driver.cuLaunchKernelEx(config, self._function, (values, kinds), 0),
            f'launching {self._name}',
        )

    def _config(
        self, blocks: int, threads: int, shared_bytes: int, cluster: int, early: bool
    ) -> Any:
        driver = self._driver
        ids = driver.CUlaunchAttributeID
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        attributes = []
        if early:
            overlap = driver.CUlaunchAttribute()
            overlap.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            attributes.append(overlap)
        if cluster > 1:
            together = driver.CUlaunchAttribute()
            together.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = together.value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
            together.value.clusterDim = size
            attributes.append(together)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config


class ShapedKernel:
    """A source's kernel for every shape that asks for it, compiled when the first one does."""

    def __init__(self, source: Path, name: str, device: torch.device) -> None:
        self._source, self._name, self._device = source, name, device
        self._made: dict[tuple, CudaKernel] = {}

    def made_for(
        self, defines: Mapping[str, int | str], blocks: int, threads: int, shared_bytes: int,
        cluster: int = 1,
    ) -> CudaKernel:  # fmt: skip
        """Return the kernel with these macros and this launch shape.

        Raises:
            BackendError: the source does not compile here.
        """
        macros, shape = tuple(defines.items()), (blocks, threads, shared_bytes, cluster)
        if (macros, shape) not in self._made:
            module = compile_module(self._source, macros, self._device)
            self._made[macros, shape] = CudaKernel(module, self._name, *shape)
        return self._made[macros, shape]


class TensorTiles:
    """A matrix as kernels copy boxes of it to shared memory, swizzled; passed by value.

    Args:
        box_columns: the swizzle spans them: 64 (128 bytes) or 16 (32 bytes).
    """

    def __init__(self, matrix: Tensor, box_rows: int, box_columns: int) -> None:
        driver, _ = _bindings()
        swizzle = {
            64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            16: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
        }[box_columns]
        rows, columns = matrix.shape
        size, bits = matrix.element_size(), driver.cuuint64_t
        small = driver.cuuint32_t
        self.map = _checked(
            driver.cuTensorMapEncodeTiled(
                driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                matrix.data_ptr(), [bits(columns), bits(rows)], [bits(columns * size)],
                [small(box_columns), small(box_rows)], [small(1), small(1)],
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ),
            'describing a matrix to the copy engine',
        )  # fmt: skip


def _argument(value: TensorTiles | Tensor | float | int) -> tuple[Any, Any]:
    if isinstance(value, TensorTiles):
        return value.map, None
    if isinstance(value, Tensor):
        return value.data_ptr(), ctypes.c_void_p
    if isinstance(value, float):
        return value, ctypes.c_float
    return value, ctypes.c_int


def _bindings() -> Any:
    """Return (driver, nvrtc) of the cuda-bindings package."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as missing:
        raise BackendError(
            f'the Hopper kernels need the package cuda-bindings ({missing}); install it'
        ) from None
    return driver, nvrtc


def _checked(result: tuple, doing: str) -> Any:
    """Return the values of a driver or NVRTC call, or raise with its error name."""
    error, *values = result
    if int(error) != 0:
        raise BackendError(f'{doing} failed: {error!r}')
    return values[0] if len(values) == 1 else values

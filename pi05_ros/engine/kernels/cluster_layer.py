"""The expert layer in CUDA C++ for GPUs with thread block clusters: compile, launch.

The kernels are in ``expert_layer.cu``, whose head says what they compute and why they are not in
Triton. They are compiled by NVRTC for the model's exact sizes when a stage is built; their plain
twins are those of ``small_gemm.py`` and ``split_attention.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.config import GemmaConfig

PARTS = 16  # row stride of the sums of squares that a residual product leaves
_ATTENTION_RANKS = 8
# Clusters of 8 blocks that are resident at once with one block per multiprocessor: 15 on the
# H200 measured, not 16, because a cluster stays within a group of 16 or 18 of them.
_ATTENTION_CLUSTERS = 15
_MAX_HORIZON = 64
_SOURCE = Path(__file__).with_name('expert_layer.cu')
_PAD = 8  # kPad of the source
_BLOCK_BYTES = 227 * 1024  # shared memory that one block may have
# With less, three blocks of a kernel that starts early would crowd on a multiprocessor that the
# previous kernel left free, while others get none.
_LEAST_BLOCK_BYTES = 77 * 1024


@dataclass(frozen=True)
class ClusterTiling:
    """How one product is cut up: ``ranks`` blocks of a cluster split K of ``rows`` weight rows.

    ``warps_n`` warps share the rows, ``warps_k`` groups of them split the block's K again.
    """

    rows: int
    ranks: int
    warps_n: int
    warps_k: int

    def threads(self) -> int:
        """Return the threads of a block."""
        return 32 * self.warps_n * self.warps_k

    def shared_bytes(self, depth: int, horizon: int) -> int:
        """Return the shared memory of a block: operands, and the sums that replace them."""
        tokens = -(-horizon // 8) * 8
        operands = 2 * (self.rows + horizon) * (depth // self.ranks + _PAD) + 4 * tokens
        return max(operands, 4 * tokens * (self.rows + 4))


@dataclass(frozen=True)
class ClusterPlan:
    """The sizes that the kernels are compiled for."""

    qkv: ClusterTiling
    attention_out: ClusterTiling
    gate_up: ClusterTiling
    down: ClusterTiling
    queries: int  # query rows of an attention cluster
    keys_per_rank: int


def cluster_misfit(expert: GemmaConfig, horizon: int, max_prefix: int) -> str | None:
    """Return why these kernels cannot take a model shape, or None if they can."""
    heads = expert.num_heads * expert.head_dim
    if (
        expert.num_kv_heads != 1
        or expert.head_dim not in (128, 256)
        or expert.width != 1024
        or heads % 512
        or expert.mlp_dim % 512
    ):
        return f'they are made for the released expert, not for {expert}'
    if horizon > _MAX_HORIZON:
        return f'they take a horizon up to {_MAX_HORIZON}, not {horizon}'
    needed = attention_shared_bytes(cluster_plan(expert, horizon, max_prefix), expert, horizon)
    if needed > _BLOCK_BYTES:
        return (
            f'{max_prefix} prefix tokens need {needed} bytes of shared memory per block, '
            f'there are {_BLOCK_BYTES}'
        )
    return None


def cluster_plan(expert: GemmaConfig, horizon: int, max_prefix: int) -> ClusterPlan:
    """Return the tilings for a model shape that fits."""
    keys = -(-(max_prefix + horizon) // _ATTENTION_RANKS)
    return ClusterPlan(
        qkv=ClusterTiling(rows=96, ranks=4, warps_n=6, warps_k=2),
        attention_out=ClusterTiling(rows=80, ranks=8, warps_n=5, warps_k=2),
        gate_up=ClusterTiling(rows=128, ranks=2, warps_n=4, warps_k=2),
        down=ClusterTiling(rows=80, ranks=8, warps_n=5, warps_k=2),
        queries=-(-expert.num_heads * horizon // _ATTENTION_CLUSTERS),
        keys_per_rank=-(-keys // 16) * 16,
    )


def attention_shared_bytes(plan: ClusterPlan, expert: GemmaConfig, horizon: int) -> int:
    """Return the shared memory of one attention block."""
    rows = -(-plan.queries // 16) * 16
    row = 2 * (expert.head_dim + _PAD)
    keys = plan.keys_per_rank
    queries = max(plan.queries * row, rows * 2 * (keys + _PAD))
    statistics = rows * (8 + 2 * 8 * 4)
    return 2 * keys * row + max(queries + statistics, rows * row)


class ClusterKernels:
    """The five compiled kernels of a layer; one call enqueues one of them."""

    def __init__(
        self, expert: GemmaConfig, horizon: int, max_prefix: int, device: torch.device
    ) -> None:
        misfit = cluster_misfit(expert, horizon, max_prefix)
        if misfit is not None:
            raise BackendError(f'the cluster kernels do not fit: {misfit}')
        self.plan = cluster_plan(expert, horizon, max_prefix)
        with torch.cuda.device(device):
            module = _compile(_options(self.plan, expert, horizon, device))
        heads = expert.num_heads * expert.head_dim
        plan = self.plan
        self._kernels = {
            'attend': _Kernel(
                module, 'attend', -(-expert.num_heads * horizon // plan.queries),
                _ATTENTION_RANKS, 256, attention_shared_bytes(plan, expert, horizon),
            )
        }  # fmt: skip
        for name, tiling, rows, depth in (
            ('qkv_rope', plan.qkv, heads + 2 * expert.head_dim, expert.width),
            ('attention_out', plan.attention_out, expert.width, heads),
            ('gate_up', plan.gate_up, 2 * expert.mlp_dim, expert.width),
            ('down', plan.down, expert.width, expert.mlp_dim),
        ):
            self._kernels[name] = _Kernel(
                module, name, -(-rows // tiling.rows), tiling.ranks, tiling.threads(),
                max(tiling.shared_bytes(depth, horizon), _LEAST_BLOCK_BYTES),
            )  # fmt: skip

    def launch(self, name: str, arguments: Sequence[Tensor | float], prefetch: Tensor | None,
               pdl: bool) -> None:  # fmt: skip
        """Enqueue a kernel on the current stream.

        Args:
            arguments: as in the source, without the last two.
            prefetch: weights of a later kernel that this one brings into L2 on the way.
            pdl: let it start before the previous kernel of the stream has completed.
        """
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        kinds = [ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_float for a in arguments]
        size = 0 if prefetch is None else prefetch.numel() * prefetch.element_size()
        values += [0 if prefetch is None else prefetch.data_ptr(), size]
        self._kernels[name].launch(tuple(values), (*kinds, ctypes.c_void_p, ctypes.c_uint32), pdl)


def _options(
    plan: ClusterPlan, expert: GemmaConfig, horizon: int, device: torch.device
) -> list[str]:
    major, minor = torch.cuda.get_device_capability(device)
    sizes: dict[str, Any] = {
        'HORIZON': horizon,
        'WIDTH': expert.width,
        'MLP': expert.mlp_dim,
        'HEADS': expert.num_heads,
        'HEAD_DIM': expert.head_dim,
        'PARTS': PARTS,
        'QUERIES': plan.queries,
        'KEYS': plan.keys_per_rank,
        'EPS': f'{expert.rms_norm_eps}f',
    }
    for prefix, tiling in (
        ('QKV', plan.qkv), ('OUT', plan.attention_out), ('UP', plan.gate_up), ('DOWN', plan.down)
    ):  # fmt: skip
        sizes[f'{prefix}_ROWS'] = tiling.rows
        sizes[f'{prefix}_RANKS'] = tiling.ranks
        sizes[f'{prefix}_WARPS_N'] = tiling.warps_n
        sizes[f'{prefix}_WARPS_K'] = tiling.warps_k
    defines = [f'-D{name}={value}' for name, value in sizes.items()]
    return [f'--gpu-architecture=sm_{major}{minor}', '--std=c++17', *defines]


def _bindings() -> Any:
    """Return (driver, nvrtc) of the cuda-bindings package."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as missing:
        raise BackendError(
            f'the cluster kernels need the package cuda-bindings ({missing}); install it'
        ) from None
    return driver, nvrtc


def _checked(result: tuple, doing: str) -> Any:
    """Return the values of a driver or NVRTC call, or raise with its error name."""
    error, *values = result
    if int(error) != 0:
        raise BackendError(f'{doing} failed: {error!r}')
    return values[0] if len(values) == 1 else values


def _compile(options: list[str]) -> Any:
    """Compile the source and return the loaded module."""
    driver, nvrtc = _bindings()
    source = _SOURCE.read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, _SOURCE.name.encode(), 0, [], []), 'NVRTC')
    encoded = [option.encode() for option in options]
    if int(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]) != 0:
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program), 'NVRTC'))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f'{_SOURCE.name} does not compile: {log.decode(errors="replace")}')
    image = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program), 'NVRTC'))
    _checked(nvrtc.nvrtcGetCUBIN(program, image), 'NVRTC')
    nvrtc.nvrtcDestroyProgram(program)
    torch.cuda.synchronize()  # makes PyTorch's context current; the module is loaded into it
    return _checked(driver.cuModuleLoadData(image), 'loading the cluster kernels')


class _Kernel:
    """One kernel with its launch shape."""

    def __init__(
        self, module: Any, name: str, clusters: int, ranks: int, threads: int, shared_bytes: int
    ) -> None:
        driver, _ = _bindings()
        self._driver, self._name = driver, name
        self._function = _checked(driver.cuModuleGetFunction(module, name.encode()), name)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(
            driver.cuFuncSetAttribute(self._function, attribute, shared_bytes),
            f'{name}: {shared_bytes} bytes of shared memory',
        )
        shape = (clusters * ranks, ranks, threads, shared_bytes)
        self._configs = {pdl: self._config(*shape, pdl) for pdl in (False, True)}

    def _config(self, blocks: int, ranks: int, threads: int, shared_bytes: int, pdl: bool) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x = ranks
        cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
        attributes = [cluster]
        if pdl:
            overlap = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            overlap.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            attributes.append(overlap)
        config.attrs = attributes
        config.numAttrs = len(attributes)
        return config

    def launch(self, values: tuple, kinds: tuple, pdl: bool) -> None:
        """Enqueue on the current stream."""
        config = self._configs[pdl]
        config.hStream = self._driver.CUstream(torch.cuda.current_stream().cuda_stream)
        _checked(
            self._driver.cuLaunchKernelEx(config, self._function, (values, kinds), 0),
            f'launching {self._name}',
        )

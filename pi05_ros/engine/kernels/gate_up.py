"""RMSNorm scale, gate and up projection and GEGLU in one GEMM.

The merged projection is the largest product of the prefill, and its output would be written and
read again only to be halved. Here gate and up rows alternate in the weight, so that a pair lies in
neighbouring registers of one thread and GEGLU happens before anything is written.

RMSNorm divides each row by a scalar, which commutes with a linear layer: the product runs on the
raw residual with (1 + w) in its weight, and the row's scale is applied to the accumulator. That
also spares one rounding.

The GEMM is persistent: one program per multiprocessor walks over the output tiles, so that the
epilogue of one tile overlaps with the loads of the next. Tiles of the same weight rows follow each
other, so weights come from device memory once.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import shared_memory_bytes
from .launch import let_next_start


@triton.jit
def row_scale(p_x, row, width, eps, BLOCK: tl.constexpr):
    """Return 1 / rms of one row of the residual, in fp32."""
    o_column = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + row * width + o_column, mask=o_column < width, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(b_x * b_x, axis=0) / width + eps)


@triton.jit
def _row_scale_kernel(p_x, p_scale, width, eps, BLOCK: tl.constexpr, EARLY_NEXT: tl.constexpr):
    let_next_start(EARLY_NEXT)
    row = tl.program_id(0).to(tl.int64)
    tl.store(p_scale + row, row_scale(p_x, row, width, eps, BLOCK))


@triton.jit
def _gate_up_kernel(
    x_desc,  # (rows, depth): the residual
    weight_desc,  # (2 * hidden, depth): gate and up rows alternate
    out_desc,  # (rows, hidden)
    p_scale,  # (rows,) fp32
    rows,
    features,  # 2 * hidden
    depth,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    tiles = row_tiles * tl.cdiv(features, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        first_row = (tile % row_tiles) * BLOCK_M
        first_feature = (tile // row_tiles) * BLOCK_N
        b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(depth, BLOCK_K)):
            b_x = x_desc.load([first_row, k * BLOCK_K])
            b_weight = weight_desc.load([first_feature, k * BLOCK_K])
            b_acc = tl.dot(b_x, b_weight.T, b_acc, input_precision='ieee')
        o_row = first_row + tl.arange(0, BLOCK_M)
        b_scale = tl.load(p_scale + o_row, mask=o_row < rows, other=0.0)[:, None]
        b_gate, b_up = tl.split(tl.reshape(b_acc, (BLOCK_M, BLOCK_N // 2, 2)))
        b_gate *= b_scale
        # gelu_tanh(g) = g * sigmoid(2u), u = sqrt(2/pi) * (g + 0.044715 g^3): the same function.
        b_inner = 1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
        b_out = b_gate * tl.sigmoid(b_inner) * (b_up * b_scale)
        out_desc.store([first_row, first_feature // 2], b_out.to(out_desc.dtype))


# What fits the shared memory of a Hopper multiprocessor, and of any GPU with bfloat16.
_LARGE_LAUNCH = {'block_m': 128, 'block_n': 256, 'block_k': 64, 'warps': 8, 'stages': 4}
_SMALL_LAUNCH = {'block_m': 64, 'block_n': 128, 'block_k': 64, 'warps': 4, 'stages': 3}
_LARGE_SHARED_BYTES = 200 * 1024


@cache
def default_launch(device: torch.device) -> dict[str, int]:
    """Return block sizes that fit a device, and one program per multiprocessor."""
    large = shared_memory_bytes(device) >= _LARGE_SHARED_BYTES
    launch = _LARGE_LAUNCH if large else _SMALL_LAUNCH
    if device.type != 'cuda':
        return {**launch, 'programs': 4}
    return {**launch, 'programs': torch.cuda.get_device_properties(device).multi_processor_count}


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor,
    out: torch.Tensor,
    launch: dict[str, int] | None = None,
) -> None:
    """Write ``gelu_tanh(s * gate(x)) * (s * up(x))`` with s = 1 / rms(x) per row.

    Args:
        x: (M, W), the *unnormalised* residual.
        weight: (2 F, W), gate and up rows alternating, see :func:`interleave`.
        scale: (>= M,) fp32, overwritten with s.
        out: (M, F).
        launch: block sizes (powers of two), warps, pipeline stages and number of programs.
    """
    rows, depth = x.shape
    features = weight.shape[0]
    launch = launch or default_launch(x.device)
    block_m, block_n, block_k = launch['block_m'], launch['block_n'], launch['block_k']
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(features, block_n)
    programs = min(launch['programs'], tiles)
    launch_row_scale(x, eps, scale)
    _gate_up_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        TensorDescriptor.from_tensor(out, [block_m, block_n // 2]),
        scale,
        rows,
        features,
        depth,
        PROGRAMS=programs,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=launch['warps'],
        num_stages=launch['stages'],
    )


def launch_row_scale(
    x: torch.Tensor, eps: float, scale: torch.Tensor, *, early_next: bool = False
) -> None:
    """Enqueue ``scale = 1 / rms(x)`` per row, fp32.

    Args:
        early_next: the kernel behind may start at once; it waits for this one itself.
    """
    rows, width = x.shape
    _row_scale_kernel[(rows,)](
        x, scale, width, eps, BLOCK=triton.next_power_of_2(width), EARLY_NEXT=early_next,
        num_warps=4,
    )  # fmt: skip


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return (2 F, W) with row 2 i of gate (F, W) and row 2 i + 1 of up (F, W)."""
    return torch.stack((gate, up), dim=1).flatten(0, 1)


def row_scale_plain(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / rms of each row, (M, 1) fp32 (openpi modeling_gemma.py)."""
    return torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)


def gate_up_plain(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """Do what :func:`gate_up` does, in plain PyTorch."""
    found = row_scale_plain(x, eps)
    scale[: len(x)].copy_(found[:, 0])
    products = torch.nn.functional.linear(x, weight).float() * found
    gate, up = products[:, 0::2], products[:, 1::2]
    out.copy_(torch.nn.functional.gelu(gate, approximate='tanh') * up)

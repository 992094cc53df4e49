"""Programmatic dependent launch (PDL) and L2 prefetch, for kernels of a few microseconds.

A denoise step is a chain of about a hundred tiny kernels, each of which waits for the one before
it and then streams weights that do not depend on anything. With PDL the next kernel starts while
the previous one still runs; before its dependency wait it asks for its weights, so that they
travel from HBM to L2 during the previous kernel's work.

The order in every kernel is: :func:`let_next_start`, :func:`prefetch_rows` (weights only),
:func:`wait_for_previous`, and only then loads of activations and any store. A wait ends when the
previous grid has completed and its writes are visible; that grid waited for its own predecessor,
so everything older is complete as well.

The helpers are no-ops without PDL: before compute capability 9.0, and in the interpreter, which
knows no inline assembly.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tlc

from pi05_ros.engine.pipeline import BackendError


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Allow the next kernel of the stream to start; it still waits for this one's results."""
    if PDL:
        tlc.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the previous kernel of the stream has completed and its writes are visible."""
    if PDL:
        tlc.gdc_wait()


@triton.jit
def prefetch_rows(
    ptr,  # first element of the block
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # elements per row, contiguous; 16 bytes times a power of two
    STRIDE: tl.constexpr,  # elements between rows
    WARPS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Ask for a (ROWS, COLS) block to be brought into L2, without waiting for it.

    The request is a uniform instruction: lanes of a warp with different addresses would issue
    theirs one after the other. So all lanes of a warp ask for the same range, each warp for its
    own, in as few rounds as there are rows per warp.
    """
    if PREFETCH:
        element_bytes: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        per_row: tl.constexpr = 1 if ROWS >= WARPS else WARPS // ROWS
        part: tl.constexpr = COLS // per_row
        size = tl.full((WARPS * 32,), part * element_bytes, tl.int32)
        for round in tl.static_range(ROWS * per_row // WARPS):
            request = round * WARPS + tl.arange(0, WARPS * 32) // 32
            at = request // per_row * STRIDE + request % per_row * part
            _prefetch((ptr + at).to(tl.int64), size)


@triton.jit
def prefetch_range(
    ptr,  # first element; its address is a multiple of 16 bytes
    count,  # elements, need not be a constant; less than 16 bytes per warp may be left out
    WARPS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Ask for ``count`` contiguous elements to be brought into L2, a part of them per warp."""
    if PREFETCH:
        element_bytes: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        unit: tl.constexpr = 16 // element_bytes
        part = count // (WARPS * unit) * unit
        if part > 0:
            warp = tl.arange(0, WARPS * 32) // 32
            size = tl.full((WARPS * 32,), 0, tl.int32) + part * element_bytes
            _prefetch((ptr + warp * part).to(tl.int64), size)


@triton.jit
def _prefetch(address, size):
    tl.inline_asm_elementwise(
        'cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;',
        '=r,l,r',
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def is_interpreted() -> bool:
    """Return whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def has_pdl(device: torch.device) -> bool:
    """Return whether kernels on ``device`` may use PDL and bulk prefetch (Hopper or newer)."""
    if is_interpreted() or device.type != 'cuda':
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def block_size(size: int, limit: int, name: str) -> int:
    """Return the largest power of two that divides ``size`` and is at most ``limit``.

    Raises:
        BackendError: it is less than 16, the smallest side of a matrix instruction.
    """
    block = min(size & -size, limit)
    if block < 16:
        raise BackendError(
            f'{name} is {size}; the fused kernels need a multiple of 16. '
            'Choose the eager backend for this model'
        )
    return block

"""Pillow's bilinear resize on the GPU, bit for bit, and the cut into patches.

Pillow resizes 8-bit images with integers only: per axis, each output pixel is a weighted sum of
input pixels with 22-bit fixed-point weights, rounded to 8 bits; the horizontal pass comes first
and its 8-bit result feeds the vertical pass (Pillow, Resample.c). Downscaling widens the filter,
which is the antialiasing. Integers have no rounding order, so the result can be exactly the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from pi05_ros.model.images import fitted_size

from ..pipeline import BackendError

FRACTION_BITS = 22  # Pillow: 32 bits, less 8 for the pixel and 2 for headroom


@dataclass(frozen=True)
class AxisFilter:
    """How one axis is resized.

    Args:
        first: (out,) int32, first input pixel of each output pixel.
        weights: (out, taps) int32 in units of 2**-22; zero beyond the filter.
    """

    first: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Letterbox:
    """Where an image lands on the model's square canvas (openpi image_tools.py); else black."""

    height_px: int
    width_px: int
    top_px: int
    left_px: int


def letterbox(height_px: int, width_px: int, canvas_px: int) -> Letterbox:
    """Fit an image into a square, keeping its aspect ratio.

    Raises:
        BackendError: the image is so elongated that a side would vanish.
    """
    height, width = fitted_size(height_px, width_px, canvas_px)
    if not height or not width:
        raise BackendError(
            f'an image of {height_px}x{width_px} px is too elongated to fit '
            f'{canvas_px}x{canvas_px} px'
        )
    return Letterbox(height, width, (canvas_px - height) // 2, (canvas_px - width) // 2)


def axis_filter(in_px: int, out_px: int) -> AxisFilter:
    """Return Pillow's fixed-point bilinear filter for one axis (Resample.c, precompute_coeffs)."""
    scale = in_px / out_px
    support = max(scale, 1.0)
    taps = math.ceil(support) * 2 + 1
    first = np.zeros(out_px, np.int32)
    weights = np.zeros((out_px, taps), np.int32)
    for index in range(out_px):
        centre = (index + 0.5) * scale
        start = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), in_px) - start
        # Pillow multiplies by the inverse instead of dividing, in double.
        inverse = 1.0 / support
        distance = [abs((x + start - centre + 0.5) * inverse) for x in range(count)]
        triangle = [1.0 - d if d < 1.0 else 0.0 for d in distance]
        total = sum(triangle)
        first[index] = start
        for x, value in enumerate(triangle):
            weights[index, x] = int(0.5 + value / total * (1 << FRACTION_BITS))
    return AxisFilter(first, weights)


@dataclass(frozen=True)
class ResizeTables:
    """Everything the kernels need for a set of views of different sizes.

    Args:
        sizes_px: (height, width) of each raw image.
        boxes: where each lands. canvas_px, patch_px: from the model.
        views: (V, fields) int32 on the device, see ``_VIEW_FIELDS``.
        first, weights: all axis filters behind each other; weights have ``taps`` columns.
        image_bytes: size of all raw images together. scratch_bytes: of the horizontal pass.
    """

    sizes_px: tuple[tuple[int, int], ...]
    boxes: tuple[Letterbox, ...]
    canvas_px: int
    patch_px: int
    taps: int
    views: torch.Tensor
    first: torch.Tensor
    weights: torch.Tensor
    image_bytes: int
    scratch_bytes: int


# image, scratch, height, new_height, new_width, top, left, x_axis, y_axis, width: starts of the
# view's raw bytes, scratch bytes and axis filters, and its sizes in pixels
_VIEW_FIELDS: tl.constexpr = tl.constexpr(10)


def make_tables(
    sizes_px: Sequence[tuple[int, int]], canvas_px: int, patch_px: int, device: torch.device
) -> ResizeTables:
    """Compute the filters of each view and put them on the device."""
    boxes = tuple(letterbox(height, width, canvas_px) for height, width in sizes_px)
    filters, rows = [], []
    image = scratch = axis = 0
    for (height, width), box in zip(sizes_px, boxes, strict=True):
        filters += [axis_filter(width, box.width_px), axis_filter(height, box.height_px)]
        row = [image, scratch, height, box.height_px, box.width_px, box.top_px, box.left_px]
        rows.append([*row, axis, axis + box.width_px, width])
        axis += box.width_px + box.height_px
        image += height * width * 3
        scratch += height * box.width_px * 3
    taps = max(entry.weights.shape[1] for entry in filters)
    weights = [np.pad(f.weights, ((0, 0), (0, taps - f.weights.shape[1]))) for f in filters]
    return ResizeTables(
        sizes_px=tuple(sizes_px),
        boxes=boxes,
        canvas_px=canvas_px,
        patch_px=patch_px,
        taps=taps,
        views=torch.tensor(rows, dtype=torch.int32, device=device),
        first=torch.from_numpy(np.concatenate([f.first for f in filters])).to(device),
        weights=torch.from_numpy(np.concatenate(weights)).to(device),
        image_bytes=image,
        scratch_bytes=scratch,
    )


@triton.jit
def _weighted_sum(p_source, stride, limit, p_weights, m_out, TAPS: tl.constexpr):
    """Return one output byte per lane: the fixed-point sum over the taps, rounded and clipped."""
    b_sum = tl.full(m_out.shape, 1 << 21, tl.int32)
    for tap in range(TAPS):
        m_tap = m_out & (tap < limit)
        b_pixel = tl.load(p_source + tap * stride, mask=m_tap, other=0).to(tl.int32)
        b_sum += b_pixel * tl.load(p_weights + tap, mask=m_tap, other=0)
    return tl.minimum(tl.maximum(b_sum >> 22, 0), 255)


@triton.jit
def _horizontal_kernel(
    p_images, p_scratch, p_views, p_first, p_weights, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    p_view = p_views + tl.program_id(1) * _VIEW_FIELDS
    height = tl.load(p_view + 2)
    new_width = tl.load(p_view + 4)
    width = tl.load(p_view + 9)
    o_out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_out = o_out < height * new_width * 3
    row = o_out // (new_width * 3)
    column = o_out // 3 % new_width
    axis = tl.load(p_view + 7) + column
    first = tl.load(p_first + axis, mask=m_out, other=0)
    p_source = p_images + tl.load(p_view) + (row * width + first) * 3 + o_out % 3
    b_out = _weighted_sum(p_source, 3, width - first, p_weights + axis * TAPS, m_out, TAPS)
    tl.store(p_scratch + tl.load(p_view + 1) + o_out, b_out.to(tl.uint8), mask=m_out)


@triton.jit
def _patches_kernel(
    p_scratch,
    p_patches,  # (V * tokens, COPIES * 3 * PATCH * PATCH + padding)
    p_views,
    p_first,
    p_weights,
    row_stride,
    CANVAS: tl.constexpr,
    PATCH: tl.constexpr,
    COPIES: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIDE: tl.constexpr = CANVAS // PATCH
    FEATURES: tl.constexpr = 3 * PATCH * PATCH
    view = tl.program_id(1)
    p_view = p_views + view * _VIEW_FIELDS
    o_out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_all = o_out < SIDE * SIDE * FEATURES
    token = o_out // FEATURES
    feature = o_out % FEATURES
    channel = feature // (PATCH * PATCH)
    y = token // SIDE * PATCH + feature // PATCH % PATCH - tl.load(p_view + 5)
    x = token % SIDE * PATCH + feature % PATCH - tl.load(p_view + 6)
    new_width = tl.load(p_view + 4)
    m_out = m_all & (y >= 0) & (y < tl.load(p_view + 3)) & (x >= 0) & (x < new_width)
    axis = tl.load(p_view + 8) + y
    first = tl.load(p_first + axis, mask=m_out, other=0)
    stride = new_width * 3
    p_source = p_scratch + tl.load(p_view + 1) + first * stride + x * 3 + channel
    limit = tl.load(p_view + 2) - first
    b_out = _weighted_sum(p_source, stride, limit, p_weights + axis * TAPS, m_out, TAPS)
    b_out = tl.where(m_out, b_out, 0).to(tl.float32).to(p_patches.dtype.element_ty)
    p_row = p_patches + (view * SIDE * SIDE + token) * row_stride + feature
    for copy in range(COPIES):
        tl.store(p_row + copy * FEATURES, b_out, mask=m_all)


def resize_to_patches(
    images: torch.Tensor,
    tables: ResizeTables,
    scratch: torch.Tensor,
    patches: torch.Tensor,
    copies: int,
) -> None:
    """Resize each view with padding and write its patches as rows of pixel values 0..255.

    Args:
        images: (tables.image_bytes,) uint8, the raw (h, w, 3) views behind each other.
        scratch: (tables.scratch_bytes,) uint8.
        patches: (V * tokens, >= copies * 3 * patch_px**2): columns are channel, y, x of the patch,
            as in the convolution's weight; written ``copies`` times side by side.
    """
    views, block = len(tables.sizes_px), 256
    placed = zip(tables.sizes_px, tables.boxes, strict=True)
    widest = max(height * box.width_px * 3 for (height, _), box in placed)
    _horizontal_kernel[(triton.cdiv(widest, block), views)](
        images, scratch, tables.views, tables.first, tables.weights, TAPS=tables.taps, BLOCK=block
    )
    _patches_kernel[(triton.cdiv(tables.canvas_px**2 * 3, block), views)](
        scratch,
        patches,
        tables.views,
        tables.first,
        tables.weights,
        patches.stride(0),
        CANVAS=tables.canvas_px,
        PATCH=tables.patch_px,
        COPIES=copies,
        TAPS=tables.taps,
        BLOCK=block,
    )


def resize_plain(image: torch.Tensor, new_height_px: int, new_width_px: int) -> torch.Tensor:
    """Resize (h, w, 3) uint8 to (new_height, new_width, 3) as Pillow's BILINEAR does."""
    wide = _resize_axis(image, axis_filter(image.shape[1], new_width_px), 1)
    return _resize_axis(wide, axis_filter(image.shape[0], new_height_px), 0)


def _resize_axis(image: torch.Tensor, taps: AxisFilter, axis: int) -> torch.Tensor:
    source = image.movedim(axis, 0).to(torch.int64)
    first = torch.from_numpy(taps.first).to(image.device).long()
    weights = torch.from_numpy(taps.weights).to(image.device).long()
    half = 1 << (FRACTION_BITS - 1)
    total = torch.full((len(first), *source.shape[1:]), half, device=image.device)
    for tap in range(weights.shape[1]):
        index = (first + tap).clamp(max=source.shape[0] - 1)
        total += source[index] * weights[:, tap, None, None]
    resized = (total >> FRACTION_BITS).clamp(0, 255).to(torch.uint8)
    return resized.movedim(0, axis)


def resize_to_patches_plain(
    images: torch.Tensor,
    tables: ResizeTables,
    scratch: torch.Tensor,
    patches: torch.Tensor,
    copies: int,
) -> None:
    """Do what :func:`resize_to_patches` does, in plain PyTorch; ``scratch`` is not needed."""
    canvas_px, patch_px, start, rows = tables.canvas_px, tables.patch_px, 0, []
    side = canvas_px // patch_px
    for (height, width), box in zip(tables.sizes_px, tables.boxes, strict=True):
        image = images[start : start + height * width * 3].view(height, width, 3)
        start += height * width * 3
        canvas = torch.zeros((canvas_px, canvas_px, 3), dtype=torch.uint8, device=images.device)
        bottom, right = box.top_px + box.height_px, box.left_px + box.width_px
        canvas[box.top_px : bottom, box.left_px : right] = resize_plain(
            image, box.height_px, box.width_px
        )
        cells = canvas.view(side, patch_px, side, patch_px, 3).permute(0, 2, 4, 1, 3)
        rows.append(cells.reshape(side * side, -1))
    pixels = torch.cat(rows)
    patches[:, : copies * pixels.shape[1]].copy_(pixels.repeat(1, copies))

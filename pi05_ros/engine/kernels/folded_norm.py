"""LayerNorm inside the linear layer behind it, by moments that the layer before it leaves.

    LayerNorm(x) W^T + b = r (x V^T - mean * s) + c        r = 1 / sqrt(variance + eps)

V is W with the norm's weight in its columns, s the sum of each row of V as it is stored, and c is
b plus what the norm's bias adds to the product. Whoever writes x leaves the moments of its rows:
of each range of columns the mean, and the sum of squared distances from that mean. Variances are
added up from those (Chan, Golub and LeVeque, 1979), which keeps their digits where a row lies far
from 0.

This module has the first rows' kernel and the plain twins; the linear layers are in
hopper_vision_product.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import let_next_start, wait_for_previous

_PLAIN_PART_COLUMNS = 64


@dataclass(frozen=True)
class NormedLinear:
    """A LayerNorm and the linear layer behind it.

    Args:
        weight: (N, K) with the norm's weight in its columns.
        sums: (N,) fp32, of the rows of ``weight``.
        bias: (N,) fp32, with what the norm's bias adds.
    """

    weight: Tensor
    sums: Tensor
    bias: Tensor


@dataclass(frozen=True)
class RowMoments:
    """Mean and sum of squared distances of each range of columns of a matrix's rows.

    Args:
        values: (parts, M, 2) fp32.
        part_columns: of a part; the last one may have fewer.
    """

    values: Tensor
    part_columns: int

    @classmethod
    def zeros(cls, rows: int, width: int, part_columns: int, device: torch.device) -> RowMoments:
        """Return room for the moments of a (``rows``, ``width``) matrix."""
        parts = -(-width // part_columns)
        return cls(torch.zeros(parts, rows, 2, device=device), part_columns)


def fold_norm(
    norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> NormedLinear:
    """Return a linear layer with the LayerNorm before it, of fp32, rounded once to ``dtype``."""
    folded = (weight * norm_weight).to(dtype)
    added = (weight.double() @ norm_bias.double()).float()
    return NormedLinear(folded.contiguous(), folded.double().sum(dim=1).float(), bias + added)


@triton.jit
def _round_rows_kernel(
    p_x,  # (rows, width)
    p_out,  # (rows, width), written
    p_moments,  # (parts, rows, 2), written
    rows,
    width,
    PART: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    row = tl.program_id(0)
    o_part = tl.arange(0, PARTS_BLOCK)
    o_column = o_part[:, None] * PART + tl.arange(0, PART_BLOCK)[None, :]
    m_column = (tl.arange(0, PART_BLOCK) < PART)[None, :] & (o_column < width)
    count = tl.maximum(tl.minimum(width - o_part * PART, PART), 1).to(tl.float32)
    wait_for_previous(PDL)
    at = row.to(tl.int64) * width + o_column
    b_x = tl.load(p_x + at, mask=m_column, other=0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + at, b_x, mask=m_column)
    b_x = b_x.to(tl.float32)
    mean = tl.sum(b_x, axis=1) / count
    b_centred = tl.where(m_column, b_x - mean[:, None], 0.0)
    p_part = p_moments + (o_part * rows + row) * 2
    tl.store(p_part, mean, mask=o_part < PARTS)
    tl.store(p_part + 1, tl.sum(b_centred * b_centred, axis=1), mask=o_part < PARTS)


def round_rows(x: Tensor, out: Tensor, moments: RowMoments, *, early: bool = False) -> None:
    """Write x in out's dtype to ``out``, and the moments of the rounded rows.

    Args:
        x, out: (M, W).
        early: start before the kernel before it has completed, and let the next one do so.
    """
    rows, width = x.shape
    parts = moments.values.shape[0]
    _round_rows_kernel[(rows,)](
        x, out, moments.values, rows, width,
        PART=moments.part_columns, PART_BLOCK=triton.next_power_of_2(moments.part_columns),
        PARTS=parts, PARTS_BLOCK=triton.next_power_of_2(parts),
        PDL=early, launch_pdl=early, num_warps=4,
    )  # fmt: skip


def order_features_plain(weight: Tensor) -> Tensor:
    """Return the weight as it is."""
    return weight


def row_moments_plain(x: Tensor, depth: int) -> RowMoments:
    """Return room for the moments of x; any parts do."""
    return RowMoments.zeros(x.shape[0], x.shape[1], _PLAIN_PART_COLUMNS, x.device)


def round_rows_plain(x: Tensor, out: Tensor, moments: RowMoments) -> None:
    """Do what :func:`round_rows` does, in plain PyTorch."""
    out.copy_(x)
    _write_moments(out, moments)


def normed_linear_plain(
    x: Tensor, moments: RowMoments, layer: NormedLinear, eps: float, out: Tensor, *,
    gelu: bool = False,
) -> None:  # fmt: skip
    """Write ``linear(LayerNorm(x))`` to ``out``.

    Args:
        x: (M, K), and its moments. out: (M, N).
        gelu: apply the tanh-approximated GELU.
    """
    mean, variance = _mean_and_variance(moments, x.shape[1])
    product = torch.nn.functional.linear(x, layer.weight).float()
    result = torch.rsqrt(variance + eps) * (product - mean * layer.sums) + layer.bias
    out.copy_(torch.nn.functional.gelu(result, approximate='tanh') if gelu else result)


def add_linear_plain(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: RowMoments
) -> None:
    """Add ``x @ weight.T + bias`` to ``out``, and write the moments of the rounded result.

    Args:
        x: (M, K). weight: (N, K). bias: (N,) fp32. out: (M, N).
    """
    out.copy_(torch.nn.functional.linear(x, weight).float() + bias + out.float())
    _write_moments(out, moments)


def _write_moments(x: Tensor, moments: RowMoments) -> None:
    for values, part in zip(
        moments.values, x.float().split(moments.part_columns, dim=1), strict=True
    ):
        mean = part.mean(dim=1)
        values[:, 0] = mean
        values[:, 1] = (part - mean[:, None]).square().sum(dim=1)


def _mean_and_variance(moments: RowMoments, width: int) -> tuple[Tensor, Tensor]:
    """Return (M, 1) each."""
    means, squares = moments.values.unbind(dim=2)
    first = torch.arange(len(means), device=means.device) * moments.part_columns
    counts = (width - first).clamp(max=moments.part_columns)[:, None]
    mean = (means * counts).sum(dim=0) / width
    variance = (squares + (means - mean).square() * counts).sum(dim=0) / width
    return mean[:, None], variance[:, None]

"""The operations that stages are written in, fused or plain.

A stage says what happens; an :class:`Ops` says with what. :class:`FusedOps` are the kernels of
this package (bfloat16 on a GPU), with others for Hopper GPUs in :mod:`.hopper_ops`.
:class:`PlainOps` are their plain PyTorch twins, which run the very same stages in float32 and on a
CPU; :class:`PlainGpuOps` are those under a graph.
"""

from __future__ import annotations

from typing import Protocol

import torch

from .kernels import cublaslt, folded_norm, gate_up, norms, prefill_attention, prompt, resize, rope
from .kernels import vision_attention as vision
from .kernels.device import shared_memory_bytes
from .kernels.folded_norm import NormedLinear, RowMoments
from .tuning import TunedChoices, tuned_rows

Tensor = torch.Tensor


class Ops(Protocol):
    """Every operation writes into ``out`` and allocates nothing that outlives it."""

    # What runs vision and prefill, in stage_backends.
    backend: str

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        gelu: bool = False,
    ) -> None:
        """See :meth:`pi05_ros.engine.kernels.cublaslt.CublasLt.linear`."""

    def resize_to_patches(
        self,
        images: Tensor,
        tables: resize.ResizeTables,
        scratch: Tensor,
        patches: Tensor,
        copies: int,
    ) -> None:
        """See :func:`pi05_ros.engine.kernels.resize.resize_to_patches`."""

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        out: Tensor,
        rounded: Tensor | None = None,
    ) -> None:
        """See :func:`pi05_ros.engine.kernels.norms.layer_norm`."""

    def vision_attention(
        self, qkv: Tensor, num_heads: int, tokens_per_view: int, out: Tensor
    ) -> None:
        """See :func:`pi05_ros.engine.kernels.vision_attention.vision_attention`."""

    def embed_prompt(
        self, tokens: Tensor, count: Tensor, table: Tensor, scale: float, out: Tensor
    ) -> None:
        """See :func:`pi05_ros.engine.kernels.prompt.embed_prompt`."""

    def order_qkv(self, weight: Tensor) -> Tensor:
        """Return the weight of ``qkv_rope``: its rows are q, k and v, head after head."""

    def qkv_rope(
        self,
        x: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        scale: Tensor,
        q: Tensor | None,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """See :func:`pi05_ros.engine.kernels.rope.qkv_rope_plain`."""

    def prefill_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, count: Tensor, scale: float, out: Tensor
    ) -> None:
        """See :func:`pi05_ros.engine.kernels.prefill_attention.prefill_attention`."""

    def interleave(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the weight of ``gate_up`` from its two halves."""

    def order_down(self, weight: Tensor) -> Tensor:
        """Return the weight of ``down`` as it reads it."""

    def down(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Add ``x @ weight.T`` to ``out``."""

    def gate_up(self, x: Tensor, weight: Tensor, eps: float, scale: Tensor, out: Tensor) -> None:
        """See :func:`pi05_ros.engine.kernels.gate_up.gate_up`."""


class FoldedOps(Ops, Protocol):
    """Operations for a vision whose norms are inside the products behind them."""

    def order_features(self, weight: Tensor) -> Tensor:
        """Return the weight of ``normed_linear`` and ``add_linear`` as they read it."""

    def row_moments(self, x: Tensor, depth: int) -> RowMoments:
        """Return room for the moments of x that :meth:`add_linear` of ``depth`` columns leaves."""

    def round_rows(self, x: Tensor, out: Tensor, moments: RowMoments) -> None:
        """See :func:`pi05_ros.engine.kernels.folded_norm.round_rows`."""

    def normed_linear(
        self,
        x: Tensor,
        moments: RowMoments,
        layer: NormedLinear,
        eps: float,
        out: Tensor,
        *,
        gelu: bool = False,
    ) -> None:
        """See :func:`pi05_ros.engine.kernels.folded_norm.normed_linear_plain`."""

    def add_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: RowMoments
    ) -> None:
        """See :func:`pi05_ros.engine.kernels.folded_norm.add_linear_plain`."""


class PlainOps:
    """The plain twins."""

    backend = 'plain'

    linear = staticmethod(cublaslt.linear_plain)
    resize_to_patches = staticmethod(resize.resize_to_patches_plain)
    layer_norm = staticmethod(norms.layer_norm_plain)
    vision_attention = staticmethod(vision.vision_attention_plain)
    embed_prompt = staticmethod(prompt.embed_prompt_plain)
    order_qkv = staticmethod(rope.order_qkv_plain)
    qkv_rope = staticmethod(rope.qkv_rope_plain)
    prefill_attention = staticmethod(prefill_attention.prefill_attention_plain)
    interleave = staticmethod(gate_up.interleave)
    gate_up = staticmethod(gate_up.gate_up_plain)
    order_features = staticmethod(folded_norm.order_features_plain)
    row_moments = staticmethod(folded_norm.row_moments_plain)
    round_rows = staticmethod(folded_norm.round_rows_plain)
    normed_linear = staticmethod(folded_norm.normed_linear_plain)
    add_linear = staticmethod(folded_norm.add_linear_plain)

    def order_down(self, weight: Tensor) -> Tensor:
        """Return the weight as it is."""
        return weight

    def down(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Run a linear layer with ``out`` as its residual."""
        self.linear(x, weight, out, residual=out)


class PlainGpuOps(PlainOps):
    """The plain twins where a graph is captured: the resize is integer arithmetic anyway."""

    backend = 'cuda-plain'

    resize_to_patches = staticmethod(resize.resize_to_patches)


class FusedOps:
    """The kernels, launched with the choices tuned for this GPU or with safe defaults."""

    backend = 'cuda'
    # What 'pi05-ros tune' finds block sizes for, see autotune.py.
    tuned_kernels: tuple[str, ...] = ('vision_attention', 'prefill_attention')
    # Whether the vision attention overlaps with the kernels around it.
    early_vision_attention = False

    resize_to_patches = staticmethod(resize.resize_to_patches)
    layer_norm = staticmethod(norms.layer_norm)
    embed_prompt = staticmethod(prompt.embed_prompt)
    order_qkv = staticmethod(rope.order_qkv_plain)
    interleave = staticmethod(gate_up.interleave)

    def __init__(self, device: torch.device, choices: TunedChoices) -> None:
        self.choices = choices
        self.gemm = cublaslt.CublasLt(device, choices)
        self.linear = self.gemm.linear
        self._shared_bytes = shared_memory_bytes(device)

    def vision_attention(
        self, qkv: Tensor, num_heads: int, tokens_per_view: int, out: Tensor
    ) -> None:
        """Run the kernel with this GPU's block sizes.

        The kernel keeps a whole view's K and V in shared memory. A GPU with less takes PyTorch's
        attention, which needs two copies more.
        """
        dim = out.shape[1] // num_heads
        needed = vision.needed_shared_bytes(dim, tokens_per_view, qkv.element_size())
        if needed > self._shared_bytes:
            vision.vision_attention_plain(qkv, num_heads, tokens_per_view, out)
            return
        key = f'vision_attention-{qkv.shape[0]}'
        launch = self.choices.kernel(key, vision.default_launch(qkv.device))
        early = self.early_vision_attention
        vision.vision_attention(qkv, num_heads, tokens_per_view, out, launch, early=early)

    def prefill_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, count: Tensor, scale: float, out: Tensor
    ) -> None:
        """Run the kernel with this GPU's block sizes."""
        launch = prefill_attention.default_launch(q.device)
        for rows in (tuned_rows(q.shape[0]), q.shape[0]):
            launch = self.choices.kernel(f'prefill_attention-{rows}', launch)
        prefill_attention.prefill_attention(q, keys, values, count, scale, out, launch)

    def qkv_rope(
        self, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: Tensor,
        q: Tensor | None, keys: Tensor, values: Tensor,
    ) -> None:  # fmt: skip
        """Project, then scale and rotate; ``scale`` is not needed."""
        projected = x.new_empty(x.shape[0], weight.shape[0])
        self.linear(x, weight, projected)
        rope.rope_kv(projected, x, cos, sin, eps, q, keys, values)

    def gate_up(self, x: Tensor, weight: Tensor, eps: float, scale: Tensor, out: Tensor) -> None:
        """Run the kernel with the block sizes that fit this GPU."""
        gate_up.gate_up(x, weight, eps, scale, out)

    def order_down(self, weight: Tensor) -> Tensor:
        """Return the weight as it is."""
        return weight

    def down(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Run a linear layer with ``out`` as its residual."""
        self.linear(x, weight, out, residual=out)

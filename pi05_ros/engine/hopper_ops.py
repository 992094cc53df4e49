"""The operations with kernels in CUDA C++ where Hopper GPUs have them, and the choice of ops."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from pi05_ros.model.config import GemmaConfig, Pi05Config, VisionConfig

from .chips import chip_of
from .kernels import folded_norm, hopper_gate_up
from .kernels.folded_norm import NormedLinear, RowMoments
from .kernels.hopper_gate_up import HopperGateUp, gate_up_misfit
from .kernels.hopper_prefill_attention import HopperPrefillAttention, prefill_attention_misfit
from .kernels.hopper_prefill_down import HopperPrefillDown, prefill_down_misfit
from .kernels.hopper_prefill_qkv import HopperPrefillQkv, order_qkv, prefill_qkv_misfit
from .kernels.hopper_vision_attention import HopperVisionAttention, vision_attention_misfit
from .kernels.hopper_vision_product import HopperVisionProduct, order_features
from .kernels.nvrtc import has_bindings
from .ops import FusedOps, Ops, PlainGpuOps
from .tuning import TunedChoices, load_choices

_log = logging.getLogger(__name__)

# With fewer rows cuBLASLt is faster: 35 instead of 47 us at 296 rows, and as fast at 456.
_OWN_DOWN_ROWS = 512


def choose_ops(config: Pi05Config, image_rows: int, precision: str, device: torch.device) -> Ops:
    """Return what vision and prefill run on here, and say why.

    Args:
        image_rows: of the prefix.
    Raises:
        BackendError: a kernel does not compile here, or a stored choice cannot be read.
    """
    if precision == 'float32':
        return PlainGpuOps()
    choices = load_choices(torch.cuda.get_device_name(device), chip_of(device))
    _log.info('kernel choices for %s: %s', choices.gpu, choices.source)
    obstacle = hopper_ops_obstacle(config.vlm, device)
    if obstacle is None and has_bindings():
        return HopperOps(device, choices, config.vision, image_rows)
    if obstacle is None:
        _log.warning(
            'vision and prefill run slower kernels: cuda-bindings is missing; '
            'pip install cuda-bindings'
        )
    else:
        _log.info('vision and prefill run the kernels for any GPU: %s', obstacle)
    return FusedOps(device, choices)


def hopper_ops_obstacle(vlm: GemmaConfig, device: torch.device) -> str | None:
    """Return why :class:`HopperOps` cannot run a language model, or None if they can."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f'{device} is no Hopper GPU'
    return (
        gate_up_misfit(vlm.mlp_dim, vlm.width)
        or prefill_qkv_misfit(vlm.head_dim, vlm.width)
        or prefill_down_misfit(vlm.mlp_dim, vlm.width)
        or prefill_attention_misfit(vlm.head_dim)
    )


class HopperOps(FusedOps):
    """Products of vision and prefill and both attentions by warpgroup instructions.

    cuBLASLt does the prefill's output projection and, where the prefix is short, its down
    projection. A vision of other sizes than the released model's runs the attention for any GPU.

    Raises:
        BackendError: a kernel does not compile here.
    """

    backend = 'cuda-hopper'
    early_vision_attention = True

    order_qkv = staticmethod(order_qkv)
    interleave = staticmethod(hopper_gate_up.interleave)
    order_features = staticmethod(order_features)

    def __init__(
        self, device: torch.device, choices: TunedChoices, vision: VisionConfig, image_rows: int
    ) -> None:
        super().__init__(device, choices)
        self._qkv = HopperPrefillQkv(device)
        self._gate_up = HopperGateUp(device)
        self._down = HopperPrefillDown(device) if image_rows >= _OWN_DOWN_ROWS else None
        self._prefill_attention = HopperPrefillAttention(device)
        self._vision_product = HopperVisionProduct(device)
        misfit = vision_attention_misfit(vision.head_dim, vision.tokens_per_view)
        self._vision_attention = None if misfit else HopperVisionAttention(device)
        self.tuned_kernels = ('vision_attention',) if misfit else ()
        if misfit:
            _log.info('the attention of vision runs the kernel for any GPU: %s', misfit)

    def vision_attention(
        self, qkv: Tensor, num_heads: int, tokens_per_view: int, out: Tensor
    ) -> None:
        """Run the kernel in CUDA C++ if it takes this vision."""
        if self._vision_attention is None:
            super().vision_attention(qkv, num_heads, tokens_per_view, out)
        else:
            self._vision_attention(qkv, num_heads, out)

    def qkv_rope(
        self, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: Tensor,
        q: Tensor | None, keys: Tensor, values: Tensor,
    ) -> None:  # fmt: skip
        """Run the kernel in CUDA C++."""
        self._qkv(x, weight, cos, sin, eps, scale, q, keys, values)

    def prefill_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, count: Tensor, scale: float, out: Tensor
    ) -> None:
        """Run the kernel in CUDA C++."""
        self._prefill_attention(q, keys, values, count, scale, out)

    def gate_up(self, x: Tensor, weight: Tensor, eps: float, scale: Tensor, out: Tensor) -> None:
        """Run the kernel in CUDA C++."""
        self._gate_up(x, weight, eps, scale, out)

    def order_down(self, weight: Tensor) -> Tensor:
        """Return the weight as the kernel of this prefix reads it."""
        return weight if self._down is None else order_features(weight)

    def down(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Run the kernel in CUDA C++ if the prefix is long enough for it."""
        if self._down is None:
            super().down(x, weight, out)
        else:
            self._down(x, weight, out, out)

    def row_moments(self, x: Tensor, depth: int) -> RowMoments:
        """Return room for moments of the tiles that the product is cut into."""
        return self._vision_product.moments(x.shape[0], x.shape[1], depth)

    def round_rows(self, x: Tensor, out: Tensor, moments: RowMoments) -> None:
        """Run the kernel, and let the first product begin early."""
        folded_norm.round_rows(x, out, moments, early=True)

    def normed_linear(
        self, x: Tensor, moments: RowMoments, layer: NormedLinear, eps: float, out: Tensor, *,
        gelu: bool = False,
    ) -> None:  # fmt: skip
        """Run the kernel in CUDA C++."""
        self._vision_product.normed(x, moments, layer, eps, out, gelu=gelu)

    def add_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: RowMoments
    ) -> None:
        """Run the kernel in CUDA C++."""
        self._vision_product.add(x, weight, bias, out, moments)

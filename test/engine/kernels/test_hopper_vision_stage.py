"""A whole vision stage on the products of Hopper GPUs, compiled for the CPU, against float32."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap
from torch import Tensor

from pi05_ros.engine.kernels import hopper_vision_product
from pi05_ros.engine.kernels.folded_norm import NormedLinear, RowMoments
from pi05_ros.engine.kernels.hopper_vision_product import Shape, choose_tiling, order_features
from pi05_ros.engine.ops import PlainOps
from pi05_ros.engine.vision import FoldedVisionStage, VisionStage
from pi05_ros.engine.weights import pack_folded_vision, pack_vision
from pi05_ros.model.checkpoint import load_state, open_checkpoint

_CPU = torch.device('cpu')
_PROCESSORS = 132


class EmulatedOps(PlainOps):
    """The products compiled for the CPU, the rest plain; counts products and clusters of 4."""

    order_features = staticmethod(order_features)

    def __init__(self, folder) -> None:
        self._folder, self._modules = folder, {}
        self.launches, self.in_fours = 0, 0

    def row_moments(self, x: Tensor, depth: int) -> RowMoments:
        tiling = choose_tiling(Shape(*x.shape, depth), _PROCESSORS)
        return RowMoments.zeros(*x.shape, tiling.features, x.device)

    def normed_linear(self, x, moments, layer, eps, out, *, gelu=False) -> None:
        macros = {'PARTS': len(moments.values), 'PART_FEATURES': moments.part_columns}
        macros |= {'GELU': 1} if gelu else {}
        self._launch(x, moments, layer, eps, out, macros)

    def add_linear(self, x, weight, bias, out, moments) -> None:
        self._launch(x, moments, NormedLinear(weight, bias, bias), 0.0, out, {'RESIDUAL': 1})

    def _launch(self, x, moments, layer, eps, out, macros) -> None:
        (rows, depth), features = x.shape, out.shape[1]
        tiling = choose_tiling(Shape(rows, features, depth), _PROCESSORS)
        defines = {**tiling.defines(), **macros}
        key = tuple(defines.items())
        if key not in self._modules:
            library = self._folder / f'product{len(self._modules)}.so'
            self._modules[key] = CpuModule(hopper_vision_product._SOURCE, defines, library)
        self._modules[key].launch(
            'vision_product', tiling.blocks(rows, features), tiling.threads(), tiling.cluster,
            TensorMap(x, tiling.rows), TensorMap(layer.weight, tiling.features // tiling.cluster),
            layer.bias, layer.sums, moments.values, out, rows, features, depth, eps,
        )  # fmt: skip
        self.launches += 1
        self.in_fours += tiling.cluster == 4


@pytest.fixture(scope='module')
def checkpoint(golden_dir):
    return open_checkpoint(golden_dir)


def _state(checkpoint) -> dict[str, Tensor]:
    """Return the golden weights; norms drawn, where the file has ones and zeros."""
    state = load_state(checkpoint)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in state.items():
        if 'vision_tower' in name and 'norm' in name:
            drawn = 0.3 * torch.randn(tensor.shape, generator=generator)
            state[name] = drawn + (1.0 if name.endswith('weight') else 0.0)
    return state


@pytest.mark.parametrize('long_depth', [2048, 128])  # from which on four blocks share weights
@torch.inference_mode()
def test_a_stage_of_these_products_agrees_with_float32(
    checkpoint, tmp_path, monkeypatch, long_depth
):
    monkeypatch.setattr(hopper_vision_product, '_LONG_DEPTH', long_depth)
    config, ops = checkpoint.config, EmulatedOps(tmp_path)
    rows = config.vision.tokens_per_view
    prefixes = [
        torch.zeros(rows, config.vlm.width, dtype=t) for t in (torch.bfloat16, torch.float)
    ]
    folded = pack_folded_vision(
        _state(checkpoint), config, torch.bfloat16, _CPU, ops.order_features
    )
    stage = FoldedVisionStage(folded, config, ops, 1, prefixes[0])
    weights = pack_vision(_state(checkpoint), config, torch.float32, _CPU)
    exact = VisionStage(weights, config, PlainOps(), 1, prefixes[1])
    size = 3 * config.vision.patch_px**2
    pixels = torch.randint(0, 256, (rows, size), generator=torch.Generator().manual_seed(1))
    for copy in range(stage.patch_copies):
        stage.patches[:, copy * size : (copy + 1) * size] = pixels
    exact.patches[:, :size] = pixels
    stage.launch()
    exact.launch()
    assert ops.launches == 4 * config.vision.depth + 1
    assert ops.in_fours == (config.vision.depth if long_depth == 128 else 0)
    for found, expected in ((stage.x, exact.x), (stage.out, exact.out)):
        error = (found.float() - expected).norm() / expected.norm()
        assert error < 1.5e-2, f'relative error {error:.2e}'

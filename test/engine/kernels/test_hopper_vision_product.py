"""The products of vision on Hopper GPUs against their twins, and how they are cut up.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as they are on a Hopper GPU.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import hopper_vision_product
from pi05_ros.engine.kernels.folded_norm import (
    NormedLinear,
    RowMoments,
    add_linear_plain,
    fold_norm,
    normed_linear_plain,
    round_rows_plain,
)
from pi05_ros.engine.kernels.hopper_vision_product import (
    Shape,
    Tiling,
    choose_tiling,
    order_features,
)

_EPS = 1e-6
_PROCESSORS = 132


class Drawn:
    """The operands of a layer: rows around some mean, a norm and a linear layer."""

    def __init__(self, rows: int, features: int, depth: int, mean: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(rows + features + depth)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.x = (normal(rows, depth) + mean).bfloat16()
        self.norm_weight, self.norm_bias = 1.0 + 0.3 * normal(depth), normal(depth)
        self.weight = normal(features, depth) * depth**-0.5
        self.bias = normal(features)
        self.old = (3.0 * normal(rows, features) + mean).bfloat16()

    def folded(self) -> NormedLinear:
        return fold_norm(self.norm_weight, self.norm_bias, self.weight, self.bias, torch.bfloat16)

    def normed(self, gelu: bool) -> torch.Tensor:
        """Return what PyTorch makes of the norm and the layer in double precision."""
        width, double = self.x.shape[1:], torch.double
        normed = torch.nn.functional.layer_norm(
            self.x.to(double), width, self.norm_weight.to(double), self.norm_bias.to(double), _EPS
        )
        out = torch.nn.functional.linear(normed, self.weight.to(double), self.bias.to(double))
        return torch.nn.functional.gelu(out, approximate='tanh') if gelu else out


def _moments(x: torch.Tensor, part_columns: int) -> RowMoments:
    moments = RowMoments.zeros(*x.shape, part_columns, x.device)
    round_rows_plain(x, torch.empty_like(x), moments)
    return moments


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _compile(tmp_path_factory, tiling: Tiling, **macros: int) -> CpuModule:
    library = tmp_path_factory.mktemp('vision_product') / 'vision_product.so'
    return CpuModule(hopper_vision_product._SOURCE, {**tiling.defines(), **macros}, library)


def _launch(kernels, tiling, x, weight, bias, sums, moments, out) -> None:
    (rows, depth), features = x.shape, weight.shape[0]
    weight = order_features(weight)
    kernels.launch(
        'vision_product', tiling.blocks(rows, features), tiling.threads(), tiling.cluster,
        TensorMap(x, tiling.rows), TensorMap(weight, tiling.features // tiling.cluster),
        bias, sums, moments, out, rows, features, depth, _EPS,
    )  # fmt: skip


@pytest.mark.parametrize(
    ('tiling', 'part_columns', 'gelu', 'rows', 'features', 'depth'),
    [
        (Tiling(128, 128, 2, 3), 96, False, 200, 136, 200),
        (Tiling(128, 144, 2, 4), 96, True, 150, 184, 480),
        (Tiling(128, 160, 2, 3), 64, False, 100, 160, 136),
        (Tiling(128, 208, 2, 3), 128, True, 256, 216, 64),
        (Tiling(64, 144, 1, 5), 64, True, 70, 152, 328),
        (Tiling(64, 128, 1, 3), 64, False, 130, 128, 72),
        (Tiling(64, 144, 2, 2), 144, True, 100, 152, 328),
        (Tiling(64, 160, 4, 3), 64, False, 200, 136, 456),
    ],
    ids=str,
)
def test_a_norm_folded_into_a_product_is_the_norm_and_the_product(
    tmp_path_factory, tiling, part_columns, gelu, rows, features, depth
):
    drawn = Drawn(rows, features, depth)
    layer, moments = drawn.folded(), _moments(drawn.x, part_columns)
    macros = {'PARTS': len(moments.values), 'PART_FEATURES': part_columns}
    kernels = _compile(tmp_path_factory, tiling, **macros, **({'GELU': 1} if gelu else {}))
    room = torch.full((rows + 1, features), float('nan'), dtype=torch.bfloat16)
    _launch(
        kernels, tiling, drawn.x, layer.weight, layer.bias, layer.sums, moments.values, room[:rows]
    )
    twin = torch.empty(rows, features)
    exact_layer = NormedLinear(layer.weight.float(), layer.sums, layer.bias)
    normed_linear_plain(drawn.x.float(), moments, exact_layer, _EPS, twin, gelu=gelu)
    assert room[rows].isnan().all()
    assert _error(room[:rows], twin) < 3e-3
    assert _error(room[:rows], drawn.normed(gelu)) < 5e-3


@pytest.mark.parametrize(
    ('tiling', 'rows', 'features', 'depth'),
    [
        (Tiling(64, 96, 1, 4), 130, 200, 72),
        (Tiling(64, 96, 4, 4), 200, 104, 456),
        (Tiling(128, 64, 2, 3), 150, 136, 64),
        (Tiling(64, 128, 1, 3), 64, 128, 136),
        (Tiling(64, 64, 4, 5), 256, 64, 400),
        (Tiling(64, 128, 4, 3), 256, 136, 840),
        (Tiling(64, 144, 2, 2), 100, 200, 456),
        (Tiling(128, 144, 2, 5), 200, 184, 328),
    ],
    ids=str,
)
@pytest.mark.parametrize('mean', [0.3, 50.0])
def test_a_sum_leaves_the_moments_of_its_rows(
    tmp_path_factory, tiling, rows, features, depth, mean
):
    drawn = Drawn(rows, features, depth, mean)
    kernels = _compile(tmp_path_factory, tiling, RESIDUAL=1)
    weight = drawn.weight.bfloat16()
    room = torch.full((rows + 1, features), float('nan'), dtype=torch.bfloat16)
    room[:rows] = drawn.old
    moments = RowMoments.zeros(rows, features, tiling.features, room.device)
    moments.values.fill_(float('nan'))
    _launch(kernels, tiling, drawn.x, weight, drawn.bias, drawn.bias, moments.values, room[:rows])
    twin = drawn.old.float()
    add_linear_plain(
        drawn.x.float(), weight.float(), drawn.bias, twin, _moments(twin, tiling.features)
    )
    assert room[rows].isnan().all()
    assert _error(room[:rows], twin) < 3e-3
    assert torch.allclose(
        moments.values, _moments(room[:rows], tiling.features).values, rtol=1e-4, atol=1e-5
    )


def test_features_are_ordered_within_groups_of_16():
    rows = order_features(torch.arange(24.0)[:, None])[:, 0]
    assert rows[:16].tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    assert rows[16:].tolist() == [16, 17, 20, 21, *[0] * 4, 18, 19, 22, 23, *[0] * 4]


def test_rows_far_from_zero_keep_their_variance(tmp_path_factory):
    """E[x^2] - mean^2 in float32 would lose three digits here."""
    drawn = Drawn(64, 64, 1152, mean=50.0)
    layer, moments = drawn.folded(), _moments(drawn.x, 96)
    tiling = Tiling(64, 64, 1, 5)
    kernels = _compile(tmp_path_factory, tiling, PARTS=12, PART_FEATURES=96)
    out = torch.empty(64, 64, dtype=torch.bfloat16)
    _launch(kernels, tiling, drawn.x, layer.weight, layer.bias, layer.sums, moments.values, out)
    normed = torch.nn.functional.layer_norm(drawn.x.double(), (1152,), eps=_EPS)
    exact = normed @ layer.weight.double().T + layer.bias
    assert _error(out, exact) < 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a Hopper GPU')
@pytest.mark.parametrize('rows', [256, 512, 768])
def test_a_layer_matches_its_twins_at_full_size(rows):
    device = torch.device('cuda')
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip('needs a Hopper GPU')
    kernels = hopper_vision_product.HopperVisionProduct(device)
    fc1, fc2 = Drawn(rows, 4304, 1152), Drawn(rows, 1152, 4304)
    x, layer, bias = fc1.x.to(device), fc1.folded(), fc2.bias.to(device)
    weights = (order_features(layer.weight), layer.sums, layer.bias)
    ordered = NormedLinear(*(t.to(device) for t in weights))
    weight = fc2.weight.bfloat16().to(device)
    moments, found = _moments(x, 96), kernels.moments(rows, 1152, 4304)
    results = []
    for _ in range(2):
        hidden = torch.full((rows, 4304), float('nan'), dtype=torch.bfloat16, device=device)
        out = fc2.old.to(device)
        kernels.normed(x, moments, ordered, _EPS, hidden, gelu=True)
        kernels.add(hidden, order_features(weight), bias, out, found)
        results.append(out)
    twin = fc2.old.to(device).float()
    add_linear_plain(hidden.float(), weight.float(), bias, twin, _moments(twin, 96))
    assert _error(hidden.cpu(), fc1.normed(gelu=True)) < 5e-3
    assert _error(out, twin) < 3e-3
    assert torch.equal(*results)
    exact = _moments(out, found.part_columns)
    assert torch.allclose(found.values, exact.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('shape', 'tiling'),
    [
        (Shape(256, 1152, 4304), Tiling(64, 64, 4, 12)),
        (Shape(512, 3456, 1152), Tiling(128, 112, 2, 7)),
        (Shape(512, 1152, 1152), Tiling(64, 96, 1, 10)),
        (Shape(512, 4304, 1152), Tiling(128, 144, 2, 6)),
        (Shape(512, 1152, 4304), Tiling(64, 96, 4, 10)),
        (Shape(768, 3456, 1152), Tiling(128, 160, 2, 6)),
        (Shape(768, 1152, 1152), Tiling(64, 128, 1, 9)),
        (Shape(768, 4304, 1152), Tiling(128, 208, 2, 5)),
        (Shape(768, 1152, 4304), Tiling(64, 128, 4, 9)),
    ],
    ids=str,
)
def test_the_released_model_takes_one_turn(shape, tiling):
    assert choose_tiling(shape, _PROCESSORS) == tiling
    resident = 120 if tiling.cluster == 4 else _PROCESSORS
    assert tiling.blocks(shape.rows, shape.features) <= resident


def test_tiles_have_64_rows_where_k_is_long():
    assert choose_tiling(Shape(1280, 1152, 1152), _PROCESSORS).rows == 128
    assert choose_tiling(Shape(1280, 1152, 4304), _PROCESSORS).rows == 64


def test_clusters_shrink_where_row_tiles_or_shares_do_not_divide():
    def cluster(rows: int, features: int) -> int:
        return choose_tiling(Shape(rows, features, 4304), _PROCESSORS).cluster

    assert choose_tiling(Shape(1024, 1152, 4304), _PROCESSORS).features == 144
    assert cluster(1024, 1152) == 2  # a quarter of 144 features is no multiple of 8
    assert cluster(384, 1152) == 2  # six tiles of 64 rows
    assert cluster(320, 1152) == 1


@pytest.mark.parametrize('rows', [49, 200, 256, 300, 512, 768])
@pytest.mark.parametrize('features', [96, 1152, 2048, 3456, 4304])
@pytest.mark.parametrize('depth', [64, 1152, 4304])
def test_grids_are_whole_clusters_and_rings_fit_into_shared_memory(rows, features, depth):
    tiling = choose_tiling(Shape(rows, features, depth), _PROCESSORS)
    assert tiling.blocks(rows, features) % tiling.cluster == 0
    assert tiling.features // tiling.cluster % 8 == 0
    barriers_and_columns = 16 * tiling.stages + 8 * tiling.features
    assert tiling.shared_bytes() + barriers_and_columns <= 227 * 1024

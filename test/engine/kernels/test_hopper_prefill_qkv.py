"""The q, k and v kernel of Hopper GPUs against its twin, and how it cuts up a product.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as it is on a Hopper GPU.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import hopper_prefill_qkv
from pi05_ros.engine.kernels.gate_up import row_scale_plain
from pi05_ros.engine.kernels.hopper_prefill_product import THREADS, Tiling
from pi05_ros.engine.kernels.hopper_prefill_qkv import (
    choose_tiling,
    order_qkv,
    prefill_qkv_misfit,
)
from pi05_ros.engine.kernels.rope import half_tables, qkv_rope_plain
from pi05_ros.model.config import Pi05Config

_EPS = 1e-6
_DIM = 256
_H200_PROCESSORS = 132


class Drawn:
    """The operands of a layer, and where its results go: a row more than there are tokens."""

    def __init__(self, rows: int, heads: int, depth: int, device: str = 'cpu') -> None:
        generator = torch.Generator().manual_seed(rows + heads + depth)
        scales = torch.linspace(0.5, 4.0, rows)[:, None]
        self.x = (torch.randn(rows, depth, generator=generator) * scales).bfloat16().to(device)
        weight = torch.randn((heads + 2) * _DIM, depth, generator=generator) * depth**-0.5
        self.weight = weight.bfloat16().to(device)
        place = torch.device(device)
        self.tables = half_tables(Pi05Config.full().vlm, rows, torch.bfloat16, place)
        self.heads = heads

    def room(self, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        rows = len(self.x) + 1
        return [
            torch.full((rows, columns), float('nan'), dtype=dtype, device=self.x.device)
            for columns in (self.heads * _DIM, _DIM, _DIM)
        ]

    def of_twin(self) -> list[torch.Tensor]:
        q, keys, values = (room[:-1] for room in self.room(torch.float32))
        scale = torch.empty(len(self.x), device=self.x.device)
        cos, sin = (table.float() for table in self.tables)
        operands = (self.x.float(), self.weight.float(), cos, sin, _EPS, scale)
        qkv_rope_plain(*operands, q if self.heads else None, keys, values)
        return [q, keys, values]


def _assert_close(found: list[torch.Tensor], twin: list[torch.Tensor]) -> None:
    for mine, exact in zip(found, twin, strict=True):
        assert mine[-1].isnan().all(), 'a row behind the last one was written'
        if not exact.numel():
            continue
        errors = (mine[:-1].float() - exact).norm(dim=1) / exact.norm(dim=1)
        assert errors.max() < 4e-3


@pytest.mark.parametrize(
    ('tiling', 'rows', 'heads', 'depth'),
    [
        (Tiling(128, 24, 1), 50, 1, 1024),
        (Tiling(128, 40, 2), 70, 1, 832),
        (Tiling(128, 56, 4), 150, 1, 448),
        (Tiling(128, 72, 1), 72, 2, 64),
        (Tiling(128, 120, 2), 130, 0, 576),
        (Tiling(128, 256, 1), 7, 0, 320),
    ],
    ids=str,
)
def test_projection_and_rotation_match_their_twin(tmp_path_factory, tiling, rows, heads, depth):
    drawn = Drawn(rows, heads, depth)
    library = tmp_path_factory.mktemp('qkv') / 'qkv.so'
    kernels = CpuModule(hopper_prefill_qkv._SOURCE, tiling.defines(), library)
    weight, scale = order_qkv(drawn.weight), row_scale_plain(drawn.x, _EPS)[:, 0].contiguous()
    q, keys, values = room = drawn.room()
    kernels.launch(
        'prefill_qkv', tiling.units(rows, len(weight)) * tiling.cluster, THREADS, tiling.cluster,
        TensorMap(drawn.x, tiling.tokens), TensorMap(weight, tiling.box_rows()),
        scale, *drawn.tables, q, keys, values, rows, len(weight), depth,
    )  # fmt: skip
    _assert_close(room, drawn.of_twin())


def test_both_halves_of_a_pair_are_eight_rows_apart():
    order = order_qkv(torch.arange(512.0)[:, None])[:, 0].long().view(-1, 2, 8)
    assert torch.equal(order[:, 1], order[:, 0] + 128)
    assert order[:8, 0].flatten().tolist() == list(range(64))
    assert order[8:16, 0].flatten().tolist() == list(range(64, 128))
    assert order[16, 0].tolist() == list(range(256, 264))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a Hopper GPU')
@pytest.mark.parametrize('heads', [8, 0])
@pytest.mark.parametrize('rows', [264, 552, 712, 968])
def test_projection_and_rotation_match_their_twin_at_full_size(rows, heads):
    device = torch.device('cuda')
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip('needs a Hopper GPU')
    drawn = Drawn(rows, heads, 2048, 'cuda')
    kernel, weight = hopper_prefill_qkv.HopperPrefillQkv(device), order_qkv(drawn.weight)
    scale, results = torch.empty(rows, device=device), []
    for _ in range(2):
        q, keys, values = room = drawn.room()
        queries = q[:rows] if heads else None
        kernel(drawn.x, weight, *drawn.tables, _EPS, scale, queries, keys, values)
        results.append(room)
    _assert_close(results[0], drawn.of_twin())
    for first, second in zip(*results, strict=True):
        assert torch.equal(first[:rows], second[:rows])


@pytest.mark.parametrize(
    ('rows', 'features', 'tiling'),
    [
        (552, 2560, Tiling(128, 96, 2)), (576, 2560, Tiling(128, 96, 2)),
        (712, 2560, Tiling(128, 120, 2)),
        (968, 2560, Tiling(128, 168, 2)), (296, 2560, Tiling(128, 56, 2)),
        (576, 512, Tiling(128, 24, 2)),
        (712, 512, Tiling(128, 24, 2)), (968, 512, Tiling(128, 32, 1)),
        (8, 512, Tiling(128, 24, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_a_prefix_of_the_released_model_takes_one_turn(rows, features, tiling):
    assert choose_tiling(rows, features, _H200_PROCESSORS) == tiling
    assert tiling.units(rows, features) * tiling.cluster <= _H200_PROCESSORS


@pytest.mark.parametrize('processors', [16, 78, 114, 132])
@pytest.mark.parametrize('features', [512, 2560, 5120])
@pytest.mark.parametrize('rows', [1, 257, 576, 968, 4096])
def test_any_prefix_and_gpu_has_a_tiling_that_fits(rows, features, processors):
    tiling = choose_tiling(rows, features, processors)
    assert tiling.tokens % 8 == 0 and 24 <= tiling.tokens <= 256
    assert tiling.stages >= 4
    barriers_and_scales = 16 * tiling.stages + 4 * tiling.tokens
    assert tiling.shared_bytes() + barriers_and_scales <= 227 * 1024


@pytest.mark.parametrize(('head_dim', 'width'), [(128, 2048), (256, 96)])
def test_what_the_kernel_cannot_take_is_said(head_dim, width):
    reason = prefill_qkv_misfit(head_dim, width)
    assert str(head_dim) in reason and str(width) in reason


def test_the_released_model_fits():
    vlm = Pi05Config.full().vlm
    assert prefill_qkv_misfit(vlm.head_dim, vlm.width) is None

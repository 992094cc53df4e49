"""The gate/up kernel of Hopper GPUs against its twin, and how it cuts up a product.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as it is on a Hopper GPU.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import gate_up, hopper_gate_up
from pi05_ros.engine.kernels.hopper_gate_up import (
    Tiling,
    choose_tiling,
    gate_up_misfit,
    interleave,
)
from pi05_ros.model.config import Pi05Config

_EPS = 1e-6
_H200_PROCESSORS = 132


def _draw(rows: int, features: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + depth)
    x = torch.randn(rows, depth, generator=generator) * 4.0
    weight = torch.randn(features, depth, generator=generator) * depth**-0.5 * 2.0
    return x.bfloat16(), weight.bfloat16()


def _twin(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the product with a weight of the gate rows and then the up rows."""
    out = torch.empty(len(x), len(weight) // 2)
    merged = gate_up.interleave(*weight.chunk(2))
    gate_up.gate_up_plain(x.float(), merged.float(), _EPS, torch.empty(len(x)), out)
    return out


@pytest.fixture(scope='module', params=[(192, 1), (192, 2), (128, 1), (128, 2)], ids=str)
def module(request, tmp_path_factory) -> tuple[Tiling, CpuModule]:
    tiling = Tiling(*request.param)
    library = tmp_path_factory.mktemp('gate_up') / 'gate_up.so'
    return tiling, CpuModule(hopper_gate_up._SOURCE, tiling.defines(), library)


@pytest.mark.parametrize(
    ('rows', 'features', 'depth', 'processors'),
    [(70, 512, 448, 2), (330, 512, 128, 2), (200, 256, 64, 4)],
    ids=['several-tiles-per-block', 'ragged-rows', 'one-step'],
)
def test_gate_up_matches_its_twin(module, rows, features, depth, processors):
    tiling, kernels = module
    x, weight = _draw(rows, features, depth)
    merged = interleave(*weight.chunk(2))
    room = torch.full((rows + 1, features // 2), float('nan'), dtype=torch.bfloat16)
    kernels.launch(
        'gate_up', tiling.blocks(rows, features, processors), 384, tiling.cluster,
        TensorMap(x, tiling.tile_rows), TensorMap(merged, 256 // tiling.cluster),
        gate_up.row_scale_plain(x, _EPS)[:, 0].contiguous(), room[:rows], rows, features, depth,
    )  # fmt: skip
    assert room[rows].isnan().all()
    twin = _twin(x, weight)
    assert (room[:rows].float() - twin).norm() / twin.norm() < 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a Hopper GPU')
@pytest.mark.parametrize('rows', [288, 576, 712, 968])
def test_gate_up_matches_its_twin_at_full_size(rows):
    device = torch.device('cuda')
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip('needs a Hopper GPU')
    x, weight = (t.to(device) for t in _draw(rows, 32768, 2048))
    scale = torch.empty(rows, device=device)
    results = []
    kernel = hopper_gate_up.HopperGateUp(device)
    for _ in range(2):
        out = torch.full((rows, 16384), float('nan'), dtype=torch.bfloat16, device=device)
        kernel(x, interleave(*weight.chunk(2)), _EPS, scale, out)
        results.append(out)
    twin = _twin(x.cpu(), weight.cpu()).to(device)
    assert (results[0].float() - twin).norm() / twin.norm() < 3e-3
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ('rows', 'tiling'),
    [(576, Tiling(192, 1)), (712, Tiling(192, 2)), (968, Tiling(128, 2)), (256, Tiling(128, 2))],
)
def test_a_tiling_wastes_few_rows_and_turns(rows, tiling):
    assert choose_tiling(rows, 32768, _H200_PROCESSORS) == tiling


def test_a_grid_is_whole_clusters_and_no_larger_than_the_gpu():
    assert Tiling(192, 1).blocks(576, 32768, 131) == 131
    assert Tiling(128, 2).blocks(968, 32768, 131) == 130
    assert Tiling(128, 2).blocks(100, 512, 132) == 4


@pytest.mark.parametrize(
    ('hidden', 'width', 'reason'),
    [(256, 96, 'the width 96 must be a multiple of 64'), (200, 128, 'the MLP width 200 of 128')],
)
def test_what_the_kernel_cannot_take_is_said(hidden, width, reason):
    assert reason in gate_up_misfit(hidden, width)


def test_the_released_model_fits():
    vlm = Pi05Config.full().vlm
    assert gate_up_misfit(vlm.mlp_dim, vlm.width) is None

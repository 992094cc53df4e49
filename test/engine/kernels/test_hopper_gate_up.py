"""The gate/up kernel of Hopper GPUs against its twin, and how it cuts up a product.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as it is on a Hopper GPU.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import gate_up, hopper_gate_up
from pi05_ros.engine.kernels.hopper_gate_up import (
    choose_tiling,
    gate_up_misfit,
    grid,
    interleave,
)
from pi05_ros.engine.kernels.hopper_prefill_product import THREADS, Tiling
from pi05_ros.model.config import Pi05Config

_EPS = 1e-6
_H200_PROCESSORS = 132


def _draw(rows: int, features: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + depth)
    x = torch.randn(rows, depth, generator=generator) * torch.linspace(0.5, 4.0, rows)[:, None]
    weight = torch.randn(features, depth, generator=generator) * depth**-0.5 * 2.0
    return x.bfloat16(), weight.bfloat16()


def _twin(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the product with a weight of the gate rows and then the up rows."""
    out = torch.empty(len(x), len(weight) // 2)
    merged = gate_up.interleave(*weight.chunk(2))
    gate_up.gate_up_plain(x.float(), merged.float(), _EPS, torch.empty(len(x)), out)
    return out


def _launch(kernels, tiling, x, merged, scale, out, processors):
    (rows, depth), features = x.shape, len(merged)
    kernels.launch(
        'gate_up', grid(tiling, rows, features, processors), THREADS, tiling.cluster,
        TensorMap(x, tiling.tokens), TensorMap(merged, tiling.box_rows()),
        scale, out, rows, features, depth,
    )  # fmt: skip


@pytest.mark.parametrize(
    ('tiling', 'rows', 'features', 'depth', 'processors'),
    [
        (Tiling(256, 184, 1), 190, 512, 320, 3),
        (Tiling(256, 40, 1), 70, 512, 832, 2),
        (Tiling(256, 24, 1), 20, 256, 64, 4),
        (Tiling(256, 56, 2), 150, 512, 448, 2),
        (Tiling(256, 96, 2), 330, 256, 128, 4),
    ],
    ids=['ragged', 'several-tiles-per-block', 'one-step', 'pairs', 'short-depth'],
)
def test_gate_up_matches_its_twin(tmp_path_factory, tiling, rows, features, depth, processors):
    library = tmp_path_factory.mktemp('gate_up') / 'gate_up.so'
    kernels = CpuModule(hopper_gate_up._SOURCE, tiling.defines(), library)
    x, weight = _draw(rows, features, depth)
    merged = interleave(*weight.chunk(2))
    room = torch.full((rows + 1, features // 2), float('nan'), dtype=torch.bfloat16)
    scale = gate_up.row_scale_plain(x, _EPS)[:, 0].contiguous()
    _launch(kernels, tiling, x, merged, scale, room[:rows], processors)
    assert room[rows].isnan().all()
    twin = _twin(x, weight)
    errors = (room[:rows].float() - twin).norm(dim=1) / twin.norm(dim=1)
    assert errors.max() < 4e-3


def test_a_row_does_not_tell_what_its_neighbours_hold(tmp_path_factory):
    """Rows beyond the prompt hold what calls before left there.

    Every result is 16 (1 + 3/256), half way between two numbers of bfloat16: it shows a factor
    that is not quite 1, as y * (1 / y) is for some of a neighbour's y.
    """
    tiling, rows, depth = Tiling(256, 24, 1), 21, 64
    library = tmp_path_factory.mktemp('neighbours') / 'gate_up.so'
    kernels = CpuModule(hopper_gate_up._SOURCE, tiling.defines(), library)
    weight = torch.zeros(2, 128, depth)
    weight[0, :, 0], weight[1, :, 0], weight[1, :, 1] = 16.0, 1.0, 3.0 / 256
    merged = interleave(*weight).bfloat16()
    x = torch.zeros(rows, depth)
    x[:, :2] = 1.0
    held = torch.linspace(-0.3, 0.1, rows)[:, None]
    results = []
    for kept in (slice(0, None), slice(0, None, 2), slice(1, None, 2)):
        drawn = held.expand(rows, depth).clone()
        drawn[kept] = x[kept]
        out = torch.empty(rows, 128, dtype=torch.bfloat16)
        _launch(kernels, tiling, drawn.bfloat16(), merged, torch.ones(rows), out, 1)
        results.append(out[kept])
    assert torch.equal(results[1], results[0][::2])
    assert torch.equal(results[2], results[0][1::2])


def test_gate_and_up_of_a_unit_are_eight_rows_apart():
    units = torch.arange(256.0)[:, None]
    order = interleave(units, units + 1000)[:, 0].long().view(-1, 2, 8)
    assert torch.equal(order[:, 1], order[:, 0] + 1000)
    first = order[:, 0]  # of warps 0 to 3 of a part, their parts 0 and 1, their warpgroups
    assert first[0].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert first[4].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert first[[1, 8, 16], 0].tolist() == [16, 64, 128]
    assert sorted(first.flatten().tolist()) == list(range(256))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a Hopper GPU')
@pytest.mark.parametrize('rows', [296, 552, 576, 712, 968])
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
    ('rows', 'tokens', 'cluster', 'turns'),
    [
        (296, 152, 2, 2), (456, 152, 1, 3), (552, 184, 1, 3), (576, 192, 1, 3), (712, 184, 2, 4),
        (968, 200, 1, 5),
    ],
)  # fmt: skip
def test_a_tiling_wastes_few_tokens_and_turns(rows, tokens, cluster, turns):
    tiling = choose_tiling(rows, 32768, 2048, _H200_PROCESSORS)
    assert tiling == Tiling(256, tokens, cluster)
    assert -(-tiling.units(rows, 32768) // (_H200_PROCESSORS // cluster)) == turns


@pytest.mark.parametrize('processors', [16, 78, 114, 132])
@pytest.mark.parametrize('rows', [1, 257, 576, 968, 4096])
def test_any_prefix_and_gpu_has_a_ring_of_three_stages(rows, processors):
    tiling = choose_tiling(rows, 32768, 2048, processors)
    assert tiling.stages >= 3 and tiling.tokens % 8 == 0
    assert tiling.shared_bytes() + 16 * tiling.stages <= 227 * 1024


def test_a_tile_costs_what_its_slower_unit_needs():
    assert Tiling(256, 184, 1).step_clocks() == 1472  # the tensor cores
    assert Tiling(128, 96, 1).step_clocks() == 544  # shared memory


def test_a_grid_is_whole_clusters_and_no_larger_than_the_gpu():
    assert grid(Tiling(256, 192, 1), 576, 32768, 131) == 131
    assert grid(Tiling(256, 128, 2), 968, 32768, 131) == 130
    assert grid(Tiling(256, 128, 2), 100, 512, 132) == 4


@pytest.mark.parametrize(
    ('hidden', 'width', 'reason'),
    [(256, 96, 'the width 96 must be a multiple of 64'), (200, 128, 'the MLP width 200 of 128')],
)
def test_what_the_kernel_cannot_take_is_said(hidden, width, reason):
    assert reason in gate_up_misfit(hidden, width)


def test_the_released_model_fits():
    vlm = Pi05Config.full().vlm
    assert gate_up_misfit(vlm.mlp_dim, vlm.width) is None

"""The down projection of Hopper GPUs against its twin, and how it cuts up a product.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as it is on a Hopper GPU.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import hopper_prefill_down
from pi05_ros.engine.kernels.cublaslt import linear_plain
from pi05_ros.engine.kernels.hopper_prefill_down import SplitTiling, choose_tiling
from pi05_ros.engine.kernels.hopper_prefill_product import THREADS, Tiling
from pi05_ros.engine.kernels.hopper_vision_product import order_features

_H200_PROCESSORS = 132


class Drawn:
    """The operands, and the residual with a row more than there are tokens."""

    def __init__(self, rows: int, features: int, depth: int, device: str = 'cpu') -> None:
        generator = torch.Generator().manual_seed(rows + features + depth)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.x = normal(rows, depth).bfloat16().to(device)
        self.weight = (normal(features, depth) * depth**-0.5).bfloat16().to(device)
        self.residual = (2.0 * normal(rows + 1, features)).bfloat16().to(device)
        self.residual[rows] = float('nan')

    def assert_close(self, found: torch.Tensor) -> None:
        twin = torch.empty(len(self.x), len(self.weight), device=self.x.device)
        residual = self.residual[:-1].float()
        linear_plain(self.x.float(), self.weight.float(), twin, residual=residual)
        assert found[-1].isnan().all(), 'the row behind the last one was written'
        errors = (found[:-1].float() - twin).norm(dim=1) / twin.norm(dim=1)
        assert errors.max() < 3e-3


@pytest.mark.parametrize(
    ('tiling', 'rows', 'features', 'depth'),
    [
        (SplitTiling(Tiling(128, 24, 1), 1), 50, 256, 1024),
        (SplitTiling(Tiling(128, 56, 1), 2), 100, 256, 1600),
        (SplitTiling(Tiling(256, 40, 1), 3), 70, 256, 512),
        (SplitTiling(Tiling(256, 104, 1), 5), 104, 256, 2240),
        (SplitTiling(Tiling(128, 24, 1), 4), 20, 128, 320),
    ],
    ids=['all-of-k', 'halves', 'uneven-parts', 'fifths', 'a-block-without-tokens'],
)
def test_a_sum_over_a_cluster_matches_its_twin(tmp_path_factory, tiling, rows, features, depth):
    library = tmp_path_factory.mktemp('down') / 'down.so'
    kernels = CpuModule(hopper_prefill_down._SOURCE, tiling.defines(), library)
    drawn = Drawn(rows, features, depth)
    out, weight = drawn.residual.clone(), order_features(drawn.weight)
    kernels.launch(
        'prefill_down', tiling.blocks(rows, features), THREADS, tiling.split,
        TensorMap(drawn.x, tiling.tile.tokens), TensorMap(weight, tiling.tile.box_rows()),
        out[:rows], out[:rows], rows, features, depth,
    )  # fmt: skip
    drawn.assert_close(out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a Hopper GPU')
@pytest.mark.parametrize('rows', [296, 552, 712, 968])
def test_the_down_projection_matches_its_twin_at_full_size(rows):
    device = torch.device('cuda')
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip('needs a Hopper GPU')
    drawn, results = Drawn(rows, 2048, 16384, 'cuda'), []
    kernel, weight = hopper_prefill_down.HopperPrefillDown(device), order_features(drawn.weight)
    for _ in range(2):
        out = drawn.residual.clone()
        kernel(drawn.x, weight, out[:rows], out[:rows])
        results.append(out)
    drawn.assert_close(results[0])
    assert torch.equal(*(result[:rows] for result in results))


@pytest.mark.parametrize('rows', [296, 552, 712, 968])
def test_a_prefix_of_the_released_model_takes_one_turn(rows):
    tiling = choose_tiling(rows, 2048, 16384, _H200_PROCESSORS)
    assert tiling.blocks(rows, 2048) <= _H200_PROCESSORS


@pytest.mark.parametrize('processors', [16, 78, 114, 132])
@pytest.mark.parametrize('rows', [1, 257, 576, 968, 4096])
def test_any_prefix_and_gpu_has_room_for_ring_and_sums(rows, processors):
    tiling = choose_tiling(rows, 2048, 16384, processors)
    tile = tiling.tile
    assert tile.stages >= 4 and tile.tokens % 8 == 0
    assert tile.shared_bytes() + 16 * tile.stages + 8 <= 227 * 1024
    share = -(-(tile.tokens // 8) // tiling.split)
    sums_bytes = tiling.split * share * tile.features * 8 * 4
    assert sums_bytes <= tile.shared_bytes() - 1024

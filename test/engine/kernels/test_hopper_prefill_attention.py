"""The prefix attention of Hopper GPUs against its twin.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as it is on a Hopper GPU.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import hopper_prefill_attention
from pi05_ros.engine.kernels.hopper_prefill_attention import (
    Cut,
    HopperPrefillAttention,
    prefill_attention_misfit,
)
from pi05_ros.engine.kernels.prefill_attention import prefill_attention_plain

_LOG2_E = 1.4426950408889634
_SCALE = 256**-0.5
_LIMIT = 4e-3  # weights, a sum and its twin's are rounded to bfloat16


def _draw(positions: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q (positions, heads * 256) and keys, values of whole blocks of 128."""
    generator = torch.Generator().manual_seed(positions)
    room = -(-positions // 128) * 128
    q = torch.randn(positions, heads * 256, generator=generator) * 3.0
    keys, values = torch.randn(2, room, 256, generator=generator)
    return q.bfloat16(), keys.bfloat16(), values.bfloat16()


def _error(out: torch.Tensor, q, keys, values, count: torch.Tensor) -> float:
    """Return the relative error of the valid rows."""
    twin = torch.empty_like(q)
    prefill_attention_plain(q, keys, values, count, _SCALE, twin)
    valid = int(count)
    difference = out[:valid].float() - twin[:valid].float()
    return float(difference.norm() / twin[:valid].float().norm())


_CUTS = [
    Cut(),
    Cut(keys=80, sum_bytes=2, held=6),
    Cut(keys=96, cluster_splits=1, held=2),
    Cut(sharers=2, held=0),
    Cut(cluster_splits=3),
    Cut(block_splits=2, cluster_splits=1),
    Cut(keys=96, block_splits=2, cluster_splits=1, sharers=2, held=2),
]


@pytest.fixture(scope='module', params=_CUTS, ids=str)
def module(request, tmp_path_factory) -> tuple[Cut, CpuModule]:
    library = tmp_path_factory.mktemp('attention') / 'attention.so'
    source = hopper_prefill_attention._SOURCE
    return request.param, CpuModule(source, request.param.defines(), library)


def _attend(module, q, keys, values, count: torch.Tensor) -> torch.Tensor:
    """Return what the kernel writes; rows that it leaves alone stay NaN."""
    cut, kernels = module
    heads = q.shape[1] // 256
    rows = q.shape[0] * heads
    room = torch.full((q.shape[0] + 1, q.shape[1]), float('nan'), dtype=torch.bfloat16)
    box = cut.keys // cut.sharers
    kernels.launch(
        'prefill_attention', cut.blocks(rows), 384, cut.cluster,
        TensorMap(q.view(rows, 256), 64), TensorMap(keys, box), TensorMap(values, box),
        count, _SCALE * _LOG2_E, room, heads,
    )  # fmt: skip
    assert room[q.shape[0]].isnan().all()
    return room[:-1]


@pytest.mark.parametrize(
    ('positions', 'heads', 'count'),
    [(100, 2, 100), (200, 2, 187), (300, 1, 290), (150, 2, 5), (40, 3, 1)],
    ids=['full', 'padded', 'many-tiles', 'padded-tiles', 'one-key'],
)
def test_attention_matches_its_twin(module, positions, heads, count):
    q, keys, values = _draw(positions, heads)
    valid = torch.tensor([count], dtype=torch.int32)
    out = _attend(module, q, keys, values, valid)
    assert _error(out, q, keys, values, valid) < _LIMIT
    assert out[count:].isnan().all()


def test_keys_beyond_the_count_have_no_influence(module):
    q, keys, values = _draw(100, 2)
    count = torch.tensor([75], dtype=torch.int32)
    keys[75:], values[75:] = 1e4, -1e4
    out = _attend(module, q, keys, values, count)
    assert _error(out, q, keys, values, count) < _LIMIT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a Hopper GPU')
@pytest.mark.parametrize(('positions', 'count'), [(576, 552), (712, 712), (968, 968), (968, 7)])
def test_attention_matches_its_twin_at_full_size(positions, count):
    device = torch.device('cuda')
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip('needs a Hopper GPU')
    q, keys, values = (t.to(device) for t in _draw(positions, 8))
    valid = torch.tensor([count], dtype=torch.int32, device=device)
    kernel = HopperPrefillAttention(device)
    results = []
    for _ in range(2):
        out = torch.full_like(q, float('nan'))
        kernel(q, keys, values, valid, _SCALE, out)
        results.append(out[:count])
    assert _error(results[0], q, keys, values, valid) < _LIMIT
    assert torch.equal(*results)


def test_a_grid_is_whole_clusters():
    assert Cut(cluster_splits=2).blocks(712 * 8) == 90
    assert Cut(cluster_splits=2, sharers=2).blocks(712 * 8) == 92
    assert Cut(block_splits=2, cluster_splits=1).blocks(712 * 8) == 89


@pytest.mark.parametrize('cut', _CUTS, ids=str)
def test_shared_memory_fits(cut):
    assert cut.defines()['STAGES'] >= 2 * cut.block_splits
    assert cut.shared_bytes() <= 226 * 1024


@pytest.mark.parametrize(
    ('dim', 'dtype', 'reason'),
    [(128, torch.bfloat16, '256 columns, not 128'), (256, torch.float32, 'not in torch.float32')],
)
def test_what_the_kernel_cannot_take_is_said(dim, dtype, reason):
    q, keys = torch.empty(4, 8 * dim, dtype=dtype), torch.empty(128, dim, dtype=dtype)
    assert reason in prefill_attention_misfit(q, keys)


def test_the_released_model_fits():
    q, keys, _ = _draw(16, 8)
    assert prefill_attention_misfit(q, keys) is None

"""The prefix attention of Hopper GPUs against its twin.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as it is on a Hopper GPU.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import hopper_prefill_attention
from pi05_ros.engine.kernels.hopper_prefill_attention import (
    HopperPrefillAttention,
    prefill_attention_misfit,
)
from pi05_ros.engine.kernels.prefill_attention import prefill_attention_plain
from pi05_ros.model.config import Pi05Config

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


@pytest.fixture(scope='module')
def module(tmp_path_factory) -> CpuModule:
    library = tmp_path_factory.mktemp('attention') / 'attention.so'
    return CpuModule(hopper_prefill_attention._SOURCE, {}, library)


def _attend(module: CpuModule, q, keys, values, count: torch.Tensor) -> torch.Tensor:
    """Return what the kernel writes; rows that it leaves alone stay NaN."""
    heads = q.shape[1] // 256
    rows = q.shape[0] * heads
    room = torch.full((q.shape[0] + 1, q.shape[1]), float('nan'), dtype=torch.bfloat16)
    matrices = (q.view(rows, 256), keys, values)
    module.launch(
        'prefill_attention', -(-rows // 64), 384, 1,
        *(TensorMap(matrix, 64) for matrix in matrices), count, _SCALE * _LOG2_E, room, heads,
    )  # fmt: skip
    assert room[q.shape[0]].isnan().all()
    return room[:-1]


@pytest.mark.parametrize(
    ('positions', 'heads', 'count'),
    [(100, 2, 100), (200, 2, 187), (400, 1, 390), (150, 2, 5), (40, 3, 1), (128, 1, 128)],
    ids=['full', 'padded', 'many-tiles', 'padded-tiles', 'one-key', 'whole-tiles'],
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


@pytest.mark.parametrize(('head_dim', 'fits'), [(256, True), (128, False)])
def test_only_heads_of_256_columns_fit(head_dim, fits):
    assert (prefill_attention_misfit(head_dim) is None) == fits


def test_the_released_model_fits():
    assert prefill_attention_misfit(Pi05Config.full().vlm.head_dim) is None

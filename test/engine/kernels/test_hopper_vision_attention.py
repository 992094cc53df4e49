"""The vision attention of Hopper GPUs against its twin.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as it is on a Hopper GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import hopper_vision_attention
from pi05_ros.engine.kernels.hopper_vision_attention import (
    HopperVisionAttention,
    Tiling,
    choose_tiling,
    vision_attention_misfit,
)
from pi05_ros.engine.kernels.vision_attention import vision_attention_plain
from pi05_ros.model.config import Pi05Config

_TOKENS, _DIM = 256, 72
_SCALE = _DIM**-0.5 * 1.4426950408889634
_LIMIT = 4e-3  # weights, a sum and its twin's are rounded to bfloat16


def _draw(views: int, heads: int) -> torch.Tensor:
    """Return qkv (views * 256, 3 * heads * 72)."""
    generator = torch.Generator().manual_seed(views)
    qkv = torch.randn(views * _TOKENS, 3 * heads * _DIM, generator=generator)
    qkv[:, : heads * _DIM] *= 3.0
    return qkv.bfloat16()


def _twin(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the twin's result, computed in float32."""
    out = torch.empty(qkv.shape[0], heads * _DIM, device=qkv.device)
    vision_attention_plain(qkv.float(), heads, _TOKENS, out)
    return out


def _error(out: torch.Tensor, twin: torch.Tensor) -> float:
    return float((out.float() - twin).norm() / twin.norm())


@pytest.fixture(scope='module')
def attend(tmp_path_factory):
    """Return a function that runs the kernel on the CPU; what it leaves alone stays NaN."""
    folder, modules = tmp_path_factory.mktemp('attention'), {}

    def run(qkv: torch.Tensor, heads: int, tiling: Tiling) -> torch.Tensor:
        defines = tiling.defines(heads)
        key = tuple(defines.values())
        if key not in modules:
            library = folder / f'attention{len(modules)}.so'
            modules[key] = CpuModule(hopper_vision_attention._SOURCE, defines, library)
        rows = qkv.shape[0]
        room = torch.full((rows + 1, heads * _DIM), float('nan'), dtype=torch.bfloat16)
        modules[key].launch(
            'vision_attention', tiling.blocks, 256, tiling.cluster,
            TensorMap(qkv, 64), TensorMap(qkv, 64, 16), _SCALE, room,
        )  # fmt: skip
        assert room[rows].isnan().all()
        return room[:rows]

    return run


@pytest.mark.parametrize(
    ('views', 'heads', 'cluster', 'processors'),
    [(1, 2, 1, 132), (2, 2, 2, 132), (3, 1, 4, 132), (3, 2, 2, 16), (1, 3, 4, 8)],
    ids=['one-view', 'pairs', 'fours', 'two-blocks-together', 'fours-together'],
)
def test_attention_matches_its_twin(attend, views, heads, cluster, processors):
    qkv = _draw(views, heads)
    tiling = replace(choose_tiling(qkv.shape[0], heads, processors), cluster=cluster)
    out = attend(qkv, heads, tiling)
    assert _error(out, _twin(qkv, heads)) < _LIMIT


def test_heads_and_views_do_not_see_each_other(attend):
    qkv, heads = _draw(2, 2), 2
    parts = qkv.view(2, _TOKENS, 3, heads, _DIM)
    tiling = choose_tiling(qkv.shape[0], heads, 132)
    first = attend(qkv, heads, tiling).view(2, _TOKENS, heads, _DIM)
    parts[1], parts[:, :, :, 1] = 5.0, -3e30
    other = attend(qkv, heads, tiling).view(2, _TOKENS, heads, _DIM)
    assert torch.equal(first[0, :, 0], other[0, :, 0])
    assert not torch.equal(first[1, :, 0], other[1, :, 0])
    assert not torch.equal(first[0, :, 1], other[0, :, 1])


def test_rows_far_apart_in_scale_keep_their_digits(attend):
    heads, tiling = 2, choose_tiling(_TOKENS, 2, 132)
    qkv = _draw(1, heads).float()
    scales = 10.0 ** torch.linspace(-6, 2, _TOKENS)[:, None]
    qkv[:, : heads * _DIM] *= scales  # from even weights to weights of one key
    qkv[:, heads * _DIM : 2 * heads * _DIM] *= scales.flip(0).sqrt()
    qkv = qkv.bfloat16()
    out, twin = attend(qkv, heads, tiling), _twin(qkv, heads)
    errors = (out.float() - twin).norm(dim=1) / twin.norm(dim=1)
    assert errors.max() < 2 * _LIMIT


def test_two_runs_have_the_same_bits(attend):
    qkv, tiling = _draw(1, 2), choose_tiling(_TOKENS, 2, 132)
    assert torch.equal(attend(qkv, 2, tiling), attend(qkv, 2, tiling))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a Hopper GPU')
@pytest.mark.parametrize('views', [1, 2, 3])
def test_attention_matches_its_twin_at_full_size(views):
    device = torch.device('cuda')
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip('needs a Hopper GPU')
    qkv = _draw(views, 16).to(device)
    kernel = HopperVisionAttention(device)
    results = []
    for _ in range(2):
        out = torch.full((qkv.shape[0], 16 * _DIM), float('nan'), device=device).bfloat16()
        kernel(qkv, 16, out)
        results.append(out)
    assert _error(results[0], _twin(qkv, 16)) < _LIMIT
    assert torch.equal(*results)


@pytest.mark.parametrize(('views', 'cluster', 'together'), [(1, 1, 1), (2, 2, 1), (3, 2, 2)])
def test_blocks_are_alone_on_a_multiprocessor_where_all_have_one(views, cluster, together):
    tiling = choose_tiling(views * _TOKENS, 16, 132)
    assert tiling == Tiling(views * 64, cluster, together)
    # Of the 228 KB of a multiprocessor each block takes 1 KB more, and its fixed variables.
    fitting = 228 * 1024 // (tiling.shared_bytes() + 1024 + 1152)
    assert fitting == together


@pytest.mark.parametrize(
    ('head_dim', 'tokens', 'fits'), [(72, 256, True), (64, 256, False), (72, 64, False)]
)
def test_only_heads_and_views_of_one_size_fit(head_dim, tokens, fits):
    assert (vision_attention_misfit(head_dim, tokens) is None) == fits


def test_the_released_model_fits():
    vision = Pi05Config.full().vision
    assert vision_attention_misfit(vision.head_dim, vision.tokens_per_view) is None

"""The Hopper kernels against their plain twins.

Compiled for the CPU, where every thread is a fiber (cuda_on_cpu.py); as they are on a Hopper GPU.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine.kernels import euler, hopper_layout, small_gemm, split_attention
from pi05_ros.engine.kernels.adarms import GATE, SCALE, SHIFT, adarms_reference
from pi05_ros.engine.kernels.hopper_layout import (
    PRODUCT_THREADS,
    HopperPlan,
    Slab,
    defines,
    pack,
    token_rows,
    unpack,
)
from pi05_ros.model.config import Pi05Config

_SOURCE = Path(hopper_layout.__file__).with_name('hopper_layer.cu')
_FULL = Pi05Config.full()
_EXPERT = replace(_FULL.expert, width=256, depth=1, mlp_dim=512, num_heads=2)
_CONFIG = replace(_FULL, expert=_EXPERT, vlm=replace(_FULL.vlm, depth=1, num_heads=2))
_ACTIONS, _ROOM = _CONFIG.action_dim, 96
_SPARE_ROWS = 8  # behind the last token, where nothing is written
_PLAN = HopperPlan(
    qkv=Slab(128, 64, 4), attention_out=Slab(64, 256, 2), gate_up=Slab(128, 256, token_bytes=1),
    down=Slab(64, 128, 4, token_bytes=1), queries=32, ranges=3, keys=64,
)  # fmt: skip
# The same products cut otherwise.
_OTHER_CUT = replace(
    _PLAN, qkv=Slab(64, 128, 2), attention_out=Slab(128, 64, 8, token_bytes=1),
    gate_up=Slab(64, 256, token_bytes=1), down=Slab(128, 512, token_bytes=1),
)  # fmt: skip
# Other clusters by horizon: in products some have blocks that finish no token, in the attention
# ranges without a key, and at a step's end blocks have 128, 32, 128, 64 and 128 columns.
_PLANS = {
    50: replace(_PLAN, end_tokens=8, end_blocks=2),
    33: replace(
        _OTHER_CUT, queries=48, ranges=2, keys=80, spare_clusters=2, end_tokens=8, end_blocks=8
    ),
    15: replace(
        _OTHER_CUT, queries=16, ranges=8, keys=32, spare_clusters=1, end_tokens=4, end_blocks=2
    ),
    10: replace(
        _PLAN, down=Slab(64, 512, token_bytes=1), queries=16, ranges=8, keys=32, end_tokens=4,
        end_blocks=4,
    ),
    1: replace(_OTHER_CUT, queries=16, ranges=5, keys=32, end_tokens=2, end_blocks=2),
}  # fmt: skip


class CpuKernels:
    """The kernels of one horizon, compiled for the CPU."""

    def __init__(self, horizon: int, folder: Path) -> None:
        self.horizon = horizon
        sizes = defines(_PLANS[horizon], _CONFIG, horizon)
        self._module = CpuModule(_SOURCE, sizes, folder / f'layer_{horizon}.so')

    def __call__(
        self, name: str, blocks: int, *arguments, threads: int = 256, cluster: int = 1
    ) -> None:
        self._module.launch(name, blocks, threads, cluster, *arguments)

    def tokens(self, matrix: torch.Tensor) -> TensorMap:
        """Return a matrix as the products take it."""
        return TensorMap(matrix, token_rows(self.horizon))


class GpuKernels:
    """The same on the GPU; arguments are copied there and back."""

    def __init__(self, horizon: int) -> None:
        from pi05_ros.engine.kernels.nvrtc import compile_module

        self.horizon = horizon
        sizes = tuple(defines(_PLANS[horizon], _CONFIG, horizon).items())
        self._module = compile_module(_SOURCE, sizes, torch.device('cuda'))
        self._shared_bytes = {
            name: getattr(_PLANS[horizon], name).shared_bytes(horizon)
            for name in hopper_layout.PRODUCTS
        } | {'attend': _PLANS[horizon].attend_bytes(_EXPERT.head_dim)}

    def __call__(
        self, name: str, blocks: int, *arguments, threads: int = 256, cluster: int = 1
    ) -> None:
        from pi05_ros.engine.kernels.nvrtc import CudaKernel

        shared_bytes = self._shared_bytes.get(name, 0)
        kernel = CudaKernel(self._module, name, blocks, threads, shared_bytes, cluster)
        there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
        kernel.launch(there, early=False)
        for mine, its in zip(arguments, there, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(its)

    def tokens(self, matrix: torch.Tensor):
        """Return a matrix as the products take it."""
        from pi05_ros.engine.kernels.nvrtc import TensorTiles

        self._tokens = matrix.cuda()  # lives as long as the launch
        return TensorTiles(self._tokens, token_rows(self.horizon), hopper_layout.TILE_COLUMNS)


@pytest.fixture(scope='module', params=_PLANS)
def kernels(request, tmp_path_factory) -> CpuKernels | GpuKernels:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        return GpuKernels(request.param)
    return CpuKernels(request.param, tmp_path_factory.mktemp('kernels'))


def _randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize('slab', [Slab(128, 64), Slab(64, 128)])
def test_unpacking_gives_the_packed_weight_back(slab):
    weight = _randn(128, 256)
    order = torch.randperm(128)
    assert torch.equal(unpack(pack(weight, slab), slab), weight)
    assert torch.equal(unpack(pack(weight, slab, order), slab, order), weight)
    assert not torch.equal(pack(weight, slab), weight)


def _run_product(
    kernels, name: str, order, weight: torch.Tensor, tokens: torch.Tensor, *others, norm=()
):
    """Launch a product with packed weights; a cluster more than it needs writes nothing else."""
    slab = getattr(_PLANS[kernels.horizon], name)
    packed = pack(weight, slab, order and order(slab.features, _EXPERT))
    kernels(
        name, slab.blocks(*weight.shape) + slab.split, kernels.tokens(tokens), *norm, packed,
        *others, threads=PRODUCT_THREADS, cluster=slab.split,
    )  # fmt: skip


def _squares(x: torch.Tensor, columns: int, parts: int) -> torch.Tensor:
    """Return the sums of squares of x (H, W) as kernels leave them that write so many columns."""
    squares = torch.zeros(len(x), parts)
    for part, of_x in zip(squares.T, x.float().split(columns, dim=1), strict=False):
        part.copy_(of_x.square().sum(1))
    return squares


def _before_a_norm(kernels, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return scaled x, its sums of squares and shift W^T, and the product behind the norm."""
    width, parts = _EXPERT.width, _PLANS[kernels.horizon].square_parts(_EXPERT.width)
    x, modulation = _randn(kernels.horizon, width), _randn(3, width, dtype=torch.float32)
    x *= torch.rand(kernels.horizon, 1) + 0.1  # no two tokens have the same rms
    scaled = (x.float() * (1 + modulation[SCALE])).bfloat16()
    shift = modulation[SHIFT] @ weight.float().T
    rms = (x.float().square().mean(1, keepdim=True) + _EXPERT.rms_norm_eps).sqrt()
    product = (scaled.float() @ weight.float().T / rms + shift).bfloat16()
    normed = adarms_reference(x, modulation, _EXPERT.rms_norm_eps)
    assert _cosine(product, torch.nn.functional.linear(normed, weight)) > 0.9999
    return scaled, _squares(x, width // parts, parts), shift, product


def test_qkv_is_normed_and_rotated(kernels):
    h, width = kernels.horizon, _EXPERT.width
    weight = _randn(4 * 256, width, scale=width**-0.5)
    scaled, squares, shift, product = _before_a_norm(kernels, weight)
    angle = torch.rand(_ROOM + h, 128) * 6
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    start = torch.tensor([7], dtype=torch.int32)
    out = torch.full((4, h, 256), float('nan'), dtype=torch.bfloat16)
    _run_product(
        kernels, 'qkv', hopper_layout.qkv_order, weight, scaled, cos, sin, start, out,
        norm=(squares, shift),
    )  # fmt: skip
    heads = product.unflatten(-1, (4, 256)).transpose(0, 1)
    first, second = heads[:-1].chunk(2, dim=-1)
    c, s = cos[7 : 7 + h], sin[7 : 7 + h]
    expected = torch.cat(
        [torch.cat([first * c - second * s, second * c + first * s], -1), heads[-1:]]
    )
    assert _cosine(out, expected) > 0.999995


def test_gate_and_up_are_normed_and_make_geglu(kernels):
    h, width, hidden = kernels.horizon, _EXPERT.width, _EXPERT.mlp_dim
    weight = _randn(2 * hidden, width, scale=width**-0.5)
    scaled, squares, shift, product = _before_a_norm(kernels, weight)
    out = torch.full((h, hidden), float('nan'), dtype=torch.bfloat16)
    _run_product(
        kernels, 'gate_up', hopper_layout.gate_up_order, weight, scaled, out,
        norm=(squares, shift),
    )  # fmt: skip
    gate, up = product.chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate='tanh') * up
    assert _cosine(out, expected) > 0.999995


@pytest.mark.parametrize('name', ['attention_out', 'down'])
def test_a_product_reaches_the_residual_stream_and_the_next_norm(kernels, name):
    h, width = kernels.horizon, _EXPERT.width
    plan, depth = _PLANS[h], 512
    slab, parts = getattr(plan, name), plan.square_parts(width)
    tokens, weight = _randn(h, depth), _randn(width, depth, scale=depth**-0.5)
    modulation, following = _randn(2, 3, width, dtype=torch.float32)
    before = _randn(h, width)

    def run() -> tuple[torch.Tensor, ...]:
        x, squares = before.clone(), torch.zeros(h, parts)
        scaled = torch.full((h, width), float('nan'), dtype=torch.bfloat16)
        gate, scale = modulation[GATE].contiguous(), following[SCALE].contiguous()
        _run_product(kernels, name, None, weight, tokens, gate, scale, x, scaled, squares)
        return x, scaled, squares

    x, scaled, squares = run()
    expected = small_gemm.gated_residual_reference(before, tokens, weight, modulation)
    assert _cosine(x, expected) > 0.999995
    assert torch.equal(scaled, (x.float() * (1 + following[SCALE])).bfloat16())
    assert torch.allclose(squares, _squares(x, slab.features, parts), rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip((x, scaled, squares), run(), strict=True))


@pytest.mark.parametrize('prefix', [90, 64, 3])
def test_attention_sees_prefix_and_suffix(kernels, prefix):
    h = kernels.horizon
    qkv, keys, values = _randn(4, h, 256), _randn(_ROOM, 256), _randn(_ROOM, 256)
    keys[prefix:], values[prefix:] = float('nan'), float('nan')
    n_prefix = torch.tensor([prefix], dtype=torch.int32)
    attended = torch.full((h, 512), float('nan'), dtype=torch.bfloat16)
    scale = 256**-0.5 * math.log2(math.e)
    plan = _PLANS[h]
    kernels(
        'attend', plan.attend_blocks(_EXPERT, h), qkv, keys, values, n_prefix, attended, scale,
        cluster=plan.ranges,
    )  # fmt: skip
    expected = split_attention.attention_reference(qkv, keys[:prefix], values[:prefix])
    assert _cosine(attended, expected) > 0.9999


@pytest.fixture
def step_end(kernels):
    """Return a function that runs a step's end and returns x_t, x, scaled x and squares."""
    h, width, plan = kernels.horizon, _EXPERT.width, _PLANS[kernels.horizon]
    w_out, b_out = torch.randn(_ACTIONS, width) * width**-0.5, torch.randn(_ACTIONS)
    w_in, b_in = torch.randn(width, _ACTIONS) * _ACTIONS**-0.5, torch.randn(width)
    final, following = torch.randn(2, 3, width)
    last, before = _randn(h, width), torch.randn(h, _ACTIONS)
    last *= torch.rand(h, 1) + 0.1
    scaled = (last.float() * (1 + final[SCALE])).bfloat16()
    parts = plan.square_parts(width)
    squares = _squares(last, width // parts, parts)
    velocity_bias = b_out + w_out @ final[SHIFT]
    next_scale = following[SCALE].contiguous()

    def expected(leave: int) -> tuple[torch.Tensor, ...]:
        if not leave:
            return before, euler.enter_reference(before, w_in, b_in, torch.bfloat16)
        rms = (last.float().square().mean(1, keepdim=True) + _EXPERT.rms_norm_eps).sqrt()
        x_t = before - 0.1 * (scaled.float() @ w_out.T / rms + velocity_bias)
        plain = euler.leave_reference(
            last, before, final, w_out, b_out, -0.1, _EXPERT.rms_norm_eps
        )
        assert torch.allclose(x_t, plain, atol=4e-3)
        return x_t, euler.enter_reference(x_t, w_in, b_in, torch.bfloat16)

    def run(leave: int, enter: int, in_place: bool = False) -> tuple[torch.Tensor, ...]:
        def room(*first: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
            rows = torch.full((h + _SPARE_ROWS, columns), float('nan'), dtype=dtype)
            return torch.cat([*first, rows[sum(map(len, first)) :]])

        from_ = room(before, columns=_ACTIONS, dtype=torch.float32)
        to = from_ if in_place else room(columns=_ACTIONS, dtype=torch.float32)
        x = room(columns=width, dtype=torch.bfloat16)
        rows = room(scaled, columns=width, dtype=torch.bfloat16)
        of_x = room(torch.zeros(h, parts), columns=parts, dtype=torch.float32)
        kernels(
            'step_end', plan.step_end_blocks(h), rows, squares, w_out, velocity_bias, w_in, b_in,
            next_scale, from_, to, x, of_x, -0.1, leave, enter, cluster=plan.end_blocks,
        )  # fmt: skip
        for written in (to, x, rows, of_x):
            assert written[h:].isnan().all()
        assert torch.equal(rows[:h], scaled) or enter
        return to[:h], x[:h], rows[:h], of_x[:h]

    run.expected, run.next_scale = expected, next_scale
    return run


@pytest.mark.parametrize('leave, enter', [(0, 1), (1, 1), (1, 0)])
def test_a_step_ends_in_float32(kernels, step_end, leave, enter):
    after, x, scaled, squares = step_end(leave, enter)
    x_t, expected_x = step_end.expected(leave)
    if leave:
        assert torch.allclose(after, x_t, atol=1e-5)
    else:
        assert after.isnan().all()
    if enter:
        assert _cosine(x, expected_x) > 0.999995
        assert torch.equal(scaled, (x.float() * (1 + step_end.next_scale)).bfloat16())
        columns = x.shape[1] // _PLANS[kernels.horizon].end_blocks
        assert torch.allclose(squares, _squares(x, columns, squares.shape[1]), rtol=1e-5)
    else:
        assert x.isnan().all()
        assert not squares.any()


def test_a_step_may_end_in_place_with_the_same_bits(step_end):
    once, again = step_end(1, 1), step_end(1, 1, in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

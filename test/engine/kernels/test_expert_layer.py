"""Every kernel of an expert layer alone, against its plain twin; float32 in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from pi05_ros.engine.denoise_layers import ExpertLayer, LayerBuffers
from pi05_ros.engine.denoise_tuning import AttentionTiling, DenoiseTuning, GemmTiling
from pi05_ros.engine.expert_weights import ExpertWeights
from pi05_ros.engine.kernels import small_gemm, split_attention
from pi05_ros.engine.kernels.adarms import SCALE
from pi05_ros.model.config import GemmaConfig, Pi05Config

_CUDA = torch.cuda.is_available()
_DEVICE = torch.device('cuda' if _CUDA else 'cpu')
_ROOM = 70  # prefix rows; more than any test's prefix
_RAGGED = DenoiseTuning(
    qkv=GemmTiling(columns=32, depth=32),
    attention=AttentionTiling(rows=32, keys=32, splits=3, warps=4),
    attention_out=GemmTiling(columns=32, depth=64, splits=4),
    gate_up=GemmTiling(columns=64, depth=32),
    down=GemmTiling(columns=16, depth=16, splits=2),
)
_WHOLE = replace(
    _RAGGED, attention_out=GemmTiling(columns=64, depth=32), down=GemmTiling(columns=64, depth=64)
)


@dataclass(frozen=True)
class Case:
    """One layer with random weights, and the inputs of its kernels."""

    layer: ExpertLayer
    buffers: LayerBuffers
    weights: ExpertWeights
    expert: GemmaConfig
    prefix: int

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(self.prefix, self.prefix + self.buffers.x.shape[0])
        return self.buffers.cos[rows], self.buffers.sin[rows]

    def set_residual(self, norm: int) -> torch.Tensor:
        """Leave what the producer of x does: x scaled for a norm, sums of squares in parts."""
        x = self.buffers.x.float()
        ssq = x.pow(2).sum(-1)
        scale = 1 + self.weights.modulations[0, norm, SCALE]
        self.buffers.scaled.copy_((x * scale).to(self.buffers.x.dtype))
        for buffer in {id(b): b for b in self._ssq_buffers()}.values():
            buffer.zero_()
            buffer[:, 0] = 0.75 * ssq
            buffer[:, -1] += 0.25 * ssq
        return self.buffers.x.clone()

    def _ssq_buffers(self) -> list[torch.Tensor]:
        return [self.layer.ssq, self.layer._ssq_attention]


def _case(horizon: int, prefix: int, tuning: DenoiseTuning = _RAGGED) -> Case:
    expert = replace(Pi05Config.tiny().expert, depth=1)
    dtype = torch.bfloat16 if _CUDA else torch.float32
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(_DEVICE, of)

    width, mlp, head_dim = expert.width, expert.mlp_dim, expert.head_dim
    heads = expert.num_heads * head_dim
    buffers = LayerBuffers(
        x=draw(horizon, width),
        scaled=draw(horizon, width),
        qkv=draw(expert.num_heads + 2, horizon, head_dim),
        attended=draw(horizon, heads),
        activated=draw(horizon, mlp),
        keys=draw(1, _ROOM, head_dim),
        values=draw(1, _ROOM, head_dim),
        n_prefix=torch.tensor([prefix], dtype=torch.int32, device=_DEVICE),
        cos=draw(_ROOM + horizon, head_dim // 2).cos(),
        sin=draw(_ROOM + horizon, head_dim // 2).sin(),
    )
    weights = ExpertWeights(
        qkv=draw(1, heads + 2 * head_dim, width, scale=width**-0.5),
        attention_out=draw(1, width, heads, scale=heads**-0.5),
        gate_up=draw(1, 2 * mlp, width, scale=width**-0.5),
        down=draw(1, width, mlp, scale=mlp**-0.5),
        **dict.fromkeys(('action_in', 'action_in_bias', 'action_out', 'action_out_bias'), draw(1)),
        modulations=draw(1, 3, 3, width, of=torch.float32),
    )
    layer = ExpertLayer(buffers, weights, expert, tuning)
    return Case(layer, buffers, weights, expert, prefix)


def _assert_close(kernel: torch.Tensor, twin: torch.Tensor) -> None:
    assert torch.isfinite(kernel).all(), 'an element was not written'
    error = (kernel.double() - twin.double()).norm() / twin.double().norm()
    limit = 8e-3 if kernel.dtype == torch.bfloat16 else 1e-5
    assert error < limit, f'relative error {error:.2e}'


HORIZONS = pytest.mark.parametrize('horizon', [1, 10, 17, 50] if _CUDA else [3, 17])


@HORIZONS
def test_qkv_rope_matches_its_twin(horizon):
    case = _case(horizon, 33)
    x = case.set_residual(norm=0)
    case.buffers.qkv.fill_(float('nan'))
    case.layer.launch_qkv(0, 0)
    weights, eps = case.weights, case.expert.rms_norm_eps
    expected = small_gemm.qkv_rope_reference(
        x, weights.modulations[0, 0], weights.qkv[0], *case.tables, eps
    )
    _assert_close(case.buffers.qkv, expected)


@pytest.mark.parametrize('horizon', [1, 10, 17, 50] if _CUDA else [5])
@pytest.mark.parametrize('prefix', [1, 32, 45])
def test_attention_matches_its_twin(horizon, prefix):
    """Few prefix keys leave ranges without any key; rows beyond the prefix are not numbers."""
    case = _case(horizon, prefix)
    case.buffers.keys[:, prefix:] = float('nan')
    case.buffers.values[:, prefix:] = float('nan')
    case.buffers.attended.fill_(float('nan'))
    case.layer.launch_attend(0, 0)
    case.layer.launch_merge()
    expected = split_attention.attention_reference(
        case.buffers.qkv, case.buffers.keys[0, :prefix], case.buffers.values[0, :prefix]
    )
    _assert_close(case.buffers.attended, expected)


@HORIZONS
def test_gate_up_matches_its_twin(horizon):
    case = _case(horizon, 1)
    x = case.set_residual(norm=1)
    case.buffers.activated.fill_(float('nan'))
    case.layer.launch_gate_up(0, 0)
    expected = small_gemm.gate_up_reference(
        x, case.weights.modulations[0, 1], case.weights.gate_up[0], case.expert.rms_norm_eps
    )
    _assert_close(case.buffers.activated, expected)


@HORIZONS
@pytest.mark.parametrize('tuning', [_RAGGED, _WHOLE], ids=['split', 'whole'])
def test_gated_residuals_match_their_twin_and_leave_what_a_norm_needs(horizon, tuning):
    case = _case(horizon, prefix=1, tuning=tuning)
    modulations = case.weights.modulations[0]
    for norm, launch, source, weight, ssq in (
        (0, case.layer.launch_attention_out, 'attended', 'attention_out', -1),
        (1, case.layer.launch_down, 'activated', 'down', 0),
    ):
        x = case.buffers.x.clone()
        launch(0, 0)
        expected = small_gemm.gated_residual_reference(
            x, getattr(case.buffers, source), getattr(case.weights, weight)[0], modulations[norm]
        )
        _assert_close(case.buffers.x, expected)
        scale = 1 + modulations[norm + 1, SCALE]
        _assert_close(case.buffers.scaled, (case.buffers.x * scale).to(x.dtype))
        squares = case._ssq_buffers()[ssq].sum(-1)
        torch.testing.assert_close(
            squares, case.buffers.x.float().pow(2).sum(-1), rtol=1e-4, atol=1e-4
        )

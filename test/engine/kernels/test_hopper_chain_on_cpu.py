"""The chain of the Hopper kernels, which buffer goes where, against the plain twin.

On a GPU ``scripts/bench_denoise.py --check`` compares the same at full size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

from pi05_ros.engine import denoise, hopper_chain
from pi05_ros.engine.denoise import DenoiseStage
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.names import expected_shapes

_FULL = Pi05Config.full()
_CONFIG = replace(
    _FULL,
    expert=replace(_FULL.expert, width=512, depth=2, mlp_dim=1024, num_heads=4),
    vlm=replace(_FULL.vlm, depth=2, num_heads=4),
)
_HORIZON, _PREFIX, _ROOM, _STEPS = 10, 100, 192, 2


class _CpuKernel:
    """Stands in for CudaKernel."""

    def __init__(
        self, module: CpuModule, name: str, blocks: int, threads: int, shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:  # fmt: skip
        self._module, self._shape = module, (name, blocks, threads, cluster)

    def launch(self, arguments, *, early: bool) -> None:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        assert all(t.is_contiguous() for t in tensors)
        self._module.launch(*self._shape, *arguments)


@pytest.fixture
def stage(monkeypatch, tmp_path) -> DenoiseStage:
    """A stage that runs the Hopper kernels on the CPU."""

    def compile_module(source, macros, device) -> CpuModule:
        return CpuModule(source, dict(macros), tmp_path / 'chain.so')

    def tiles(matrix: torch.Tensor, rows: int, columns: int) -> TensorMap:
        return TensorMap(matrix, rows)

    monkeypatch.setattr(hopper_chain, 'compile_module', compile_module)
    monkeypatch.setattr(hopper_chain, 'CudaKernel', _CpuKernel)
    monkeypatch.setattr(hopper_chain, 'TensorTiles', tiles)
    monkeypatch.setattr(hopper_chain, '_processors', lambda device: 132)
    monkeypatch.setattr(denoise, 'hopper_obstacle', lambda config, buffers: None)
    monkeypatch.setattr(denoise, 'has_bindings', lambda: True)
    torch.manual_seed(5)
    state = {
        name: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
        for name, shape in expected_shapes(_CONFIG).items()
        if '.gemma_expert.' in name or name.startswith(('action_', 'time_mlp_'))
    }
    keys, values = torch.randn(2, _CONFIG.expert.depth, _ROOM, 256).bfloat16()
    n_prefix = torch.tensor([_PREFIX], dtype=torch.int32)
    return DenoiseStage(
        state, _CONFIG, keys=keys, values=values, n_prefix=n_prefix,
        noise=torch.randn(_HORIZON, _CONFIG.action_dim), max_steps=_STEPS,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason='plain tensors are no stage of a GPU')
def test_steps_of_layers_match_the_plain_twin(stage):
    assert stage.chain.backend == 'cuda-hopper'
    stage.launch(_STEPS)
    expected = stage.eager(_STEPS)
    error = (stage.actions - expected).norm() / (expected - stage.noise).norm()
    assert error < 0.006, f'relative error {error:.4f}'
    once = stage.actions.clone()
    stage.launch(_STEPS)
    assert torch.equal(stage.actions, once)

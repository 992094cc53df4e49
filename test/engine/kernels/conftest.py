"""Kernels run on the GPU where there is one, and through Triton's interpreter elsewhere.

The interpreter's bfloat16 is not the hardware's, so there the kernels get float32 operands.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=['float32', 'bfloat16'])
def dtype(request) -> torch.dtype:
    """Operand type; bfloat16 only on a GPU."""
    if request.param == 'bfloat16' and not torch.cuda.is_available():
        pytest.skip('bfloat16 kernels are measured on a GPU')
    return getattr(torch, request.param)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of this run execute."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.fixture
def draw(dtype, device):
    """Return a function that draws a normal tensor of a shape, the same in every run."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    return normal


@pytest.fixture
def assert_matches(dtype):
    """Return a check of kernel against twin: relative error, every element written."""
    limit = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]

    def check(kernel: torch.Tensor, twin: torch.Tensor) -> None:
        assert torch.isfinite(kernel).all()
        error = (kernel.double() - twin.double()).norm() / twin.double().norm()
        assert error < limit, f'relative error {error:.2e}'

    return check

"""The flow: Euler steps from noise at t = 1 to actions at t = 0 (openpi pi0_pytorch.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def step_times(num_steps: int) -> list[float]:
    """Return the N times at which the velocity is taken, from 1 down.

    The time is accumulated in float32, as openpi does, so the last bits differ from
    ``1 - step / N``. Whoever tabulates a function of the time must use these values.
    """
    dt = step_size(num_steps)
    times = [np.float32(1.0)]
    for _ in range(num_steps - 1):
        times.append(times[-1] + dt)
    return [float(t) for t in times]


def step_size(num_steps: int) -> np.float32:
    """Return the (negative) float32 step of N Euler steps."""
    if num_steps < 1:
        raise ValueError(f'num_steps must be at least 1, got {num_steps}')
    return np.float32(-1.0 / num_steps)


def euler(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Integrate the flow.

    Args:
        velocity: (x_t (H, A) float32, t) -> v (H, A) float32.
        noise: (H, A) float32, the start.
        num_steps: N, at least 1.
    Returns:
        actions (H, A) and the velocity of every step (N, H, A), both float32.
    """
    dt = float(step_size(num_steps))
    x, velocities = noise, []
    for t in step_times(num_steps):
        velocities.append(velocity(x, t))
        x = x + dt * velocities[-1]
    return x, torch.stack(velocities)

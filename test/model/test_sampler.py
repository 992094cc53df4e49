from __future__ import annotations

import numpy as np
import pytest
import torch

from pi05_ros.model.sampler import euler, step_times


@pytest.mark.parametrize('steps', [1, 2, 3, 5, 7, 10, 50])
def test_times_are_accumulated_in_float32(steps: int):
    """openpi adds dt to t; 1 - i/N differs from that in the last bits from the third step on."""
    t, dt, expected = np.float32(1.0), np.float32(-1.0 / steps), []
    while t >= -dt / 2:
        expected.append(float(t))
        t = np.float32(t + dt)
    assert step_times(steps) == expected
    assert len(expected) == steps


def test_velocities_are_those_of_each_step_and_add_up_to_the_actions():
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    seen = []

    def velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return x_t * t

    actions, velocities = euler(velocity, noise, 5)
    assert seen == step_times(5)
    assert velocities.shape == (5, 4, 3)
    torch.testing.assert_close(actions, noise - velocities.sum(0) / 5)


def test_one_step_of_a_straight_flow_reaches_its_end():
    noise, target = torch.randn(4, 3), torch.randn(4, 3)
    actions, _ = euler(lambda x_t, t: noise - target, noise, 1)
    torch.testing.assert_close(actions, target)


def test_no_step_at_all_is_refused():
    with pytest.raises(ValueError, match='num_steps must be at least 1, got 0'):
        step_times(0)

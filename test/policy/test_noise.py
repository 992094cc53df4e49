"""The noise depends on seed and tick alone, on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pi05_ros.policy.noise import _log, noise


def test_bits_are_pinned():
    """A bag that is replayed in years, or on another processor, must start from these bits."""
    values = noise(seed=3, tick=5, horizon=50, action_dim=32)
    digest = hashlib.sha256(values.astype('<f4').tobytes()).hexdigest()
    assert digest == 'b9a9b5e1cb997b9c25a54b0bc4ce32f7cf52bd783384339dd2d9efcf7dae271c'


def test_shape_and_dtype():
    values = noise(0, 0, 10, 32)
    assert values.shape == (10, 32)
    assert values.dtype == np.float32


@pytest.mark.parametrize('other', [(1, 0), (0, 1), (-1, 0), (2**63 - 1, 0), (0, 2**40)])
def test_seed_and_tick_change_every_value(other: tuple[int, int]):
    assert (noise(0, 0, 10, 32) != noise(*other, 10, 32)).mean() > 0.99


def test_equal_arguments_give_equal_bits():
    np.testing.assert_array_equal(noise(9, 1234, 50, 32), noise(9, 1234, 50, 32))


def test_distribution_is_standard_normal():
    values = np.concatenate([noise(7, tick, 50, 32).ravel() for tick in range(200)])
    values = values.astype(np.float64)
    count = values.size
    # Five standard errors of each moment of a standard normal sample.
    assert abs(values.mean()) < 5 / np.sqrt(count)
    assert abs((values**2).mean() - 1) < 5 * np.sqrt(2 / count)
    assert abs((values**3).mean()) < 5 * np.sqrt(15 / count)
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96 / count)
    assert np.mean(np.abs(values) < 1) == pytest.approx(0.6827, abs=0.005)


def test_logarithm_matches_the_library_to_the_last_bits():
    x = np.concatenate([np.random.default_rng(0).random(10_000), 2.0 ** np.arange(-60, 2)])
    expected = np.log(x)
    np.testing.assert_allclose(_log(x), expected, rtol=5e-16, atol=2e-16)

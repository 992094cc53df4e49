"""The start of the flow: normal numbers from a seed and a tick, the same on every machine.

numpy promises that the Philox bits of a key never change, but not the stream of
``Generator.standard_normal``, whose tails also go through the platform's libm. So the bits are
turned into normal numbers here, with operations that IEEE 754 rounds in one way only
(+, -, *, /, sqrt), and a bag replayed elsewhere starts from identical noise.
"""

from __future__ import annotations

import numpy as np

_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_LOG_TERMS = 11  # the next term of the series is below 1e-18


def noise(seed: int, tick: int, horizon: int, action_dim: int) -> np.ndarray:
    """Return the noise of one control tick.

    Args:
        seed: any 64-bit integer, may be negative.
        tick: number of the control tick, not negative.
        horizon: rows.
        action_dim: columns; the model's action dimension.
    Returns: (horizon, action_dim) float32, standard normal.
    """
    key = np.array([seed % 2**64, tick], dtype=np.uint64)
    bits = np.random.Philox(key=key)
    count = horizon * action_dim
    values = np.empty(0)
    while values.size < count:
        # Four fifths of the pairs are kept, two values each; 3/4 a pair leaves some over.
        values = np.concatenate([values, _normal_pairs(bits, 3 * count // 4 + 16)])
    return values[:count].astype(np.float32).reshape(horizon, action_dim)


def _normal_pairs(bits: np.random.Philox, pairs: int) -> np.ndarray:
    """Return some normal float64 numbers from ``2 * pairs`` words.

    Source: G. Marsaglia, T. A. Bray, A convenient method for generating normal variables, 1964.
    """
    words = bits.random_raw(2 * pairs) >> np.uint64(11)
    points = words.astype(np.float64).reshape(pairs, 2) * 2.0**-52 - 1.0  # in [-1, 1)
    x, y = points[:, 0], points[:, 1]
    squared = x * x + y * y
    inside = (squared > 0.0) & (squared < 1.0)
    radius = squared[inside]
    return (points[inside] * np.sqrt(-2.0 * _log(radius) / radius)[:, None]).ravel()


def _log(x: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of positive float64 numbers, from exact operations only.

    ``x = m * 2**e`` with m near 1; ``log m = 2 * atanh((m - 1) / (m + 1))``, by its series.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, 2.0 * mantissa, mantissa)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = np.zeros_like(x)
    for term in range(_LOG_TERMS - 1, -1, -1):
        series = series * square + 1.0 / (2 * term + 1)
    return (exponent - low) * _LN2 + 2.0 * ratio * series

"""What a pipeline computes on the way, for comparing backends with each other and with openpi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Trace:
    """One inference on the host, all float32.

    Args:
        prefix_embs: (P, W) image tokens of each view, then the prompt.
        keys, values: (L, P, num_kv_heads * D) of the prefix, K after RoPE.
        velocities: (N, H, A) of every Euler step.
        actions: (H, A), normalised.
    """

    prefix_embs: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    velocities: np.ndarray
    actions: np.ndarray


@runtime_checkable
class Traceable(Protocol):
    """A pipeline that can show what it computes; slower than ``infer``, of the same function."""

    def trace(
        self, views: np.ndarray, tokens: np.ndarray, noise: np.ndarray, num_steps: int
    ) -> Trace:
        """Run one inference on views that have the model's size already.

        Args:
            views: (V, px, px, 3) uint8 RGB, without absent views.
            tokens: (T,) int64 without padding.
            noise: (H, A) float32.
            num_steps: N Euler steps.
        """

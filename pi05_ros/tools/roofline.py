"""The least time that each stage can take on a machine: operations and bytes over its ceilings.

Formulas: docs/performance.md. Operations count a multiply and an add as two; bytes count each
weight once per pass, and the K/V cache once per Euler step.
"""

from __future__ import annotations

from dataclasses import dataclass

from pi05_ros.model.config import GemmaConfig, Pi05Config


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do at best: copies (bytes read + written) and matmuls."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Work:
    """Operations and device-memory bytes of a stage."""

    flops: float
    size_bytes: float

    def floor_ms(self, ceilings: Ceilings) -> float:
        """Return the longer of the two times in milliseconds."""
        compute_s = self.flops / ceilings.flops_per_s
        return max(compute_s, self.size_bytes / ceilings.bytes_per_s) * 1e3

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.size_bytes * times)


def vision_work(config: Pi05Config, views: int, item_bytes: int) -> Work:
    """Return the work of SigLIP and the projector."""
    vision, tokens = config.vision, config.vision.tokens_per_view
    patch = 3 * vision.patch_px**2 * vision.width
    layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp_dim
    weights = patch + vision.depth * layer + vision.width * config.vlm.width
    attention = 4 * tokens**2 * vision.width * vision.depth
    return Work(views * (2 * tokens * weights + attention), weights * item_bytes)


def prefill_work(config: Pi05Config, prefix_tokens: int, item_bytes: int) -> Work:
    """Return the work of the language model, whose last layer only fills the cache."""
    vlm, layers = config.vlm, config.vlm.depth - 1
    last = 2 * vlm.num_kv_heads * vlm.head_dim * vlm.width
    weights = layers * _layer_weights(vlm) + last
    attention = layers * 4 * vlm.num_heads * vlm.head_dim * prefix_tokens**2
    return Work(2 * prefix_tokens * weights + attention, weights * item_bytes)


def step_work(config: Pi05Config, prefix_tokens: int, horizon: int, item_bytes: int) -> Work:
    """Return the work of one Euler step of the action expert."""
    expert, keys = config.expert, prefix_tokens + horizon
    weights = expert.depth * _layer_weights(expert)
    attention = expert.depth * 4 * expert.num_heads * expert.head_dim * horizon * keys
    cache = expert.depth * 2 * expert.num_kv_heads * expert.head_dim * keys
    return Work(2 * horizon * weights + attention, (weights + cache) * item_bytes)


def stage_floors_ms(
    config: Pi05Config,
    views: int,
    prompt_tokens: int,
    horizon: int,
    steps: int,
    item_bytes: int,
    ceilings: Ceilings,
) -> dict[str, float]:
    """Return the floor of each stage and of their sum, in milliseconds."""
    prefix = config.prefix_tokens(views, prompt_tokens)
    floors = {
        'vision': vision_work(config, views, item_bytes).floor_ms(ceilings),
        'prefill': prefill_work(config, prefix, item_bytes).floor_ms(ceilings),
        'denoise': (step_work(config, prefix, horizon, item_bytes) * steps).floor_ms(ceilings),
    }
    return {**floors, 'total': sum(floors.values())}


def _layer_weights(gemma: GemmaConfig) -> int:
    heads = 2 * gemma.num_heads + 2 * gemma.num_kv_heads
    return gemma.width * (heads * gemma.head_dim + 3 * gemma.mlp_dim)

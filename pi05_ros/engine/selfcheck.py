"""Does the fast pipeline compute what the oracle computes, on this input, on this machine?

Each stage gets the same input in both: the oracle's prefill reads the fast vision's output, and
its denoise the fast prefill's K and V. So a fault shows in the stage that has it, and the oracle
need not be on the GPU as a whole: its parts are brought there one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pi05_ros.model.checkpoint import Checkpoint, load_model
from pi05_ros.model.gemma import PrefixCache
from pi05_ros.model.images import resize_with_pad, to_pixels
from pi05_ros.model.pi05 import Pi05Model

from .cuda_pipeline import CudaPipeline
from .pipeline import BackendError

# Random full-size weights in bfloat16 agree to 0.9998 and better in every stage (H200); a wrong
# position, mask or norm stays below 0.99.
MIN_COSINE = 0.999


class SelfCheckError(BackendError):
    """A fast stage does not agree with the oracle."""


@dataclass(frozen=True)
class StageCheck:
    """Agreement of one stage: cosine over all its outputs, and the largest difference."""

    stage: str
    cosine: float
    max_abs_error: float

    def __str__(self) -> str:
        return f'{self.stage} cosine {self.cosine:.6f}, largest error {self.max_abs_error:.3g}'


def check_pipeline(
    pipeline: CudaPipeline,
    checkpoint: Checkpoint,
    images: Sequence[np.ndarray],
    tokens: np.ndarray,
    noise: np.ndarray,
    min_cosine: float = MIN_COSINE,
) -> tuple[StageCheck, ...]:
    """Compare each stage with the oracle on one real input.

    Args:
        pipeline: built from ``checkpoint``.
        images, tokens, noise: as for :meth:`Pipeline.infer`.
        min_cosine: below it, or on NaN, the pipeline is refused.
    Raises:
        SelfCheckError: a stage is below ``min_cosine``; the message has the figures of all.
    """
    oracle = load_model(checkpoint, 'cpu', pipeline.precision)
    checks = compare_stages(pipeline, oracle, images, tokens, noise)
    refuse_below(checks, min_cosine)
    return checks


def refuse_below(checks: Sequence[StageCheck], min_cosine: float) -> None:
    """Raise :class:`SelfCheckError` unless every cosine reaches ``min_cosine``."""
    wrong = [check.stage for check in checks if not check.cosine >= min_cosine]
    if wrong:
        figures = '; '.join(str(check) for check in checks)
        raise SelfCheckError(
            f'self-check: {", ".join(wrong)} below the cosine of {min_cosine} against the oracle '
            f"({figures}); use backend 'eager' and report the GPU and driver"
        )


@torch.inference_mode()
def compare_stages(
    pipeline: CudaPipeline,
    oracle: Pi05Model,
    images: Sequence[np.ndarray],
    tokens: np.ndarray,
    noise: np.ndarray,
) -> tuple[StageCheck, ...]:
    """Run both, stage by stage. The oracle's parts stay on the pipeline's device only in turn."""
    device = torch.device(pipeline.device)
    actions = torch.tensor(pipeline.infer(images, tokens, noise).actions, device=device)
    rows = pipeline.prefill.num_image_rows + len(tokens)
    prefix = pipeline.prefill.prefix[:rows]
    keys, values = pipeline.prefill.keys[:, :rows], pipeline.prefill.values[:, :rows]
    px = pipeline.config.vision.image_px
    views = np.stack([resize_with_pad(image, px) for image in images])
    pixels = to_pixels(torch.tensor(views, device=device))
    prompt = oracle.embed_prompt(torch.tensor(tokens, device=oracle.device)).to(device)

    with _Visit(device, oracle.vision, oracle.projector):
        expected = torch.cat([oracle.embed_images(pixels).flatten(0, 1), prompt])
    checks = [_compare('vision', [prefix], [expected])]
    with _Visit(device, oracle.language):
        cache = oracle.prefill(prefix)
    checks.append(_compare('prefill', [keys, values], [cache.keys, cache.values]))
    expert = (oracle.expert, oracle.action_in_proj, oracle.action_out_proj)
    with _Visit(device, *expert, oracle.time_mlp_in, oracle.time_mlp_out):
        fast_cache = PrefixCache(keys.contiguous(), values.contiguous(), None)
        start = torch.tensor(noise, device=device)
        expected, _ = oracle.denoise(start, fast_cache, pipeline.shape.num_steps)
    checks.append(_compare('denoise', [actions], [expected]))
    return tuple(checks)


class _Visit:
    """Parts of the oracle on the GPU for the length of a ``with``, then on the meta device.

    Going back to the host would copy gigabytes that nobody reads again.
    """

    def __init__(self, device: torch.device, *parts: nn.Module) -> None:
        self._device, self._parts = device, parts
        first = next(parts[0].parameters(), None)
        self._stays = first is not None and first.device.type == device.type

    def __enter__(self) -> None:
        for part in self._parts:
            part.to(self._device)

    def __exit__(self, *failure: object) -> None:
        if self._stays:
            return
        for part in self._parts:
            part.to('meta')
        torch.cuda.empty_cache()


def _compare(stage: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> StageCheck:
    first = torch.cat([tensor.double().flatten() for tensor in found])
    second = torch.cat([tensor.double().flatten() for tensor in expected])
    cosine = first @ second / (first.norm() * second.norm())
    return StageCheck(stage, cosine.item(), (first - second).abs().max().item())

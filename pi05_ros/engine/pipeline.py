"""The one interface that every backend implements: raw images and tokens in, actions out.

A pipeline is three stages, run in this order on every call: Vision (images to prefix embeddings),
Prefill (prefix to K/V), Denoise (Euler steps to actions). Nothing computed for one call is used
by the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from pi05_ros.model.config import Pi05Config
from pi05_ros.model.errors import Pi05Error

STAGES = ('vision', 'prefill', 'denoise')
_UINT8 = np.dtype(np.uint8)


class BackendError(Pi05Error):
    """A backend is unknown, cannot run here, or was given a shape it was not built for."""


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of one call, in the order in which they pass. NaN: not measured separately."""

    h2d_ms: float
    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    denoise_ms: float
    d2h_ms: float
    total_ms: float

    def as_dict(self) -> dict[str, float]:
        """Return name -> milliseconds, in this order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class PipelineShape:
    """What a pipeline is built for; a call outside of it is a :class:`BackendError`.

    Args:
        view_sizes_px: (height, width) of each camera's raw image, one per real view, in the
            model's view order. Absent views are not listed: they are dropped, which is lossless.
        max_prompt_tokens: longest prompt that a call may bring.
        horizon: action steps per call.
        num_steps: Euler steps of a call that does not say.
        max_steps: most Euler steps that a call may ask for.
    """

    view_sizes_px: tuple[tuple[int, int], ...]
    max_prompt_tokens: int
    horizon: int
    num_steps: int = 10
    max_steps: int = 10


@dataclass(frozen=True)
class InferenceResult:
    """Normalised actions (H, A) float32 on the host, and where the time went."""

    actions: np.ndarray
    times: StageTimes


class Pipeline(ABC):
    """One loaded model on one device, built for one :class:`PipelineShape`."""

    config: Pi05Config
    shape: PipelineShape
    device: str
    precision: str  # 'bfloat16' or 'float32'

    @property
    @abstractmethod
    def stage_backends(self) -> Mapping[str, str]:
        """Return the backend that runs each of :data:`STAGES`, for the diagnostics."""

    @abstractmethod
    def infer(
        self,
        images: Sequence[np.ndarray],
        tokens: np.ndarray,
        noise: np.ndarray,
        num_steps: int | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> InferenceResult:
        """Run the three stages on one observation.

        Args:
            images: one (h, w, 3) uint8 RGB array per view of ``shape.view_sizes_px``.
            tokens: (T,) int64 prompt tokens without padding, 1 <= T <= max_prompt_tokens.
            noise: (horizon, action_dim) float32, the start of the flow.
            num_steps: Euler steps, at most ``shape.max_steps``; None takes ``shape.num_steps``.
            meanwhile: called once while the device computes, if the host only waits for it; what
                it does must be short against the denoise.
        Raises:
            BackendError: an argument does not fit ``shape``.
        """

    def rehearse(
        self,
        images: Sequence[np.ndarray],
        tokens: np.ndarray,
        noise: np.ndarray,
        num_steps: int | None = None,
    ) -> None:
        """Do what the host does in :meth:`infer` before the stages run, to warm its caches.

        Raises:
            BackendError: as for :meth:`infer`.
        """
        steps = self.shape.num_steps if num_steps is None else num_steps
        self.check_call(images, tokens, noise, steps)

    def image_buffer(self, num_bytes: int) -> np.ndarray:
        """Return memory from which :meth:`infer` reads images fastest: (num_bytes,) uint8.

        It may hold more than the image, which has to be whole rows without padding in it.
        """
        return np.empty(num_bytes, dtype=np.uint8)

    @abstractmethod
    def close(self) -> None:
        """Free the device memory. The pipeline cannot be used afterwards."""

    def check_call(
        self,
        images: Sequence[np.ndarray],
        tokens: np.ndarray,
        noise: np.ndarray,
        num_steps: int,
    ) -> None:
        """Refuse arguments that do not fit :attr:`shape`, naming the one that does not."""
        self.check_images(images)
        self.check_rest(tokens, noise, num_steps)

    def check_images(self, images: Sequence[np.ndarray]) -> None:
        """Refuse images that do not fit :attr:`shape`."""
        sizes = tuple([image.shape[:2] for image in images])
        if sizes != self.shape.view_sizes_px:
            raise BackendError(
                f'images are {sizes} (height, width), the pipeline was built for '
                f'{self.shape.view_sizes_px}; reconfigure to change a camera size'
            )
        for view, image in enumerate(images):
            if image.dtype != _UINT8 or image.ndim != 3 or image.shape[2] != 3:
                raise BackendError(
                    f'view {view}: expected (h, w, 3) uint8, got {image.shape} {image.dtype}'
                )

    def check_rest(self, tokens: np.ndarray, noise: np.ndarray, num_steps: int) -> None:
        """Refuse other arguments that do not fit :attr:`shape`."""
        longest = self.shape.max_prompt_tokens
        if tokens.ndim != 1 or not 1 <= tokens.shape[0] <= longest:
            raise BackendError(f'expected 1 to {longest} prompt tokens, got shape {tokens.shape}')
        expected = (self.shape.horizon, self.config.action_dim)
        if noise.shape != expected or noise.dtype != np.float32:
            found = f'{noise.shape} {noise.dtype}'
            raise BackendError(f'noise must be {expected} float32, got {found}')
        if not 1 <= num_steps <= self.shape.max_steps:
            raise BackendError(f'num_steps {num_steps} is outside 1 to {self.shape.max_steps}')

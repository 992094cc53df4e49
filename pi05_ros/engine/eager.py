"""The oracle behind the pipeline interface: no graphs, no fused kernels, CPU or GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pi05_ros.model.images import resize_with_pad, to_pixels
from pi05_ros.model.pi05 import Pi05Model

from .pipeline import STAGES, BackendError, InferenceResult, Pipeline, PipelineShape, StageTimes
from .trace import Trace


class EagerPipeline(Pipeline):
    """Runs a :class:`Pi05Model` where its weights are, in the precision that they have.

    Times are of the host's clock, which waits for the device between stages. On a CPU the work is
    done by one thread: sums split over threads would depend on how many there are, and so would
    the actions. (A model small enough for a CPU is no faster with more.)
    """

    def __init__(self, model: Pi05Model, shape: PipelineShape) -> None:
        self._model = model
        self.config = model.config
        self.shape = shape
        self.device = str(model.device)
        self.precision = model.precision

    @property
    def stage_backends(self) -> Mapping[str, str]:
        """Return 'eager' for every stage."""
        return dict.fromkeys(STAGES, 'eager')

    @torch.inference_mode()
    def infer(
        self,
        images: Sequence[np.ndarray],
        tokens: np.ndarray,
        noise: np.ndarray,
        num_steps: int | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> InferenceResult:
        """Run the three stages on one observation; see :meth:`Pipeline.infer`.

        The host is busy with each stage, so ``meanwhile`` is not called.
        """
        steps = self.shape.num_steps if num_steps is None else num_steps
        self.check_call(images, tokens, noise, steps)
        self._check_tokens(tokens)
        with _one_thread():
            return self._infer(images, tokens, noise, steps)

    def _infer(
        self, images: Sequence[np.ndarray], tokens: np.ndarray, noise: np.ndarray, steps: int
    ) -> InferenceResult:
        model = self._model
        clock = _Clock(model.device)
        px = self.config.vision.image_px
        views = np.stack([resize_with_pad(image, px) for image in images])
        resize_ms = clock.lap_ms()
        views_, tokens_, noise_ = self._to_device(views, tokens, noise)
        h2d_ms = clock.lap_ms()
        pixels = to_pixels(views_)
        pixels_ms = clock.lap_ms()
        image_tokens = model.embed_images(pixels)
        vision_ms = clock.lap_ms()
        cache = model.prefill(_join(image_tokens, model.embed_prompt(tokens_)))
        prefill_ms = clock.lap_ms()
        actions, _ = model.denoise(noise_, cache, steps)
        denoise_ms = clock.lap_ms()
        result = actions.cpu().numpy()
        d2h_ms = clock.lap_ms()
        times = StageTimes(
            h2d_ms=h2d_ms,
            preprocess_ms=resize_ms + pixels_ms,
            vision_ms=vision_ms,
            prefill_ms=prefill_ms,
            denoise_ms=denoise_ms,
            d2h_ms=d2h_ms,
            total_ms=clock.total_ms(),
        )
        return InferenceResult(result, times)

    @torch.inference_mode()
    def trace(
        self, views: np.ndarray, tokens: np.ndarray, noise: np.ndarray, num_steps: int
    ) -> Trace:
        """Run one inference and return what it computed; see :meth:`Traceable.trace`."""
        self._check_tokens(tokens)
        views_, tokens_, noise_ = self._to_device(views, tokens, noise)
        with _one_thread():
            sample = self._model.sample_actions(to_pixels(views_), tokens_, noise_, num_steps)
        return Trace(
            _to_host(sample.prefix_embs),
            _to_host(sample.keys),
            _to_host(sample.values),
            _to_host(sample.velocities),
            _to_host(sample.actions),
        )

    def close(self) -> None:
        """Free the weights. The pipeline cannot be used afterwards."""
        del self._model
        if self.device.startswith('cuda'):
            torch.cuda.empty_cache()

    def _to_device(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        # torch.tensor copies: nothing computed here shares memory with the caller's arrays.
        return tuple(torch.tensor(array, device=self._model.device) for array in arrays)

    def _check_tokens(self, tokens: np.ndarray) -> None:
        """Refuse ids outside the vocabulary, which would end the process on a GPU."""
        wrong = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if wrong.size:
            raise BackendError(
                f'token {wrong[0]} is outside the vocabulary of {self.config.vocab_size}; '
                'the tokenizer does not belong to this checkpoint'
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one CPU thread within an operator; the setting is restored for everyone else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Host time between points at which the device has finished what it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._last = self._now()

    def lap_ms(self) -> float:
        """Return milliseconds since the last lap."""
        now, last = self._now(), self._last
        self._last = now
        return (now - last) * 1e3

    def total_ms(self) -> float:
        """Return milliseconds from the start to the last lap."""
        return (self._last - self._start) * 1e3

    def _now(self) -> float:
        if self._device.type == 'cuda':
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _join(image_tokens: Tensor, prompt_tokens: Tensor) -> Tensor:
    """Lay image tokens (V, 256, W) and prompt tokens (T, W) behind each other: (P, W)."""
    return torch.cat([image_tokens.flatten(0, 1), prompt_tokens])


def _to_host(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()

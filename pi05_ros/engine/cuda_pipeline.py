"""π0.5 on an NVIDIA GPU: three captured stages over static buffers.

A call enqueues, on one stream: the copy of the raw images to the device, four CUDA graphs
(preprocess, vision, prefill, denoise), one copy back. Images that lie in pinned memory are copied
from there, others are written into such memory before. While vision runs, the host writes what it
does not need, tokens and noise, and a second stream copies that. Nothing is allocated and nothing
waits until the end; what depends on the call (prompt length, step count) is read on the device or
picks one of the graphs captured at the time of building.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from pi05_ros.model.checkpoint import Checkpoint, load_state
from pi05_ros.model.config import Pi05Config

from . import denoise_tuner
from .autotune import TunedKernel, tune
from .denoise import DenoiseStage
from .denoise_tuning import DenoiseTuning
from .graphs import StageClock, StageGraph, make_current
from .hopper_ops import HopperOps, choose_ops
from .limits import check_device, check_limits, check_memory
from .ops import FusedOps
from .pipeline import BackendError, InferenceResult, Pipeline, PipelineShape, StageTimes
from .prefill import PrefillStage
from .preprocess import InputBuffers, PreprocessStage
from .trace import Trace
from .tuning import TunedChoices
from .vision import FoldedVisionStage, VisionStage
from .weights import State, pack_folded_vision, pack_prefill, pack_vision

_log = logging.getLogger(__name__)


class CudaPipeline(Pipeline):
    """The fast backend. One call at a time.

    Args:
        state: checkpoint tensors by openpi key name; taken out as they are packed.
        config: the model's dimensions.
        shape: what to build for.
        precision: 'bfloat16' runs the fused kernels; 'float32' the same stages in plain PyTorch.
        device: a CUDA device.
    Raises:
        BackendError: the GPU, its free memory or the model's shape does not fit; nothing is
            left to fail in a call that fits ``shape``.
    """

    def __init__(
        self,
        state: State,
        config: Pi05Config,
        shape: PipelineShape,
        precision: str = 'bfloat16',
        device: str = 'cuda',
    ) -> None:
        self.config = config
        self.shape = shape
        self.precision = precision
        place = torch.device(device)
        self.device = str(place)
        check_device(place)
        check_limits(config, shape)
        self._clock = StageClock(7)
        with torch.cuda.device(place), torch.inference_mode():
            self._stream, self._side = torch.cuda.Stream(place), torch.cuda.Stream(place)
            self._rest_sent = torch.cuda.Event()
            with torch.cuda.stream(self._stream):
                self._build_stages(state, place)
            self._stream.synchronize()
            self._capture()
        self._on_stream, self._on_side = make_current(self._stream), make_current(self._side)
        self.calls = 0

    @classmethod
    def build(
        cls, checkpoint: Checkpoint, shape: PipelineShape, precision: str, device: str
    ) -> CudaPipeline:
        """Load a checkpoint straight onto the GPU and build its pipeline.

        Raises:
            BackendError: as for the class, found before a weight is read where it can be.
            CheckpointError: the weights cannot be loaded.
        """
        place = torch.device(device)
        check_device(place)
        check_limits(checkpoint.config, shape)
        check_memory(checkpoint.config, shape, precision, place)
        state = load_state(checkpoint, device, precision)
        return cls(state, checkpoint.config, shape, precision, device)

    @property
    def stage_backends(self) -> Mapping[str, str]:
        """Return 'cuda', 'cuda-hopper' where the kernels for Hopper GPUs run, or 'cuda-plain'
        where plain PyTorch runs in the graphs (float32).
        """
        ops, denoise = self._ops.backend, self.denoise.chain.backend
        return {'vision': ops, 'prefill': ops, 'denoise': denoise}

    def infer(
        self,
        images: Sequence[np.ndarray],
        tokens: np.ndarray,
        noise: np.ndarray,
        num_steps: int | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> InferenceResult:
        """Run the captured stages once; see :meth:`Pipeline.infer`.

        What vision needs comes first: behind a pause every line takes the host several times as
        long. Tokens and noise are checked while it runs.
        """
        start = time.perf_counter()
        clock, stream = self._clock, self._stream
        self.check_images(images)
        with self._on_stream:
            clock.mark(0, stream)
            self._inputs.send_images(images)
            self._preprocess_graph.replay()
            self._vision_graph.replay()
        steps = self._send_rest(tokens, noise, num_steps)
        with self._on_stream:
            self._prefill_graphs[self.prefill.bucket(len(tokens))].replay()
            self._denoise_graphs[steps].replay()
        # The denoise still runs then, so the way back is warm for not long before it is taken.
        intervals_ms = clock.intervals_ms(0, 4)
        if meanwhile is not None:
            meanwhile()
        intervals_ms += clock.intervals_ms(4, 6)
        self.calls += 1
        actions = self._host_view.copy()
        total_ms = (time.perf_counter() - start) * 1e3
        times = [*intervals_ms, total_ms]
        return InferenceResult(actions, StageTimes(*times))

    def rehearse(
        self,
        images: Sequence[np.ndarray],
        tokens: np.ndarray,
        noise: np.ndarray,
        num_steps: int | None = None,
    ) -> None:
        """Check a call and go through it up to vision; the next call replaces what is sent."""
        self.check_images(images)
        with self._on_stream:
            self._inputs.send_images(images)
            self._preprocess_graph.replay()
        self._send_rest(tokens, noise, num_steps)

    def image_buffer(self, num_bytes: int) -> np.ndarray:
        """Return page-locked memory; an image in it is copied to the device from there.

        Raises:
            BackendError: the system has no more of it.
        """
        with torch.cuda.device(self.device):
            return self._inputs.image_buffer(num_bytes)

    @torch.inference_mode()
    def trace(
        self, views: np.ndarray, tokens: np.ndarray, noise: np.ndarray, num_steps: int
    ) -> Trace:
        """Run one inference without graphs, keeping what lies between; see :class:`Traceable`.

        Raises:
            BackendError: the pipeline was built for other image sizes than the views have.
        """
        images = list(views)
        self.check_images(images)
        with torch.cuda.stream(self._stream):
            self._inputs.send_images(images)
        self._send_rest(tokens, noise, num_steps)
        with torch.cuda.stream(self._stream):
            self.launch_prefix(self.prefill.bucket(len(tokens)))
            states = [self.denoise.noise.clone(), *self._denoise_states(num_steps)]
        self._stream.synchronize()
        rows = self.prefill.num_image_rows + len(tokens)
        steps = torch.stack(states)
        return Trace(
            prefix_embs=_to_host(self.prefill.prefix[:rows]),
            keys=_to_host(self.prefill.keys[:, :rows]),
            values=_to_host(self.prefill.values[:, :rows]),
            velocities=_to_host((steps[1:] - steps[:-1]) * -float(num_steps)),
            actions=_to_host(steps[-1]),
        )

    def launch_prefix(self, rows: int) -> None:
        """Enqueue preprocess, vision and prefill without graphs, over ``rows`` prefix rows."""
        self.preprocess.launch()
        self.vision.launch()
        self.prefill.launch(rows)

    def tune(self) -> tuple[TunedChoices, list[TunedKernel]]:
        """Time the kernels of vision and of prefills of many lengths; see :mod:`.autotune`.

        Raises:
            BackendError: the pipeline runs in float32, which has nothing to choose.
        """
        if not isinstance(self._ops, FusedOps):
            raise BackendError(f'{self.precision} runs plain PyTorch: there is nothing to tune')
        launches = [self.vision.launch]
        launches += [partial(self.prefill.launch, rows) for rows in self.prefill.tuned_buckets]
        with torch.cuda.device(self.device), torch.inference_mode():
            return tune(self._ops, launches, self._stream)

    def tune_denoise(self, seconds: float = 1800.0) -> tuple[DenoiseTuning, TunedKernel] | None:
        """Time the block sizes of the denoise over the last call's prefix and noise.

        The captured graphs keep the sizes that they had: build a pipeline to use the result.

        Args:
            seconds: what is left of the candidates after this time is not tried.
        Returns:
            The choices to store, and what a step gained; None where the Hopper kernels run,
            which have nothing to choose.
        """
        stage, steps, tried = self.denoise, self.shape.max_steps, []
        if stage.tuning is None:
            return None
        with (
            torch.cuda.device(self.device),
            torch.inference_mode(),
            torch.cuda.stream(self._stream),
        ):
            before_us = denoise_tuner.time_run_us(stage, steps)
            found = denoise_tuner.tune(
                stage, lambda change, outcome: tried.append(outcome), steps, seconds
            )
            after_us = denoise_tuner.time_run_us(stage, steps)
        step = TunedKernel('denoise step', before_us / steps, after_us / steps, len(tried))
        return found, step

    def close(self) -> None:
        """Free graphs, buffers and weights."""
        for name in ('_prefill_graphs', '_denoise_graphs', '_vision_graph', '_preprocess_graph'):
            self.__dict__.pop(name, None)
        for name in ('preprocess', 'vision', 'prefill', 'denoise', '_inputs', '_ops'):
            self.__dict__.pop(name, None)
        torch.cuda.empty_cache()

    def _build_stages(self, state: State, device: torch.device) -> None:
        config, shape = self.config, self.shape
        dtype = getattr(torch, self.precision)
        num_views = len(shape.view_sizes_px)
        image_rows = num_views * config.vision.tokens_per_view
        self._ops = choose_ops(config, image_rows, self.precision, device)
        prefill_weights = pack_prefill(state, config, dtype, device, self._ops)
        # Written by every call, outside of the inference mode, which takes time to enter.
        with torch.inference_mode(False):
            self._inputs = InputBuffers(config, shape, device)
            self._host_actions = torch.empty(shape.horizon, config.action_dim, pin_memory=True)
        self._host_view = self._host_actions.numpy()
        self.prefill = PrefillStage(
            prefill_weights,
            config,
            self._ops,
            num_image_rows=image_rows,
            max_prompt_tokens=shape.max_prompt_tokens,
            lengths=self._inputs.lengths,
            tokens=self._inputs.tokens,
        )
        self.vision = self._build_vision(state, num_views)
        self.denoise = DenoiseStage(
            state,
            config,
            keys=self.prefill.keys,
            values=self.prefill.values,
            n_prefix=self.prefill.num_prefix,
            noise=self._inputs.noise,
            max_steps=shape.max_steps,
            dtype=dtype,
        )
        state.clear()
        self.preprocess = PreprocessStage(config, shape, self._ops, self._inputs, self.vision)

    def _build_vision(self, state: State, num_views: int) -> VisionStage | FoldedVisionStage:
        config, ops, prefix = self.config, self._ops, self.prefill.prefix
        if isinstance(ops, HopperOps):
            folded = pack_folded_vision(
                state, config, prefix.dtype, prefix.device, ops.order_features
            )
            return FoldedVisionStage(folded, config, ops, num_views, prefix)
        weights = pack_vision(state, config, prefix.dtype, prefix.device)
        return VisionStage(weights, config, ops, num_views, prefix)

    def _capture(self) -> None:
        """Capture every graph that a call can need, all sharing one memory pool."""
        pool, stream = torch.cuda.graph_pool_handle(), self._stream
        self._inputs.fill_with_longest(self.prefill.num_image_rows)
        clock = self._clock

        def graph(name: str, launch: Callable[[], None], mark: int) -> StageGraph:
            def launch_and_mark() -> None:
                launch()
                clock.mark(mark, stream)

            return StageGraph(name, launch_and_mark, stream, pool)

        def preprocess() -> None:
            clock.mark(1, stream)
            self.preprocess.launch()

        def denoise(steps: int) -> None:
            self.denoise.launch(steps)
            clock.mark(5, stream)
            self._host_actions.copy_(self.denoise.actions, non_blocking=True)

        self._preprocess_graph = graph('preprocess', preprocess, 2)
        self._vision_graph = graph('vision', self.vision.launch, 3)
        self._prefill_graphs = {
            rows: graph(f'prefill of {rows} rows', partial(self.prefill.launch, rows), 4)
            for rows in self.prefill.buckets
        }
        self._denoise_graphs = {
            steps: graph(f'denoise of {steps} steps', partial(denoise, steps), 6)
            for steps in range(1, self.shape.max_steps + 1)
        }

    def _denoise_states(self, num_steps: int) -> list[torch.Tensor]:
        """Return x_t after each Euler step, (H, A) each."""
        stage, states = self.denoise, []
        stage.launch_begin(num_steps)
        for step in range(num_steps):
            for layer in range(self.config.expert.depth):
                stage.launch_layer(num_steps, step, layer)
            stage.launch_step_end(num_steps, step)
            states.append(stage.actions.clone())
        return states

    def _send_rest(self, tokens: np.ndarray, noise: np.ndarray, num_steps: int | None) -> int:
        """Send what vision does not need, on a stream beside it; the next stage waits for it.

        Returns: the step count of the call.
        Raises:
            BackendError: the call does not fit; the device has done with its images.
        """
        steps = self.shape.num_steps if num_steps is None else num_steps
        try:
            self.check_rest(tokens, noise, steps)
            self._check_tokens(tokens)
        except BackendError:
            self._stream.synchronize()  # the images are the caller's again
            raise
        with self._on_side:
            self._inputs.send_rest(tokens, noise, self.prefill.num_image_rows)
            self._rest_sent.record(self._side)
        self._stream.wait_event(self._rest_sent)
        return steps

    def _check_tokens(self, tokens: np.ndarray) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise BackendError(
                f'token {low if low < 0 else high} is outside the vocabulary of '
                f'{self.config.vocab_size}; the tokenizer does not belong to this checkpoint'
            )


def _to_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()

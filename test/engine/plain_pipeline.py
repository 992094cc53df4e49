"""The CUDA pipeline's vision and prefill over plain operations, for tests on a CPU."""

from __future__ import annotations

import numpy as np
import torch

from pi05_ros.engine.ops import PlainOps
from pi05_ros.engine.pipeline import InferenceResult, PipelineShape, StageTimes
from pi05_ros.engine.prefill import PrefillStage
from pi05_ros.engine.preprocess import InputBuffers, PreprocessStage
from pi05_ros.engine.vision import FoldedVisionStage, VisionStage
from pi05_ros.engine.weights import pack_folded_vision, pack_prefill, pack_vision
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.gemma import PrefixCache
from pi05_ros.model.pi05 import Pi05Model

CPU = torch.device('cpu')


class PlainPipeline:
    """Stages on the CPU in float32; the denoise is the oracle's own.

    Args:
        folded: run the vision whose norms are inside its products.
    """

    device = 'cpu'
    precision = 'float32'

    def __init__(
        self,
        state: dict,
        config: Pi05Config,
        shape: PipelineShape,
        oracle: Pi05Model,
        folded: bool = False,
    ):
        self.config, self.shape, self._oracle = config, shape, oracle
        ops, dtype = PlainOps(), torch.float32
        views = len(shape.view_sizes_px)
        self.inputs = InputBuffers(config, shape, CPU)
        self.prefill = PrefillStage(
            pack_prefill(state, config, dtype, CPU, ops),
            config,
            ops,
            views * config.vision.tokens_per_view,
            shape.max_prompt_tokens,
            self.inputs.lengths,
            self.inputs.tokens,
        )
        prefix = self.prefill.prefix
        if folded:
            folded_weights = pack_folded_vision(state, config, dtype, CPU, ops.order_features)
            self.vision = FoldedVisionStage(folded_weights, config, ops, views, prefix)
        else:
            weights = pack_vision(state, config, dtype, CPU)
            self.vision = VisionStage(weights, config, ops, views, prefix)
        self.preprocess = PreprocessStage(config, shape, ops, self.inputs, self.vision)

    @torch.inference_mode()
    def run_prefix(self, images, tokens, noise, rows: int | None = None) -> int:
        """Fill the prefix and the cache; return the number of valid rows."""
        self.inputs.send_images(images)
        self.inputs.send_rest(tokens, noise, self.prefill.num_image_rows)
        self.preprocess.launch()
        self.vision.launch()
        self.prefill.launch(rows or self.prefill.bucket(len(tokens)))
        return self.prefill.num_image_rows + len(tokens)

    @torch.inference_mode()
    def infer(self, images, tokens, noise, num_steps=None, meanwhile=None) -> InferenceResult:
        rows = self.run_prefix(images, tokens, noise)
        keys, values = self.prefill.keys[:, :rows], self.prefill.values[:, :rows]
        steps = num_steps or self.shape.num_steps
        actions, _ = self._oracle.denoise(
            self.inputs.noise, PrefixCache(keys, values, None), steps
        )
        return InferenceResult(actions.numpy(), StageTimes(*[float('nan')] * 7))


def draw_images(sizes, seed=0) -> list[np.ndarray]:
    """Draw one image per (height, width)."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]

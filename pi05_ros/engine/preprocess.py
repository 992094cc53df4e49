"""The inputs of a call: one pinned buffer, its twin on the device, and the resize to patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pi05_ros.model.config import Pi05Config

from .kernels.resize import make_tables
from .ops import Ops
from .pipeline import PipelineShape
from .vision import VisionStage

_ALIGNMENT_BYTES = 256


class InputBuffers:
    """Raw images, tokens, lengths and noise behind each other, copied to the device at once.

    Attributes (on the device):
        images: (bytes of all views,) uint8. tokens: (max_prompt_tokens,) int32.
        lengths: (2,) int32: prompt tokens, prefix rows. noise: (H, A) float32.
    """

    def __init__(self, config: Pi05Config, shape: PipelineShape, device: torch.device) -> None:
        self._sizes = [height * width * 3 for height, width in shape.view_sizes_px]
        parts = {
            'noise': (torch.float32, (shape.horizon, config.action_dim)),
            'lengths': (torch.int32, (2,)),
            'tokens': (torch.int32, (shape.max_prompt_tokens,)),
            'images': (torch.uint8, (sum(self._sizes),)),
        }
        total, starts = 0, {}
        for name, (dtype, size) in parts.items():
            starts[name] = total
            used = int(np.prod(size)) * dtype.itemsize
            total += -(-used // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == 'cuda')
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        views = {}
        for buffer in (self._host, self._device):
            for name, (dtype, size) in parts.items():
                used = int(np.prod(size)) * dtype.itemsize
                part = buffer[starts[name] : starts[name] + used].view(dtype).view(size)
                views[name, buffer is self._host] = part
        self.images, self.tokens = views['images', False], views['tokens', False]
        self.lengths, self.noise = views['lengths', False], views['noise', False]
        self._host_views = {name: views[name, True].numpy() for name in parts}

    def write(
        self,
        images: Sequence[np.ndarray],
        tokens: np.ndarray,
        noise: np.ndarray,
        num_image_rows: int,
    ) -> None:
        """Copy one call's inputs into the pinned buffer."""
        host, start = self._host_views, 0
        for image, size in zip(images, self._sizes, strict=True):
            host['images'][start : start + size].reshape(image.shape)[...] = image
            start += size
        host['tokens'][: len(tokens)] = tokens
        host['lengths'][:] = len(tokens), num_image_rows + len(tokens)
        host['noise'][...] = noise

    def upload(self) -> None:
        """Enqueue the copy to the device on the current stream."""
        self._device.copy_(self._host, non_blocking=True)

    def fill_with_longest(self, num_image_rows: int) -> None:
        """Put a call of the longest prompt on the device, for captures."""
        longest = len(self._host_views['tokens'])
        self._host_views['lengths'][:] = longest, num_image_rows + longest
        self._device.copy_(self._host)


class PreprocessStage:
    """Resize with padding and the cut into patches; hands the noise to the denoise."""

    def __init__(
        self,
        config: Pi05Config,
        shape: PipelineShape,
        ops: Ops,
        inputs: InputBuffers,
        vision: VisionStage,
        noise: torch.Tensor,
    ) -> None:
        device = inputs.images.device
        px, patch_px = config.vision.image_px, config.vision.patch_px
        self.tables = make_tables(shape.view_sizes_px, px, patch_px, device)
        self.scratch = torch.zeros(self.tables.scratch_bytes, dtype=torch.uint8, device=device)
        self.ops, self.inputs, self.vision, self.noise = ops, inputs, vision, noise

    def launch(self) -> None:
        """Enqueue the stage on the current stream."""
        self.ops.resize_to_patches(
            self.inputs.images,
            self.tables,
            self.scratch,
            self.vision.patches,
            self.vision.weights.patch_copies,
        )
        self.noise.copy_(self.inputs.noise)

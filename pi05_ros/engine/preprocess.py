"""The inputs of a call: pinned buffers, their twins on the device, and the resize to patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

import numpy as np
import torch

from pi05_ros.model.config import Pi05Config

from .kernels.resize import make_tables
from .ops import Ops
from .pipeline import BackendError, PipelineShape
from .vision import VisionBuffers

_ALIGNMENT_BYTES = 256
_UINT8 = np.dtype(np.uint8)
# Two buffers for each of three cameras make eight; more come only of headers of other lengths.
_MAX_PLANS = 64

# Where to on the device, and from where.
Copy = tuple[torch.Tensor, torch.Tensor]
# What a buffer has: elements of a dtype, and their shape.
Part = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """How the images of a call get to the device.

    Args:
        pinned: copies of those in lent memory.
        written: the other views, which the host writes into its own buffer.
        staged: copies of these.
    """

    pinned: list[Copy]
    written: list[int]
    staged: list[Copy]


class PinnedMemory:
    """Memory that was lent to whoever receives images, page-locked on a GPU.

    The borrower's array keeps it alive; when that is gone, it is forgotten here, too.
    """

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._lent: dict[int, ref[np.ndarray]] = {}  # by address

    def lend(self, num_bytes: int) -> np.ndarray:
        """Return (num_bytes,) uint8.

        Raises:
            BackendError: no more memory can be page-locked.
        """
        try:
            tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        except RuntimeError as error:
            raise BackendError(
                f'{num_bytes} bytes of host memory cannot be page-locked for an image: {error}'
            ) from error
        memory = tensor.numpy()
        self._lent = {start: lent for start, lent in self._lent.items() if lent() is not None}
        self._lent[memory.ctypes.data] = ref(memory)
        return memory

    def address_of(self, image: np.ndarray) -> int:
        """Return where an image begins that lies in lent memory, packed; 0 for any other."""
        address = packed_address(image)
        return address if address and self._find(address, image.nbytes) is not None else 0

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """Return (num_bytes,) uint8 of lent memory, which it keeps alive."""
        found = self._find(address, num_bytes)
        assert found is not None, 'the memory was lent'
        start, memory = found
        return torch.from_numpy(memory[address - start : address - start + num_bytes])

    def _find(self, address: int, num_bytes: int) -> tuple[int, np.ndarray] | None:
        for start, lent in self._lent.items():
            memory = lent()
            if memory is not None and start <= address <= start + memory.nbytes - num_bytes:
                return start, memory
        return None


def packed_address(image: np.ndarray) -> int:
    """Return where an image begins whose bytes follow each other without gaps, else 0."""
    if image.dtype != _UINT8 or not image.flags.c_contiguous:
        return 0
    return image.ctypes.data


class InputBuffers:
    """Raw images behind each other, and tokens, lengths and noise: pinned, and on the device.

    Vision needs the images alone, so they have buffers of their own. Those in memory from
    :meth:`image_buffer` are left out of the host's buffer and copied to the device from where they
    are. The others are one copy.

    Attributes (on the device):
        images: (bytes of all views,) uint8. tokens: (max_prompt_tokens,) int32.
        lengths: (2,) int32: prompt tokens, prefix rows. noise: (H, A) float32.
    """

    def __init__(self, config: Pi05Config, shape: PipelineShape, device: torch.device) -> None:
        is_pinned = device.type == 'cuda'
        self._sizes = [height * width * 3 for height, width in shape.view_sizes_px]
        self._starts = [sum(self._sizes[:view]) for view in range(len(self._sizes))]
        self._memory = PinnedMemory(is_pinned)
        self.images = torch.zeros(sum(self._sizes), dtype=torch.uint8, device=device)
        self._host_images = torch.zeros(sum(self._sizes), dtype=torch.uint8, pin_memory=is_pinned)
        self._staged_images = self._host_images.numpy()
        parts: list[Part] = [
            (torch.float32, (shape.horizon, config.action_dim)),
            (torch.int32, (2,)),
            (torch.int32, (shape.max_prompt_tokens,)),
        ]
        num_bytes = sum(_aligned_bytes(part) for part in parts)
        self._rest = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._host_rest = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self.noise, self.lengths, self.tokens = _split(self._rest, parts)
        views = [view.numpy() for view in _split(self._host_rest, parts)]
        self._host_noise, self._host_lengths, self._host_tokens = views
        # By the addresses of the images in pinned memory. The slices of a call would take longer
        # than its copies; there are few, as buffers are.
        self._plans: dict[tuple[int, ...], Plan] = {}

    def image_buffer(self, num_bytes: int) -> np.ndarray:
        """Return (num_bytes,) uint8 from which images need not be written.

        Raises:
            BackendError: no more memory can be page-locked.
        """
        self._plans.clear()  # they keep memory alive that nobody may need any more
        return self._memory.lend(num_bytes)

    def place_images(self, images: Sequence[np.ndarray]) -> Plan:
        """Do the host's part of :meth:`send_images`; return the copies, which are not enqueued."""
        plan = self._find_plan(images)
        self._write_images(images, plan.written)
        return plan

    def send_images(self, images: Sequence[np.ndarray]) -> None:
        """Enqueue the copies of the images to the device.

        Those in lent memory have to stay as they are until the device has them; it is busy with
        them while the host writes the others.
        """
        plan = self._find_plan(images)
        _enqueue(plan.pinned)
        self._write_images(images, plan.written)
        _enqueue(plan.staged)

    def send_rest(self, tokens: np.ndarray, noise: np.ndarray, num_image_rows: int) -> None:
        """Write the other inputs and enqueue their copy."""
        self._host_tokens[: len(tokens)] = tokens
        self._host_lengths[0] = len(tokens)
        self._host_lengths[1] = num_image_rows + len(tokens)
        self._host_noise[...] = noise
        self._rest.copy_(self._host_rest, non_blocking=True)

    def _find_plan(self, images: Sequence[np.ndarray]) -> Plan:
        addresses = tuple(map(packed_address, images))
        # A plan keeps the memory that it reads alive, so at an address of a plan lies that memory.
        plan = self._plans.get(addresses)
        if plan is None:
            addresses = tuple(map(self._memory.address_of, images))
            plan = self._plans.get(addresses) or self._add_plan(addresses)
        return plan

    def _write_images(self, images: Sequence[np.ndarray], views: Sequence[int]) -> None:
        """Write images of these views into the host's buffer."""
        for view in views:
            start, image = self._starts[view], images[view]
            target = self._staged_images[start : start + image.nbytes]
            target.reshape(image.shape)[...] = image

    def _add_plan(self, addresses: tuple[int, ...]) -> Plan:
        """Return the fewest copies; what is not at an address comes from the host's buffer."""
        pinned: list[Copy] = []
        staged: list[Copy] = []
        planned = end = 0
        for address, size in zip(addresses, self._sizes, strict=True):
            start, end = end, end + size
            if not address:
                continue
            if planned < start:
                staged.append((self.images[planned:start], self._host_images[planned:start]))
            pinned.append((self.images[start:end], self._memory.tensor(address, size)))
            planned = end
        if planned < end:
            staged.append((self.images[planned:end], self._host_images[planned:end]))
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        written = [view for view, address in enumerate(addresses) if not address]
        self._plans[addresses] = Plan(pinned, written, staged)
        return self._plans[addresses]

    def fill_with_longest(self, num_image_rows: int) -> None:
        """Put a call of the longest prompt on the device, for captures."""
        longest = len(self._host_tokens)
        self._host_lengths[:] = longest, num_image_rows + longest
        self._rest.copy_(self._host_rest)


def _aligned_bytes(part: Part) -> int:
    dtype, size = part
    used = math.prod(size) * dtype.itemsize
    return -(-used // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _split(buffer: torch.Tensor, parts: Sequence[Part]) -> list[torch.Tensor]:
    """Return a view of the bytes for each part, at aligned addresses behind each other."""
    views, start = [], 0
    for dtype, size in parts:
        used = math.prod(size) * dtype.itemsize
        views.append(buffer[start : start + used].view(dtype).view(size))
        start += _aligned_bytes((dtype, size))
    return views


def _enqueue(copies: Sequence[Copy]) -> None:
    for target, source in copies:
        target.copy_(source, non_blocking=True)


class PreprocessStage:
    """Resize with padding and the cut into patches."""

    def __init__(
        self,
        config: Pi05Config,
        shape: PipelineShape,
        ops: Ops,
        inputs: InputBuffers,
        vision: VisionBuffers,
    ) -> None:
        device = inputs.images.device
        px, patch_px = config.vision.image_px, config.vision.patch_px
        self.tables = make_tables(shape.view_sizes_px, px, patch_px, device)
        self.scratch = torch.zeros(self.tables.scratch_bytes, dtype=torch.uint8, device=device)
        self.ops, self.inputs, self.vision = ops, inputs, vision

    def launch(self) -> None:
        """Enqueue the stage on the current stream."""
        self.ops.resize_to_patches(
            self.inputs.images,
            self.tables,
            self.scratch,
            self.vision.patches,
            self.vision.patch_copies,
        )

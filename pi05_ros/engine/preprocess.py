"""The inputs of a call: one pinned buffer, its twin on the device, and the resize to patches."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Plan:
    """The copies of a call: of the images in pinned memory, then of what the host writes."""

    pinned: list[Copy]
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
    """Raw images, tokens, lengths and noise behind each other, copied to the device at once.

    Images in memory from :meth:`image_buffer` are left out of the host's buffer and copied to the
    device from where they are.

    Attributes (on the device):
        images: (bytes of all views,) uint8. tokens: (max_prompt_tokens,) int32.
        lengths: (2,) int32: prompt tokens, prefix rows. noise: (H, A) float32.
    """

    def __init__(self, config: Pi05Config, shape: PipelineShape, device: torch.device) -> None:
        self._sizes = [height * width * 3 for height, width in shape.view_sizes_px]
        self._memory = PinnedMemory(is_pinned=device.type == 'cuda')
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
        self._images_start = starts['images']
        # By the addresses of the images in pinned memory. The slices of a call would take longer
        # than its copies; there are few, as buffers are.
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._plan = Plan([], [(self._device, self._host)])

    def image_buffer(self, num_bytes: int) -> np.ndarray:
        """Return (num_bytes,) uint8 from which images need not be written.

        Raises:
            BackendError: no more memory can be page-locked.
        """
        self._plans.clear()  # they keep memory alive that nobody may need any more
        return self._memory.lend(num_bytes)

    def place_images(self, images: Sequence[np.ndarray]) -> None:
        """Write what is not in pinned memory, and find out what is to be copied from where.

        Part of :meth:`send_images`, which enqueues the copies.
        """
        addresses = tuple(map(packed_address, images))
        # A plan keeps the memory that it reads alive, so at an address of a plan lies that memory.
        plan = self._plans.get(addresses)
        if plan is None or not all(addresses):
            addresses = tuple(map(self._memory.address_of, images))
            self._write_images(images, addresses)
            plan = self._plans.get(addresses) or self._add_plan(addresses)
        self._plan = plan

    def send_images(self, images: Sequence[np.ndarray]) -> None:
        """Enqueue the copies of those images to the device that lie in pinned memory.

        They have to stay as they are until the device has them. It is busy with them while the
        host writes the rest, of which the other images are a part.
        """
        self.place_images(images)
        _enqueue(self._plan.pinned)

    def send_rest(self, tokens: np.ndarray, noise: np.ndarray, num_image_rows: int) -> None:
        """Write the other inputs and enqueue the copy of all that the host wrote."""
        host = self._host_views
        host['tokens'][: len(tokens)] = tokens
        host['lengths'][0] = len(tokens)
        host['lengths'][1] = num_image_rows + len(tokens)
        host['noise'][...] = noise
        _enqueue(self._plan.staged)

    def _write_images(self, images: Sequence[np.ndarray], addresses: Sequence[int]) -> None:
        """Write the images without an address into the host's buffer."""
        start = 0
        for image, address, size in zip(images, addresses, self._sizes, strict=True):
            if not address:
                target = self._host_views['images'][start : start + size]
                target.reshape(image.shape)[...] = image
            start += size

    def _add_plan(self, addresses: tuple[int, ...]) -> Plan:
        """Return the fewest copies; what is not at an address comes from the host's buffer."""
        pinned: list[Copy] = []
        staged: list[Copy] = []
        planned, end = 0, self._images_start
        for address, size in zip(addresses, self._sizes, strict=True):
            start, end = end, end + size
            if not address:
                continue
            if planned < start:
                staged.append((self._device[planned:start], self._host[planned:start]))
            pinned.append((self._device[start:end], self._memory.tensor(address, size)))
            planned = end
        if planned < end:
            staged.append((self._device[planned:end], self._host[planned:end]))
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        self._plans[addresses] = Plan(pinned, staged)
        return self._plans[addresses]

    def fill_with_longest(self, num_image_rows: int) -> None:
        """Put a call of the longest prompt on the device, for captures."""
        longest = len(self._host_views['tokens'])
        self._host_views['lengths'][:] = longest, num_image_rows + longest
        self._device.copy_(self._host)


def _enqueue(copies: Sequence[Copy]) -> None:
    for target, source in copies:
        target.copy_(source, non_blocking=True)


class PreprocessStage:
    """Resize with padding and the cut into patches; hands the noise to the denoise."""

    def __init__(
        self,
        config: Pi05Config,
        shape: PipelineShape,
        ops: Ops,
        inputs: InputBuffers,
        vision: VisionBuffers,
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
            self.vision.patch_copies,
        )
        self.noise.copy_(self.inputs.noise)

"""The inputs of a call: which memory each image is copied from. The same logic runs on a GPU."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from pi05_ros.engine.pipeline import PipelineShape
from pi05_ros.engine.preprocess import InputBuffers
from pi05_ros.model.config import Pi05Config

CONFIG = Pi05Config.tiny()
SIZES_PX = ((4, 6), (3, 5), (4, 6))
HORIZON, MAX_TOKENS = 5, 20
TOKENS = np.arange(1, 8)
NOISE = np.random.default_rng(1).standard_normal((HORIZON, CONFIG.action_dim)).astype(np.float32)
# Where the pixels begin in a message, which is at no round address.
HEADER_BYTES = 57


@pytest.fixture
def buffers() -> InputBuffers:
    shape = PipelineShape(SIZES_PX, MAX_TOKENS, HORIZON)
    return InputBuffers(CONFIG, shape, torch.device('cpu'))


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES_PX]


def lend(buffers: InputBuffers, image: np.ndarray) -> np.ndarray:
    """Return the image as it lies in a message that was received into lent memory."""
    memory = buffers.image_buffer(image.nbytes + 100)
    memory[HEADER_BYTES : HEADER_BYTES + image.nbytes] = image.ravel()
    payload = memoryview(memory)[: HEADER_BYTES + image.nbytes].toreadonly()
    return np.ndarray(image.shape, np.uint8, buffer=payload, offset=HEADER_BYTES)


def send(buffers: InputBuffers, images: list[np.ndarray]) -> None:
    buffers.send_images(images)
    buffers.send_rest(TOKENS, NOISE, num_image_rows=8)


def staged(buffers: InputBuffers) -> np.ndarray:
    """Return what the host's buffer has for the images."""
    return buffers._staged_images.copy()


def assert_arrived(buffers: InputBuffers, images: list[np.ndarray]) -> None:
    expected = np.concatenate([image.ravel() for image in images])
    np.testing.assert_array_equal(buffers.images.numpy(), expected)
    np.testing.assert_array_equal(buffers.tokens.numpy()[: len(TOKENS)], TOKENS)
    np.testing.assert_array_equal(buffers.lengths.numpy(), [len(TOKENS), 8 + len(TOKENS)])
    np.testing.assert_array_equal(buffers.noise.numpy(), NOISE)


@pytest.mark.parametrize('lent', [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_the_device_gets_the_same_bytes_wherever_the_images_lie(buffers, images, lent):
    given = [lend(buffers, im) if i in lent else im for i, im in enumerate(images)]
    send(buffers, given)
    assert_arrived(buffers, images)
    ends = np.cumsum([0] + [image.nbytes for image in images])
    for index in range(3):
        part = staged(buffers)[ends[index] : ends[index + 1]]
        assert part.any() == (index not in lent)


@pytest.mark.parametrize(
    ('lent', 'copies'), [((), 1), ((0,), 2), ((1,), 3), ((2,), 2), ((0, 1, 2), 3)], ids=str
)
def test_what_lies_together_is_one_copy(buffers, images, lent, copies):
    given = [lend(buffers, im) if i in lent else im for i, im in enumerate(images)]
    plan = buffers.place_images(given)
    assert len(plan.pinned) == len(lent)
    assert len(plan.pinned + plan.staged) == copies


@pytest.mark.parametrize('lent', [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_images_in_lent_memory_are_sent_before_others_are_written(
    buffers, images, lent, monkeypatch
):
    given = [lend(buffers, im) if i in lent else im for i, im in enumerate(images)]
    ends = np.cumsum([0] + [image.nbytes for image in images])
    write, arrived = buffers._write_images, []

    def look_and_write(*arguments):
        parts = [buffers.images.numpy()[ends[i] : ends[i + 1]] for i in range(3)]
        arrived.extend(
            np.array_equal(part, im.ravel()) for part, im in zip(parts, images, strict=True)
        )
        write(*arguments)

    monkeypatch.setattr(buffers, '_write_images', look_and_write)
    send(buffers, given)
    assert arrived == [index in lent for index in range(3)]
    assert_arrived(buffers, images)


def test_a_lent_image_after_a_plain_one_and_back(buffers, images):
    other = [255 - image for image in images]
    for given, expected in (
        ([lend(buffers, image) for image in images], images),
        (other, other),
        ([lend(buffers, images[0]), *other[1:]], [images[0], *other[1:]]),
    ):
        send(buffers, given)
        assert_arrived(buffers, expected)


def test_an_image_with_row_padding_or_other_order_goes_through_the_hosts_buffer(buffers, images):
    memory = buffers.image_buffer(200)
    rows = memory[:80].reshape(4, 20)
    rows[:, :18] = images[0].reshape(4, 18)
    padded = np.ndarray((4, 6, 3), np.uint8, buffer=memory, strides=(20, 3, 1))
    reversed_channels = lend(buffers, images[1][:, :, ::-1].copy())[:, :, ::-1]
    given = [padded, reversed_channels, images[2]]
    send(buffers, given)
    assert_arrived(buffers, images)
    plan = buffers.place_images(given)
    assert len(plan.staged) == 1 and not plan.pinned


def test_memory_is_given_back_with_the_next_that_is_lent(buffers, images):
    image = lend(buffers, images[0])
    owner = weakref.ref(next(iter(buffers._memory._lent.values()))())
    gc.collect()
    send(buffers, [image, *images[1:]])
    assert not staged(buffers)[: image.nbytes].any()
    del image
    send(buffers, images)
    other = buffers.image_buffer(100)
    gc.collect()
    assert owner() is None
    assert list(buffers._memory._lent) == [other.ctypes.data]


def test_an_image_that_only_overlaps_lent_memory_is_not_taken_from_it(buffers, images):
    memory = buffers.image_buffer(200)
    inside = memory[:72].reshape(4, 6, 3)
    inside[...] = images[0]
    outside = np.ndarray((3, 5, 3), np.uint8, buffer=np.arange(45, dtype=np.uint8))
    address_of = buffers._memory.address_of
    assert address_of(inside) == memory.ctypes.data
    assert address_of(outside) == 0
    assert address_of(memory.view(np.int16)) == 0
    beyond = np.lib.stride_tricks.as_strided(memory, (201,))  # never read
    assert address_of(beyond) == 0


def test_headers_of_ever_other_lengths_do_not_pile_up(buffers, images):
    memory = buffers.image_buffer(1000)
    for first in range(200):
        image = memory[first : first + 72].reshape(4, 6, 3)
        image[...] = images[0]
        send(buffers, [image, *images[1:]])
        assert_arrived(buffers, images)
    assert len(buffers._plans) <= 64

"""GPU resize against Pillow: bit for bit, for many sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pi05_ros.engine.kernels.resize import (
    letterbox,
    make_tables,
    resize_plain,
    resize_to_patches,
    resize_to_patches_plain,
)
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.model.images import resize_with_pad

SIZES = [(480, 640), (256, 256), (224, 224), (240, 424), (720, 1280), (100, 37), (223, 225)]
SIZES += [(1, 1), (3, 224), (1080, 1920), (448, 448), (225, 224), (600, 601)]


def two_passes(image, height, width):
    """Resize with Pillow, the horizontal pass first.

    Pillow up to 12 always works in this order; 13 takes the other one where the height shrinks
    much more than the width, which can differ by one.
    """
    wide = Image.fromarray(image).resize((width, image.shape[0]), Image.BILINEAR)
    return np.asarray(wide.resize((width, height), Image.BILINEAR))


def draw_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize('size', SIZES, ids=lambda size: f'{size[0]}x{size[1]}')
def test_the_twin_equals_pillow(size):
    image = draw_image(*size)
    box = letterbox(*size, 224)
    expected = Image.fromarray(image).resize((box.width_px, box.height_px), Image.BILINEAR)
    found = resize_plain(torch.from_numpy(image), box.height_px, box.width_px)
    assert np.array_equal(found.numpy(), np.asarray(expected))


def test_the_twin_equals_pillow_at_drawn_sizes():
    random = np.random.default_rng(5)
    for index in range(40):
        height, width, new_height, new_width = (int(n) for n in random.integers(1, 150, 4))
        image = draw_image(height, width, index)
        found = resize_plain(torch.from_numpy(image), new_height, new_width)
        expected = two_passes(image, new_height, new_width)
        assert np.array_equal(found.numpy(), expected), (height, width, new_height, new_width)


@pytest.mark.parametrize('run', [resize_to_patches, resize_to_patches_plain])
def test_patches_are_those_of_the_letterboxed_image(run, device):
    sizes, canvas_px, patch_px = [(30, 40), (28, 28), (50, 30)], 28, 14
    images = [draw_image(*size, seed) for seed, size in enumerate(sizes)]
    tables = make_tables(sizes, canvas_px, patch_px, device)
    raw = torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(device)
    scratch = torch.zeros(tables.scratch_bytes, dtype=torch.uint8, device=device)
    features = 3 * patch_px**2
    patches = torch.full((3 * 4, 2 * features + 8), -1.0, device=device)
    run(raw, tables, scratch, patches, 2)
    side = canvas_px // patch_px
    expected = []
    for image in images:
        canvas = resize_with_pad(image, canvas_px)
        cells = canvas.reshape(side, patch_px, side, patch_px, 3).transpose(0, 2, 4, 1, 3)
        expected.append(cells.reshape(side * side, features))
    expected = np.concatenate(expected).astype(np.float32)
    found = patches.cpu().numpy()
    assert np.array_equal(found[:, :features], expected)
    assert np.array_equal(found[:, features : 2 * features], expected)
    assert (found[:, 2 * features :] == -1.0).all()


def test_an_elongated_image_is_refused():
    with pytest.raises(BackendError, match='10x4000 px is too elongated to fit 224x224'):
        letterbox(10, 4000, 224)

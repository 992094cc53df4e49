from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pi05_ros.model.images import ImageError, fitted_size, resize_with_pad, to_pixels


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def openpi_resize(image: np.ndarray, px: int) -> np.ndarray:
    """The same with Pillow alone, in the order of operations of openpi's image_tools.py."""
    picture = Image.fromarray(image)
    ratio = max(picture.width / px, picture.height / px)
    size = (int(picture.width / ratio), int(picture.height / ratio))
    scaled = picture.resize(size, resample=Image.BILINEAR)
    canvas = Image.new('RGB', (px, px), 0)
    canvas.paste(scaled, (int((px - size[0]) / 2), int((px - size[1]) / 2)))
    return np.asarray(canvas)


@pytest.mark.parametrize(
    'height,width',
    [(480, 640), (640, 480), (256, 256), (720, 1280), (100, 50), (225, 223), (37, 224), (1, 3)],
)
def test_resize_is_that_of_pillow(height: int, width: int):
    image = random_image(height, width)
    np.testing.assert_array_equal(resize_with_pad(image, 224), openpi_resize(image, 224))


def test_every_size_fits_and_touches_two_sides():
    """Truncation of a float quotient may leave a side one pixel short, never more."""
    for height in range(1, 1100, 7):
        for width in (224, 333, 640, 1081):
            new_height, new_width = fitted_size(height, width, 224)
            assert 223 <= max(new_height, new_width) <= 224


def test_an_image_of_the_right_size_is_untouched():
    image = random_image(224, 224)
    assert resize_with_pad(image, 224) is image


def test_a_view_into_a_larger_buffer_is_accepted():
    image = random_image(300, 500)
    view = image[10:200:1, 20:300, ::-1]
    np.testing.assert_array_equal(
        resize_with_pad(view, 224), openpi_resize(np.ascontiguousarray(view), 224)
    )


def test_padding_is_black_which_is_minus_one():
    pixels = to_pixels(torch.from_numpy(resize_with_pad(random_image(112, 224), 224))[None])
    assert pixels.shape == (1, 3, 224, 224)
    assert (pixels[:, :, :56] == -1).all()
    assert (pixels[:, :, -56:] == -1).all()


def test_pixels_are_scaled_in_the_order_divide_double_subtract():
    values = torch.arange(256, dtype=torch.uint8)
    pixels = to_pixels(values.view(1, 16, 16, 1).expand(1, 16, 16, 3))
    expected = np.arange(256, dtype=np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
    np.testing.assert_array_equal(pixels[0, 0].flatten().numpy(), expected)


@pytest.mark.parametrize(
    'image',
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=['grey', 'rgba', 'float', 'empty'],
)
def test_what_is_no_rgb_image_is_refused(image: np.ndarray):
    with pytest.raises(ImageError, match=r'expected an image \(h, w, 3\) uint8'):
        resize_with_pad(image, 224)


def test_an_image_that_would_vanish_is_refused():
    with pytest.raises(ImageError, match='2x1000 px is too elongated to fit 224x224 px'):
        resize_with_pad(random_image(2, 1000), 224)

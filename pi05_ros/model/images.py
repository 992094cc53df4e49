"""Camera images to the pixels that the model was trained on (openpi image_tools.py)."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from .errors import Pi05Error


class ImageError(Pi05Error):
    """An image cannot be brought to the model's size."""


def fitted_size(height: int, width: int, px: int) -> tuple[int, int]:
    """Return the (height, width) of an image scaled to fit a square of ``px`` pixels.

    The arithmetic (float division, then truncation) is openpi's, with its quirk that a side may
    come out one pixel short.
    """
    ratio = max(width / px, height / px)
    return int(height / ratio), int(width / ratio)


def resize_with_pad(image: np.ndarray, px: int) -> np.ndarray:
    """Scale an image to fit a square and centre it on black, exactly as openpi does.

    Args:
        image: (h, w, 3) uint8.
        px: side of the square in pixels.
    Returns:
        (px, px, 3) uint8; the input itself where it has this size already.
    Raises:
        ImageError: not (h, w, 3) uint8, or so elongated that a side would vanish.
    Source: Pillow's antialiased fixed-point bilinear filter; openpi-client image_tools.py.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(f'expected an image (h, w, 3) uint8, got {image.shape} {image.dtype}')
    height, width = image.shape[:2]
    if (height, width) == (px, px):
        return image
    new_height, new_width = fitted_size(height, width, px)
    if not new_height or not new_width:
        raise ImageError(f'image of {height}x{width} px is too elongated to fit {px}x{px} px')
    # One axis per call, the width first: Pillow from 13 on takes the height first where it shrinks
    # far more than the width, which rounds otherwise than the versions that openpi is used with.
    scaled = Image.fromarray(image).resize((new_width, height), Image.Resampling.BILINEAR)
    scaled = scaled.resize((new_width, new_height), Image.Resampling.BILINEAR)
    canvas = np.zeros((px, px, 3), np.uint8)
    top, left = (px - new_height) // 2, (px - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = np.asarray(scaled)
    return canvas


def to_pixels(images: Tensor) -> Tensor:
    """Map views (V, px, px, 3) uint8 to (V, 3, px, px) float32 in [-1, 1]."""
    return (images.float() / 255.0 * 2.0 - 1.0).permute(0, 3, 1, 2).contiguous()

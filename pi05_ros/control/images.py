"""From image messages to RGB pixels, with a named reason for everything that cannot be used."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image, features

from .cdr import CompressedImageMessage, ImageMessage
from .reasons import InputFault, Reason

# Bytes per pixel of the encodings that are read without a conversion library.
NATIVE_ENCODINGS = {'rgb8': 3, 'bgr8': 3, 'rgba8': 4, 'bgra8': 4, 'mono8': 1}
# Where red, green and blue are in a pixel of those that are not RGB already.
_RGB_CHANNELS = {'bgr8': (2, 1, 0), 'rgba8': (0, 1, 2), 'bgra8': (2, 1, 0), 'mono8': (0, 0, 0)}

# Converts the raw CDR of a sensor_msgs/Image of any other encoding to (h, w, 3) uint8 RGB.
ForeignDecoder = Callable[[bytes | memoryview], np.ndarray]

# A few kilobytes of PNG can claim gigabytes of pixels; no camera of a robot is larger than this.
MAX_DECODED_PX = 32_000_000
# _check_file refuses far smaller images than those that Pillow warns of.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
_FILE_FORMATS = ('JPEG', 'PNG', 'WEBP')
_FILE_MODES = ('RGB', 'RGBA', 'L')
# A progressive JPEG has about ten scans. Each costs the time of a whole image, however few bytes
# it has, so that thousands of them would hold up the tick for seconds.
_START_OF_JPEG, _START_OF_SCAN = b'\xff\xd8', b'\xff\xda'
_MAX_SCANS = 100


def decoder_name() -> str:
    """Name what decodes compressed images: other decoders give slightly other pixels."""
    turbo = features.version('libjpeg_turbo')
    return f'Pillow {PIL.__version__}' + (f', libjpeg-turbo {turbo}' if turbo else '')


def pixels(image: ImageMessage) -> np.ndarray:
    """Return a raw image as RGB; a view of the message where that has RGB in it.

    Returns:
        (h, w, 3) uint8. Of rgb8 a read-only view, possibly with row padding: check
        ``flags.c_contiguous`` before handing it to code that needs plain memory.
    Raises:
        InputFault: the encoding is not one of :data:`NATIVE_ENCODINGS`, the image is empty, or
            ``step`` and the buffer do not fit its size.
    """
    channels = NATIVE_ENCODINGS.get(image.encoding)
    if channels is None:
        raise InputFault(
            Reason.BAD_ENCODING,
            f'encoding {image.encoding!r} is not one of {", ".join(NATIVE_ENCODINGS)}',
        )
    check_layout(image, channels)
    view = np.ndarray(
        (image.height, image.width, channels),
        dtype=np.uint8,
        buffer=image.data,
        strides=(image.step, channels, 1),
    )
    if image.encoding == 'rgb8':
        return view
    rgb = np.empty((image.height, image.width, 3), dtype=np.uint8)
    # One plane after the other: NumPy copies a plane in loops over long rows, but a whole image
    # of reversed or cut pixels in loops of three bytes, which takes four times as long.
    for target, source in enumerate(_RGB_CHANNELS[image.encoding]):
        rgb[:, :, target] = view[:, :, source]
    return rgb


def check_layout(image: ImageMessage, channels: int) -> None:
    """Refuse an image whose size, ``step`` and buffer contradict each other."""
    height, width, step = image.height, image.width, image.step
    if height == 0 or width == 0:
        raise InputFault(Reason.BAD_IMAGE_SIZE, f'image is empty ({height}x{width})')
    if step < width * channels:
        raise InputFault(
            Reason.BAD_STEP,
            f'step {step} is shorter than a row of {width} {image.encoding} pixels '
            f'({width * channels} bytes)',
        )
    expected = step * height
    if len(image.data) < expected:
        raise InputFault(
            Reason.SHORT_BUFFER,
            f'buffer has {len(image.data)} bytes, step * height is {expected}',
        )
    if len(image.data) > expected:
        raise InputFault(
            Reason.BAD_STEP,
            f'buffer has {len(image.data)} bytes, more than step * height = {expected}',
        )


def decode(
    message: CompressedImageMessage, expected_size_px: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode a JPEG, PNG or WebP image to RGB.

    Args:
        expected_size_px: (height, width); another size is refused before anything is decoded.
    Returns: (h, w, 3) uint8, contiguous.
    Raises:
        InputFault: not an image of these formats, damaged, of another size, or not 8 bit.
    """
    data = bytes(message.data)
    try:
        with Image.open(io.BytesIO(data), formats=_FILE_FORMATS) as file:
            _check_file(file, expected_size_px)
            _check_scans(data)
            return np.asarray(file.convert('RGB'))
    except InputFault:
        raise
    except Exception as error:  # decoders of damaged files raise whatever their parsers do
        raise InputFault(
            Reason.UNDECODABLE_IMAGE,
            f'compressed image (format {message.format!r}, {len(message.data)} bytes) '
            f'cannot be decoded: {error}',
        ) from error


def _check_file(file: Image.Image, expected_size_px: tuple[int, int] | None) -> None:
    """Look at the header of an opened file, before its pixels are read."""
    size_px = (file.height, file.width)
    if expected_size_px is not None and size_px != expected_size_px:
        raise size_fault(size_px, expected_size_px)
    if file.height * file.width > MAX_DECODED_PX:
        raise InputFault(
            Reason.BAD_IMAGE_SIZE,
            f'compressed image claims {file.height}x{file.width} pixels, '
            f'more than {MAX_DECODED_PX}',
        )
    if file.mode not in _FILE_MODES:
        raise InputFault(
            Reason.BAD_ENCODING,
            f'compressed image has mode {file.mode}, expected one of {", ".join(_FILE_MODES)}',
        )


def _check_scans(data: bytes) -> None:
    # Within a scan 0xff is always followed by zero or a restart marker.
    scans = data.count(_START_OF_SCAN) if data.startswith(_START_OF_JPEG) else 0
    if scans > _MAX_SCANS:
        raise InputFault(
            Reason.UNDECODABLE_IMAGE, f'JPEG image of {scans} scans, more than {_MAX_SCANS}'
        )


def size_fault(size_px: tuple[int, int], expected_px: tuple[int, int]) -> InputFault:
    """Say that an image has another (height, width) than the node was configured with."""
    return InputFault(
        Reason.BAD_IMAGE_SIZE,
        f'image is {size_px[0]}x{size_px[1]}, configured for {expected_px[0]}x{expected_px[1]} '
        f'(height x width); reconfigure to use another size',
    )

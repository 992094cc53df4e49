"""Pixels of every supported encoding, and a named reason for everything else."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import compressed_cdr, image_cdr
from PIL import Image

from pi05_ros.control.cdr import parse_compressed_image, parse_image
from pi05_ros.control.images import MAX_DECODED_PX, decode, decoder_name, pixels
from pi05_ros.control.reasons import InputFault, Reason

H, W = 3, 5
RGB = np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3)
ALPHA = np.full((H, W, 1), 7, dtype=np.uint8)

ENCODED = {
    'rgb8': RGB,
    'bgr8': RGB[:, :, ::-1],
    'rgba8': np.concatenate([RGB, ALPHA], axis=2),
    'bgra8': np.concatenate([RGB[:, :, ::-1], ALPHA], axis=2),
}


def padded(rows: np.ndarray, padding: int) -> bytes:
    """Return the rows with some bytes behind each."""
    flat = rows.reshape(rows.shape[0], -1)
    return np.pad(flat, ((0, 0), (0, padding)), constant_values=255).tobytes()


def read(data: bytes, encoding: str = 'rgb8', step: int | None = None, size=(H, W)) -> np.ndarray:
    return pixels(parse_image(image_cdr(data, *size, encoding=encoding, step=step)))


@pytest.mark.parametrize('padding', [0, 1, 16], ids=['packed', 'padded by 1', 'padded by 16'])
@pytest.mark.parametrize('encoding', ENCODED)
def test_every_encoding_gives_the_same_rgb(encoding, padding):
    rows = ENCODED[encoding]
    step = W * rows.shape[2] + padding
    np.testing.assert_array_equal(read(padded(rows, padding), encoding, step), RGB)


@pytest.mark.parametrize('padding', [0, 3])
def test_mono_is_repeated_in_every_channel(padding):
    mono = RGB[:, :, 0]
    image = read(padded(mono, padding), 'mono8', W + padding)
    np.testing.assert_array_equal(image, np.repeat(mono[:, :, None], 3, axis=2))


def test_pixels_are_a_view_of_the_message():
    raw = image_cdr(RGB.tobytes(), H, W)
    image = pixels(parse_image(raw))
    assert np.shares_memory(image, np.frombuffer(raw, np.uint8))
    assert not image.flags.writeable


@pytest.mark.parametrize(
    ('fault', 'reason', 'match'),
    [
        (
            {'encoding': '16UC1'},
            Reason.BAD_ENCODING,
            "encoding '16UC1' is not one of rgb8, bgr8, rgba8, bgra8, mono8",
        ),
        ({'encoding': ''}, Reason.BAD_ENCODING, "encoding '' is not"),
        ({'step': 0}, Reason.BAD_STEP, 'step 0 is shorter than a row of 5 rgb8 pixels'),
        ({'step': 14}, Reason.BAD_STEP, r'\(15 bytes\)'),
        ({'data': RGB.tobytes()[:-1]}, Reason.SHORT_BUFFER, 'has 44 bytes, step .* is 45'),
        ({'data': b''}, Reason.SHORT_BUFFER, 'has 0 bytes'),
        ({'data': RGB.tobytes() + b'x'}, Reason.BAD_STEP, '46 bytes, more than step'),
        ({'size': (0, 0), 'data': b''}, Reason.BAD_IMAGE_SIZE, 'empty'),
        ({'size': (2**32 - 1, 2**32 - 1)}, Reason.BAD_STEP, 'step'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_unusable_images_are_refused_by_name(fault, reason, match):
    given = {'data': RGB.tobytes(), 'step': 15, **fault}
    with pytest.raises(InputFault, match=match) as caught:
        read(given.pop('data'), **given)
    assert caught.value.reason is reason


def encode(image: Image.Image, file_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format=file_format)
    return file.getvalue()


def decoded(data: bytes, expected: tuple[int, int] | None = None) -> np.ndarray:
    return decode(parse_compressed_image(compressed_cdr(data)), expected)


def test_png_decodes_to_the_same_pixels():
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(RGB), 'PNG')), RGB)


def test_grey_and_transparent_files_become_rgb():
    grey = Image.fromarray(RGB[:, :, 0])
    expected = np.repeat(RGB[:, :, :1], 3, axis=2)
    np.testing.assert_array_equal(decoded(encode(grey, 'PNG')), expected)
    rgba = Image.fromarray(np.concatenate([RGB, ALPHA], axis=2))
    np.testing.assert_array_equal(decoded(encode(rgba, 'PNG')), RGB)


def test_jpeg_decodes_as_the_named_decoder_does():
    data = encode(Image.fromarray(RGB), 'JPEG')
    with Image.open(io.BytesIO(data)) as file:
        np.testing.assert_array_equal(decoded(data), np.asarray(file))
    assert decoder_name().startswith('Pillow ')


def test_another_size_is_refused_before_decoding():
    data = encode(Image.fromarray(RGB), 'JPEG')
    with pytest.raises(InputFault, match='image is 3x5, configured for 4x4') as caught:
        decoded(data, (4, 4))
    assert caught.value.reason is Reason.BAD_IMAGE_SIZE


@pytest.mark.parametrize('data', [b'', b'\xff\xd8garbage', b'GIF89a' + bytes(20)])
def test_what_is_no_image_file_is_refused(data):
    with pytest.raises(InputFault, match='cannot be decoded') as caught:
        decoded(data)
    assert caught.value.reason is Reason.UNDECODABLE_IMAGE


def test_cut_files_are_refused():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), 'JPEG')
    with pytest.raises(InputFault, match='cannot be decoded'):
        decoded(data[: len(data) // 2])


def test_sixteen_bit_files_are_refused():
    deep = Image.fromarray(np.zeros((4, 4), dtype=np.uint16))
    with pytest.raises(InputFault, match='mode I;16') as caught:
        decoded(encode(deep, 'PNG'))
    assert caught.value.reason is Reason.BAD_ENCODING


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size that its data does not have."""
    data = bytearray(encode(Image.new('RGB', (1, 1)), 'PNG'))
    data[16:24] = struct.pack('>II', width, height)
    data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))
    return bytes(data)


def test_a_file_that_claims_gigabytes_is_refused():
    with pytest.raises(InputFault, match='cannot be decoded'):
        decoded(png_of_size(2**20, 2**20))
    with pytest.raises(InputFault, match=f'more than {MAX_DECODED_PX}'):
        decoded(png_of_size(8000, 8000))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(['JPEG', 'PNG', 'WEBP']), st.data())
def test_damaged_files_give_pixels_or_a_named_reason(file_format, data):
    raw = bytearray(encode(Image.fromarray(RGB), file_format))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decoded(bytes(raw)).shape[2] == 3
    except InputFault as fault:
        assert fault.reason in (
            Reason.UNDECODABLE_IMAGE,
            Reason.BAD_IMAGE_SIZE,
            Reason.BAD_ENCODING,
        )


def test_a_small_file_that_claims_huge_images_is_refused_undecoded():
    side = int(MAX_DECODED_PX**0.5) + 100
    data = encode(Image.new('1', (side, side)), 'PNG')
    assert len(data) < 20_000
    with pytest.raises(InputFault, match='claims') as caught:
        decoded(data)
    assert caught.value.reason is Reason.BAD_IMAGE_SIZE


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded():
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(file, 'JPEG', progressive=True)
    jpeg = file.getvalue()
    last = jpeg.rfind(b'\xff\xda')
    header = jpeg[last : last + 2 + int.from_bytes(jpeg[last + 2 : last + 4], 'big')]
    assert decoded(jpeg[:-2] + 20 * header + jpeg[-2:]).shape == (16, 16, 3)
    with pytest.raises(InputFault, match='JPEG image of 5.. scans, more than 100') as caught:
        decoded(jpeg[:-2] + 500 * header + jpeg[-2:])
    assert caught.value.reason is Reason.UNDECODABLE_IMAGE

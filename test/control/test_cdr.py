"""The CDR parser agrees with an independent serialiser and survives every sequence of bytes."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import compressed_cdr, image_cdr, joint_state_cdr, pose_cdr, string_cdr

from pi05_ros.control.cdr import (
    MAX_JOINTS,
    CdrError,
    parse_compressed_image,
    parse_header,
    parse_image,
    parse_joint_state,
    parse_pose_stamped,
    parse_string,
)

STAMP_NS = 1_760_000_000_123_456_789
PARSERS = {
    'header': parse_header,
    'image': parse_image,
    'compressed': parse_compressed_image,
    'joints': parse_joint_state,
    'pose': parse_pose_stamped,
    'string': parse_string,
}
VALID = {
    'header': pose_cdr([0.0] * 3, [0.0] * 4, STAMP_NS)[:21],
    'image': image_cdr(bytes(range(24)), 2, 4, stamp_ns=STAMP_NS),
    'compressed': compressed_cdr(b'\xff\xd8 no image', stamp_ns=STAMP_NS),
    'joints': joint_state_cdr(['a', 'bc', 'def'], [1.0, 2.0, 3.0], [0.1, 0.2, 0.3]),
    'pose': pose_cdr([1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0], STAMP_NS),
    'string': string_cdr('pick up the bowl'),
}

both_orders = pytest.mark.parametrize('little_endian', [True, False], ids=['little', 'big'])
# The length of the frame id moves every later field by another number of padding bytes.
frame_ids = pytest.mark.parametrize('frame_id', ['', 'a', 'ab', 'abc', 'abcd'])


@both_orders
@frame_ids
def test_image_fields_are_read_and_pixels_are_a_view(little_endian, frame_id):
    data = bytes(range(48))
    raw = image_cdr(
        data,
        4,
        4,
        encoding='bgr8',
        stamp_ns=STAMP_NS,
        frame_id=frame_id,
        little_endian=little_endian,
    )
    image = parse_image(raw)
    assert image.header.stamp_ns == STAMP_NS
    assert image.header.frame_id == frame_id
    assert (image.height, image.width, image.step, image.encoding) == (4, 4, 12, 'bgr8')
    assert bytes(image.data) == data
    assert np.shares_memory(np.frombuffer(image.data, np.uint8), np.frombuffer(raw, np.uint8))


@both_orders
@frame_ids
def test_joint_state_arrays_are_read_by_field(little_endian, frame_id):
    names = ['shoulder', 'elbow', 'wrist_1']
    raw = joint_state_cdr(
        names, [0.1, -0.2, 0.3], [1.0, 2.0, 3.0], [], STAMP_NS, frame_id, little_endian
    )
    joints = parse_joint_state(raw)
    assert joints.names == tuple(names)
    assert joints.position.tolist() == [0.1, -0.2, 0.3]
    assert joints.velocity.tolist() == [1.0, 2.0, 3.0]
    assert joints.effort.tolist() == []


@both_orders
@frame_ids
def test_pose_is_read(little_endian, frame_id):
    raw = pose_cdr([1.0, 2.0, 3.0], [0.1, 0.2, 0.3, 0.9], STAMP_NS, frame_id, little_endian)
    pose = parse_pose_stamped(raw)
    assert pose.header.stamp_ns == STAMP_NS
    assert pose.position.tolist() == [1.0, 2.0, 3.0]
    assert pose.orientation.tolist() == [0.1, 0.2, 0.3, 0.9]


@both_orders
def test_string_keeps_unicode(little_endian):
    assert parse_string(string_cdr('π0.5 nimm die Schüssel', little_endian)) == (
        'π0.5 nimm die Schüssel'
    )


@both_orders
def test_compressed_image_is_a_view(little_endian):
    message = parse_compressed_image(compressed_cdr(b'1234', 'png', STAMP_NS, little_endian))
    assert (message.format, bytes(message.data)) == ('png', b'1234')


def test_stamp_before_1970_stays_negative():
    assert parse_header(pose_cdr([0.0] * 3, [0.0] * 4, stamp_ns=-1)).stamp_ns == -1


@pytest.mark.parametrize('name', PARSERS)
def test_every_truncation_is_refused(name):
    raw = VALID[name]
    whole = PARSERS[name](raw)
    assert whole is not None
    for size in range(len(raw)):
        try:
            PARSERS[name](raw[:size])
        except CdrError:
            continue
        # Only padding behind the last field may be missing.
        assert len(raw) - size < 8


def test_short_and_foreign_encapsulations_are_named():
    with pytest.raises(CdrError, match='3 bytes is shorter than a CDR header'):
        parse_string(b'\x00\x01\x00')
    with pytest.raises(CdrError, match='representation 0x0003 is not plain CDR'):
        parse_string(b'\x00\x03\x00\x00' + bytes(8))


def test_more_joints_than_any_robot_are_refused():
    raw = joint_state_cdr([f'j{i}' for i in range(MAX_JOINTS + 1)], [])
    with pytest.raises(CdrError, match=f'list of {MAX_JOINTS + 1} names is longer'):
        parse_joint_state(raw)


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(CdrError, match='not UTF-8'):
        parse_string(b'\x00\x01\x00\x00' + struct.pack('<I', 3) + b'\xff\xfe\x00')


@pytest.mark.parametrize('claimed', [0xFFFFFFFF, 0x7FFFFFFF, 1 << 20])
def test_claimed_lengths_allocate_nothing(claimed):
    """A length field is believed only as far as there are bytes behind it."""
    raw = b'\x00\x01\x00\x00' + bytes(8) + struct.pack('<I', 1) + bytes(4)
    raw += struct.pack('<I', claimed) * 8
    tracemalloc.start()
    for parse in PARSERS.values():
        with pytest.raises(CdrError):
            parse(b'\x00\x01\x00\x00' + struct.pack('<I', claimed))
        try:
            parse(raw)
        except CdrError:
            continue
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PARSERS)), st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_cdr_error(name, body):
    for order in (b'\x00\x00', b'\x00\x01', b''):
        try:
            PARSERS[name](order + b'\x00\x00' + body)
        except CdrError as error:
            assert str(error)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(VALID)), st.data())
def test_flipped_bytes_of_a_valid_message_give_a_message_or_a_cdr_error(name, data):
    raw = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        PARSERS[name](bytes(raw))
    except CdrError as error:
        assert str(error)

"""ROS messages, as the node takes them from the middleware."""

from __future__ import annotations

import io

import numpy as np
from checkpoint_targets import franka, tokenizer
from PIL import Image
from target import Target

from pi05_ros.control.cdr import (
    parse_compressed_image,
    parse_image,
    parse_joint_state,
    parse_pose_stamped,
    parse_string,
)
from pi05_ros.control.images import NATIVE_ENCODINGS, decode, pixels
from pi05_ros.control.reasons import InputFault
from pi05_ros.control.state import JointIndex, eef_component
from pi05_ros.policy.errors import PromptError

import messages  # isort: skip (test/control, on the path since target was imported)


def read_image(data: bytes) -> None:
    message = parse_image(data)
    if message.encoding in NATIVE_ENCODINGS:
        np.ascontiguousarray(pixels(message))


def image_seeds() -> list[bytes]:
    seeds = []
    for encoding, channels in NATIVE_ENCODINGS.items():
        raw = bytes(range(4 * 3 * channels))
        seeds.append(messages.image_cdr(raw, 3, 4, encoding=encoding, step=4 * channels))
    return [*seeds, messages.image_cdr(bytes(36), 3, 4, little_endian=False)]


def read_compressed_image(data: bytes) -> None:
    decode(parse_compressed_image(data))


def encoded(file_format: str, size_px: tuple[int, int] = (16, 24), **options: object) -> bytes:
    """Return an image file of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def compressed_image_seeds() -> list[bytes]:
    files = [
        encoded('JPEG'),
        encoded('JPEG', progressive=True),
        encoded('PNG'),
        encoded('WEBP'),
        encoded('WEBP', lossless=True),
    ]
    return [messages.compressed_cdr(file) for file in files]


def read_joint_state(data: bytes) -> None:
    message = parse_joint_state(data)
    robot = franka()
    JointIndex(robot.state).fill(np.empty(robot.state_dim), message)


def joint_state_seeds() -> list[bytes]:
    names = list(franka().state_joints)
    zeros = [0.5] * len(names)
    return [
        messages.joint_state_cdr(names, zeros, zeros, zeros),
        messages.joint_state_cdr(names, zeros, little_endian=False),
    ]


def read_pose(data: bytes) -> None:
    pose = parse_pose_stamped(data)
    for component in ('position_x', 'axis_angle_y', 'quaternion_w'):
        eef_component(component, pose)


def pose_seeds() -> list[bytes]:
    return [messages.pose_cdr([0.1, 0.2, 0.3], [0.0, 0.6, 0.0, 0.8], little_endian=order)
            for order in (True, False)]  # fmt: skip


def read_prompt(data: bytes) -> None:
    tokenizer().encode(parse_string(data), np.zeros(8))


def prompt_seeds() -> list[bytes]:
    return [messages.string_cdr('pick up the black bowl'), messages.string_cdr('größe', False)]


TARGETS = {
    'cdr_image': Target(read_image, (InputFault,), image_seeds),
    'cdr_compressed_image': Target(read_compressed_image, (InputFault,), compressed_image_seeds),
    'cdr_joint_state': Target(read_joint_state, (InputFault,), joint_state_seeds),
    'cdr_pose': Target(read_pose, (InputFault,), pose_seeds),
    'cdr_prompt': Target(read_prompt, (InputFault, PromptError), prompt_seeds),
}

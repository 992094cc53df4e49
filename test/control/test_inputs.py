"""The input set: topics of a robot, transports, decoding only when it is needed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from messages import compressed_cdr, image_cdr, joint_state_cdr, pose_cdr, rgb_cdr
from PIL import Image
from rig import FRANKA, JOINTS, START_NS, gradient, make_settings

from pi05_ros.control.cdr import JointStateMessage, parse_joint_state
from pi05_ros.control.inputs import Inputs
from pi05_ros.control.reasons import InputFault, Reason, Skip
from pi05_ros.control.topics import InputTopic, input_topics
from pi05_ros.policy.robot import load_robot
from pi05_ros.policy.types import Observation

LIBERO = load_robot('libero')


def observe(inputs: Inputs) -> Observation:
    found = inputs.observation('header')
    assert isinstance(found, Observation), found
    return found


def full_inputs(**values: object) -> Inputs:
    inputs = Inputs(FRANKA, make_settings(**values))
    inputs.push('base', rgb_cdr(gradient(), START_NS), START_NS)
    inputs.push('wrist', rgb_cdr(gradient(), START_NS), START_NS)
    joints = joint_state_cdr(JOINTS, [0.1] * len(JOINTS), stamp_ns=START_NS)
    inputs.push('joint_states', joints, START_NS)
    return inputs


def test_topics_of_a_joint_space_robot():
    topics = input_topics(FRANKA, make_settings(cameras__wrist__transport='compressed'))
    assert topics == (
        InputTopic('base', 'camera/base/image_raw', 'sensor_msgs/msg/Image'),
        InputTopic(
            'wrist', 'camera/wrist/image_raw/compressed', 'sensor_msgs/msg/CompressedImage'
        ),
        InputTopic('joint_states', 'joint_states', 'sensor_msgs/msg/JointState'),
        InputTopic('task_prompt', 'task_prompt', 'std_msgs/msg/String', 'reliable', latched=True),
    )


def test_only_robots_with_a_pose_in_their_state_listen_to_it():
    names = [topic.name for topic in input_topics(LIBERO, make_settings(LIBERO))]
    assert names == ['base', 'wrist', 'joint_states', 'eef_pose', 'task_prompt']


def test_state_mixes_pose_and_joints_in_the_order_of_the_robot_file():
    inputs = Inputs(LIBERO, make_settings(LIBERO))
    inputs.push('base', rgb_cdr(gradient()), 1)
    inputs.push('wrist', rgb_cdr(gradient()), 1)
    fingers = ['panda_finger_joint2', 'panda_finger_joint1']
    inputs.push('joint_states', joint_state_cdr(fingers, [-0.04, 0.04]), 1)
    assert inputs.missing() == Skip(Reason.MISSING_INPUT, 'eef_pose', 'no eef_pose (on eef_pose)')
    inputs.push('eef_pose', pose_cdr([1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]), 1)
    state = observe(inputs).state
    assert state.tolist() == pytest.approx([1.0, 2.0, 3.0, np.pi, 0.0, 0.0, 0.04, -0.04])


def test_compressed_camera_gives_the_decoded_pixels():
    file = io.BytesIO()
    Image.fromarray(gradient()).save(file, format='PNG')
    inputs = full_inputs(cameras__wrist__transport='compressed')
    inputs.push(
        'wrist', compressed_cdr(file.getvalue(), 'rgb8; png compressed', START_NS), START_NS
    )
    np.testing.assert_array_equal(observe(inputs).images['wrist'], gradient())
    assert inputs.cameras['wrist'].encoding == 'rgb8; png compressed'


def test_rgb_image_is_not_copied():
    inputs = full_inputs()
    raw = rgb_cdr(gradient(), START_NS)
    inputs.push('base', raw, START_NS)
    image = observe(inputs).images['base']
    assert np.shares_memory(image, np.frombuffer(raw, np.uint8))


def test_every_image_is_plain_memory_whatever_the_encoding():
    inputs = full_inputs()
    bgr = gradient()[:, :, ::-1]
    inputs.push('base', image_cdr(bgr.tobytes(), 4, 6, encoding='bgr8', stamp_ns=START_NS), 1)
    image = observe(inputs).images['base']
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, gradient())


def test_image_is_decoded_once_per_message():
    calls: list[bytes] = []

    def decode(raw: bytes) -> np.ndarray:
        calls.append(raw)
        return gradient()

    inputs = Inputs(FRANKA, make_settings(), foreign_decoder=decode)
    for name in ('base', 'wrist'):
        inputs.push(name, image_cdr(bytes(16), 2, 4, encoding='yuv422', step=8), 1)
    inputs.push('joint_states', joint_state_cdr(JOINTS, [0.0] * len(JOINTS)), 1)
    assert calls == []
    for _ in range(3):
        np.testing.assert_array_equal(observe(inputs).images['base'], gradient())
    assert len(calls) == 2
    assert inputs.cameras['base'].encoding == 'yuv422'


def test_a_joint_state_is_read_once_and_the_next_one_again(monkeypatch: pytest.MonkeyPatch):
    read: list[bytes] = []

    def parse(raw: bytes) -> JointStateMessage:
        read.append(raw)
        return parse_joint_state(raw)

    monkeypatch.setattr('pi05_ros.control.inputs.parse_joint_state', parse)
    inputs = full_inputs()
    for _ in range(3):
        assert observe(inputs).state.tolist() == [0.1] * len(JOINTS)
        assert inputs.joint_positions() == dict.fromkeys(JOINTS, 0.1)
    assert len(read) == 1
    inputs.push('joint_states', joint_state_cdr(JOINTS, [0.2] * len(JOINTS)), START_NS)
    assert observe(inputs).state.tolist() == [0.2] * len(JOINTS)
    inputs.clear()
    assert inputs.joint_positions() == {}


def test_unusable_message_is_not_decoded_again():
    calls: list[bytes] = []

    def decode(raw: bytes) -> np.ndarray:
        calls.append(raw)
        raise InputFault(Reason.BAD_ENCODING, 'no such conversion')

    inputs = Inputs(FRANKA, make_settings(), foreign_decoder=decode)
    inputs.push('base', image_cdr(bytes(16), 2, 4, encoding='yuv422', step=8), 1)
    for _ in range(3):
        skip = inputs.observation('header')
        assert isinstance(skip, Skip)
        assert str(skip) == 'bad_encoding: base image: no such conversion'
    assert len(calls) == 1


def test_nothing_is_known_of_sizes_before_an_image_came():
    inputs = Inputs(FRANKA, make_settings())
    with pytest.raises(InputFault, match='nothing came on camera/base/image_raw'):
        inputs.fix_sizes()


def test_task_that_cannot_be_read_is_a_reason():
    inputs = full_inputs()
    inputs.push('task_prompt', b'\x00\x01\x00\x00\xff\xff\xff\xff', 1)
    skip = inputs.prompt_skip()
    assert skip is not None
    assert (skip.reason, skip.input_name) == (Reason.MALFORMED_MESSAGE, 'task_prompt')


def test_clear_forgets_sensors_but_not_the_task():
    inputs = full_inputs()
    inputs.clear()
    assert inputs.missing() is not None
    assert inputs.prompt_skip() is None
    assert inputs.cameras['base'].received == 1

"""The inputs of one robot: raw messages go in, one complete observation comes out."""

from __future__ import annotations

import numpy as np

from pi05_ros.policy.robot import RobotSpec
from pi05_ros.policy.types import Observation

from .cdr import (
    JointStateMessage,
    parse_compressed_image,
    parse_image,
    parse_joint_state,
    parse_pose_stamped,
    parse_string,
)
from .images import NATIVE_ENCODINGS, ForeignDecoder, decode, pixels, size_fault
from .parameters import NodeSettings
from .reasons import InputFault, Reason, Skip
from .slots import Slot
from .state import JointIndex, eef_component
from .topics import EEF_POSE, JOINT_STATES, TASK_PROMPT, input_topics


class CameraSlot(Slot):
    """Newest image of one camera, raw or compressed."""

    def __init__(
        self, name: str, topic: str, transport: str, foreign_decoder: ForeignDecoder | None
    ) -> None:
        super().__init__(name, f'{name} image', topic)
        self.transport = transport
        self.size_px: tuple[int, int] | None = None  # (height, width), once fixed
        self.encoding = ''
        self._foreign_decoder = foreign_decoder
        self._decoded: tuple[bytes | memoryview, np.ndarray] | None = None

    def rgb(self) -> np.ndarray:
        """Return the image as (h, w, 3) uint8 RGB; a view where the message allows it.

        Raises:
            InputFault: it cannot be used, or its size is not ``size_px``.
        """
        raw = self.message
        if self._decoded is None or self._decoded[0] is not raw:
            self._decoded = (raw, self._read(raw))
        return self._decoded[1]

    def clear(self) -> None:
        """Forget the message and its pixels."""
        super().clear()
        self._decoded = None

    def _read(self, raw: bytes | memoryview) -> np.ndarray:
        if self.transport == 'compressed':
            message = parse_compressed_image(raw)
            self.encoding = message.format
            image = decode(message, self.size_px)
        else:
            image = self._read_raw(raw)
        size_px = (image.shape[0], image.shape[1])
        if self.size_px is not None and size_px != self.size_px:
            raise size_fault(size_px, self.size_px)
        return np.ascontiguousarray(image)

    def _read_raw(self, raw: bytes | memoryview) -> np.ndarray:
        message = parse_image(raw)
        self.encoding = message.encoding
        if message.encoding in NATIVE_ENCODINGS:
            return pixels(message)
        if self._foreign_decoder is None:
            raise InputFault(
                Reason.BAD_ENCODING,
                f'encoding {message.encoding!r} is not one of {", ".join(NATIVE_ENCODINGS)}; '
                'for other encodings install cv_bridge',
            )
        return self._foreign_decoder(raw)


class JointSlot(Slot):
    """Newest joint state, read once: a rehearsal reads what the tick after it uses."""

    def __init__(self) -> None:
        super().__init__(JOINT_STATES, JOINT_STATES, JOINT_STATES)

    def clear(self) -> None:
        """Forget the message and its values."""
        super().clear()
        self._read: tuple[bytes | memoryview, JointStateMessage] | None = None

    def joints(self) -> JointStateMessage:
        """Return names and values.

        Raises:
            InputFault: there is no message, or it cannot be read.
        """
        raw, read = self.message, self._read  # what holds the robot reads in threads of its own
        if read is None or read[0] is not raw:
            read = self._read = (raw, parse_joint_state(raw))
        return read[1]


class PromptSlot:
    """The task: from the parameter or the topic, whichever came last."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.source = 'parameter'
        self.received = 0
        self.fault: InputFault | None = None

    def set(self, text: str) -> None:
        """Take the prompt from the parameter."""
        self._take(text, 'parameter')

    def push(self, raw: bytes | memoryview) -> None:
        """Take the prompt from a std_msgs/String."""
        self.received += 1
        try:
            self._take(parse_string(raw), 'topic')
        except InputFault as fault:
            self.fault = fault

    def _take(self, text: str, source: str) -> None:
        self.text, self.source, self.fault = text, source, None


class Inputs:
    """Every input that the robot file asks for.

    Args:
        foreign_decoder: converts image encodings that are not read natively; None where no
            conversion library is installed.
    """

    def __init__(
        self,
        robot: RobotSpec,
        settings: NodeSettings,
        foreign_decoder: ForeignDecoder | None = None,
    ) -> None:
        self.robot = robot
        topics = {topic.name: topic for topic in input_topics(robot, settings)}
        self.topics = tuple(topics.values())
        self.cameras = {
            name: CameraSlot(
                name, topics[name].topic, settings.camera(name).transport, foreign_decoder
            )
            for name in robot.camera_names
        }
        self.joints = JointSlot()
        self.pose = Slot(EEF_POSE, EEF_POSE, EEF_POSE)
        self.prompt = PromptSlot(settings.prompt)
        self._joint_index = JointIndex(robot.state)
        self.sensors: dict[str, Slot] = dict(self.cameras)
        if robot.needs_joint_states:
            self.sensors[JOINT_STATES] = self.joints
        if robot.needs_eef_pose:
            self.sensors[EEF_POSE] = self.pose

    def push(
        self, name: str, raw: bytes | memoryview, receive_ns: int, sequence: int | None = None
    ) -> None:
        """Take one raw CDR message of the input ``name`` (see :attr:`topics`)."""
        if name == TASK_PROMPT:
            self.prompt.push(raw)
        else:
            self.sensors[name].push(raw, receive_ns, sequence)

    def clear(self) -> None:
        """Forget every sensor message; the task stays."""
        for slot in self.sensors.values():
            slot.clear()

    def fix_sizes(self) -> dict[str, tuple[int, int]]:
        """Hold every camera to the (height, width) of its present image, and return them.

        Raises:
            InputFault: an image cannot be used.
        """
        for slot in self.cameras.values():
            image = slot.rgb()
            slot.size_px = (image.shape[0], image.shape[1])
        return {name: slot.size_px for name, slot in self.cameras.items() if slot.size_px}

    def missing(self) -> Skip | None:
        """Name the sensors that have sent nothing yet."""
        empty = [slot for slot in self.sensors.values() if slot.is_empty]
        if not empty:
            return None
        names = ', '.join(f'{slot.title} (on {slot.topic})' for slot in empty)
        return Skip(Reason.MISSING_INPUT, empty[0].title, f'no {names}')

    def malformed(self) -> Skip | None:
        """Name the first sensor whose newest message has not even a readable stamp."""
        for slot in self.sensors.values():
            if slot.fault is not None and not slot.has_header:
                return Skip(slot.fault.reason, slot.title, f'{slot.title}: {slot.fault}')
        return None

    def prompt_skip(self) -> Skip | None:
        """Say why there is no usable task, if there is none."""
        if self.prompt.fault is not None:
            return Skip(self.prompt.fault.reason, TASK_PROMPT, str(self.prompt.fault))
        if not self.prompt.text.strip():
            return Skip(
                Reason.MISSING_INPUT,
                TASK_PROMPT,
                'no task: parameter prompt is empty and nothing usable came on task_prompt',
            )
        return None

    def observation(self, stamp_source: str, prompt: str | None = None) -> Observation | Skip:
        """Decode the newest messages, in the order of :attr:`sensors`.

        The state is (S,) float64 in the order of the robot file, in robot units. A sensor that
        has sent nothing is a skip, too.

        Args:
            prompt: replaces the task, for warming up before there is one.
        """
        images: dict[str, np.ndarray] = {}
        state = np.empty(self.robot.state_dim, dtype=np.float64)
        for name, slot in self.sensors.items():
            try:
                if isinstance(slot, CameraSlot):
                    images[name] = slot.rgb()
                elif slot is self.joints:
                    self._joint_index.fill(state, self.joints.joints())
                else:
                    self._fill_pose(state)
            except InputFault as fault:
                if not slot.is_empty:
                    slot.fault = fault  # known from now on, until the next message
                return Skip(fault.reason, slot.title, f'{slot.title}: {fault}')
        stamps_ns = {name: slot.stamp_ns(stamp_source) for name, slot in self.sensors.items()}
        return Observation(images, state, prompt or self.prompt.text, stamps_ns)

    def joint_positions(self) -> dict[str, float]:
        """Return joint -> newest measured position; empty without a usable message."""
        try:
            message = self.joints.joints()
        except InputFault:
            return {}
        if len(message.names) != len(message.position):
            return {}
        measured = zip(message.names, message.position.tolist(), strict=True)
        return {name: position for name, position in measured if np.isfinite(position)}

    def _fill_pose(self, state: np.ndarray) -> None:
        pose = parse_pose_stamped(self.pose.message)
        for index, dim in enumerate(self.robot.state):
            if dim.eef is not None:
                state[index] = eef_component(dim.eef, pose)

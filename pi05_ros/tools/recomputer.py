"""Recorded action chunks, computed once more from the recorded inputs that they name."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from pi05_ros.control.images import ForeignDecoder
from pi05_ros.control.inputs import Inputs
from pi05_ros.control.loading import check_settings, load
from pi05_ros.control.parameters import NodeSettings
from pi05_ros.control.reasons import InputFault, Skip
from pi05_ros.control.safety import ActionGuard
from pi05_ros.control.topics import input_topics
from pi05_ros.engine.build import BACKENDS
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.types import ActionChunk
from pi05_ros.resources import share_dir

from .bag import Bag, BagMessage
from .recorded_limits import recorded_limits
from .remapping import Remapping

if TYPE_CHECKING:
    from pi05_ros.policy.policy import Policy

CHUNK_TYPE = 'pi05_ros/msg/ActionChunk'
# An input reaches the recorder through another queue than the chunk does, so it may come a little
# later; and a chunk never uses inputs that are older than this.
_GRACE_NS = 500_000_000
_MEMORY_NS = 5_000_000_000


class RecomputeError(Pi05Error):
    """The recording holds nothing that can be recomputed with this checkpoint."""


@dataclass(frozen=True)
class RecordedChunk:
    """One pi05_ros/ActionChunk: ``actions`` (H, D) float32, inputs by name with their stamps."""

    receive_ns: int
    tick: int
    names: tuple[str, ...]
    actions: np.ndarray
    stamps_ns: Mapping[str, int]
    prompt: str
    seed: int
    num_steps: int
    checkpoint_sha256: str
    backend: str
    precision: str


@dataclass(frozen=True)
class Outcome:
    """One chunk: ``found`` is what came out now, or ``fault`` says why nothing did."""

    recorded: RecordedChunk
    found: ActionChunk | None
    fault: str = ''

    @property
    def is_identical(self) -> bool:
        """Whether every bit of the actions is the same."""
        if self.found is None:
            return False
        return self.found.actions.tobytes() == self.recorded.actions.tobytes()


class Recomputer:
    """Loads the policy once and answers every recorded chunk of one topic.

    Args:
        topic: where the chunks were recorded; None takes the only one of that type.
        overrides: names of parameters that were given explicitly; for the others the chunk says
            with which backend and precision it was made.
    """

    def __init__(
        self,
        bag: Bag,
        settings: NodeSettings,
        remapping: Remapping,
        *,
        topic: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        foreign_decoder: ForeignDecoder | None = None,
        load_policy: Callable[[NodeSettings, Mapping[str, tuple[int, int]]], Policy] = load,
    ) -> None:
        self.bag = bag
        self.settings = settings
        self.chunk_topic = _chunk_topic(bag, topic)
        self.policy: Policy | None = None
        robot = recorded_limits(check_settings(settings), settings, bag, remapping)
        self._inputs = Inputs(robot, settings, foreign_decoder)
        self._guard = ActionGuard(robot)
        self._names = {
            remapping.resolve(wanted.topic): wanted.name
            for wanted in input_topics(robot, settings)
            if wanted.name in self._inputs.sensors
        }
        bag.require(self._names)
        self._overrides = overrides or {}
        self._load_policy = load_policy
        self._read_chunk = _chunk_reader()
        # Input -> header stamp -> message, for the last seconds.
        self._memory: dict[str, dict[int, BagMessage]] = {
            name: {} for name in self._inputs.sensors
        }

    def run(self) -> Iterator[Outcome]:
        """Yield each chunk in the order of the recording.

        Raises:
            Pi05Error: the bag is damaged, or the checkpoint is another one or cannot be loaded.
        """
        waiting: deque[RecordedChunk] = deque()
        try:
            for message in self.bag.messages([*self._names, self.chunk_topic]):
                while waiting and message.receive_ns - waiting[0].receive_ns > _GRACE_NS:
                    yield self._recompute(waiting.popleft())
                if message.topic == self.chunk_topic:
                    waiting.append(self._read_chunk(message))
                else:
                    self._remember(message)
            while waiting:
                yield self._recompute(waiting.popleft())
        finally:
            if self.policy is not None:
                self.policy.close()

    def _remember(self, message: BagMessage) -> None:
        name = self._names[message.topic]
        slot = self._inputs.sensors[name]
        slot.push(message.raw, message.receive_ns)
        memory = self._memory[name]
        memory[slot.header_ns] = message
        oldest_ns = message.receive_ns - _MEMORY_NS
        while memory and next(iter(memory.values())).receive_ns < oldest_ns:
            del memory[next(iter(memory))]

    def _recompute(self, recorded: RecordedChunk) -> Outcome:
        self._inputs.clear()
        for name, stamp_ns in recorded.stamps_ns.items():
            message = self._memory.get(name, {}).get(stamp_ns)
            if message is None:
                return Outcome(recorded, None, f'no {name} with the stamp {stamp_ns} was recorded')
            self._inputs.push(name, message.raw, message.receive_ns)
        try:
            policy = self.policy or self._load(recorded)
        except InputFault as fault:
            return Outcome(recorded, None, str(fault))
        if policy.info.checkpoint_sha256 != recorded.checkpoint_sha256:
            raise RecomputeError(
                f'tick {recorded.tick} was made with checkpoint '
                f'{recorded.checkpoint_sha256[:12]}, {self.settings.checkpoint} is '
                f'{policy.info.checkpoint_sha256[:12]}'
            )
        observation = self._inputs.observation('header', recorded.prompt)
        if isinstance(observation, Skip):
            return Outcome(recorded, None, observation.detail)
        try:
            found = policy.act(
                observation,
                tick=recorded.tick,
                seed=recorded.seed,
                num_steps=recorded.num_steps,
            )
        except Pi05Error as refusal:
            return Outcome(recorded, None, str(refusal))
        actions = found.actions[: self.settings.execute_horizon or None]
        if (found.names, actions.shape) != (recorded.names, recorded.actions.shape):
            then = f'{len(recorded.actions)} rows of {", ".join(recorded.names)}'
            now = f'{len(actions)} rows of {", ".join(found.names)}'
            return Outcome(recorded, None, f'recorded {then}; computed {now}')
        return Outcome(recorded, replace(found, actions=self._guard.clip(actions)))

    def _load(self, recorded: RecordedChunk) -> Policy:
        """Load what the first chunk says that it was made with."""
        made_with: dict[str, Any] = {'precision': recorded.precision}
        if not self.settings.execute_horizon:  # otherwise more rows were computed than recorded
            made_with['horizon'] = len(recorded.actions)
        if recorded.backend in BACKENDS:
            made_with['backend'] = recorded.backend
        chosen = {name: v for name, v in made_with.items() if name not in self._overrides}
        self.settings = replace(self.settings, **chosen)
        self.policy = self._load_policy(self.settings, self._inputs.fix_sizes())
        return self.policy


def _chunk_topic(bag: Bag, wanted: str | None) -> str:
    have = [name for name, topic in bag.topics.items() if topic.msgtype == CHUNK_TYPE]
    if wanted is not None:
        name = '/' + wanted.lstrip('/')
        if name not in have:
            raise RecomputeError(
                f'{bag.path} has no {CHUNK_TYPE} on {name}; it has them on: '
                f'{", ".join(have) or "no topic"}'
            )
        return name
    if len(have) != 1:
        found = f'on {", ".join(have)}; choose one with --topic' if have else 'on no topic'
        raise RecomputeError(
            f'{bag.path} has {CHUNK_TYPE} {found}'
            + ('' if have else '; record ~/action_chunk or ~/dry_run/action_chunk of the node')
        )
    return have[0]


def _chunk_reader() -> Callable[[BagMessage], RecordedChunk]:
    """Return a parser of ActionChunk that needs no ROS installation."""
    typestore = get_typestore(Stores.ROS2_JAZZY)
    definition = (share_dir() / 'msg' / 'ActionChunk.msg').read_text(encoding='utf-8')
    typestore.register(get_types_from_msg(definition, CHUNK_TYPE))

    def read(message: BagMessage) -> RecordedChunk:
        try:
            chunk: Any = typestore.deserialize_cdr(message.raw, CHUNK_TYPE)
            actions = np.asarray(chunk.actions, np.float32).reshape(
                chunk.horizon, len(chunk.names)
            )
            stamps = [stamp.sec * 10**9 + stamp.nanosec for stamp in chunk.input_stamps]
            stamps_ns = dict(zip(chunk.input_names, stamps, strict=True))
        # The deserialiser meets damage as struct, index, value and assertion errors alike.
        except Exception as error:
            raise RecomputeError(
                f'a message on {message.topic} is not a {CHUNK_TYPE} of this version: {error}'
            ) from error
        return RecordedChunk(
            receive_ns=message.receive_ns,
            tick=chunk.tick,
            names=tuple(chunk.names),
            actions=actions,
            stamps_ns=stamps_ns,
            prompt=chunk.prompt,
            seed=chunk.seed,
            num_steps=chunk.num_steps,
            checkpoint_sha256=chunk.checkpoint_sha256,
            backend=chunk.backend,
            precision=chunk.precision,
        )

    return read

"""A recording through the control code of the live node: no middleware, no wall clock.

The replay is the life of one node, in bag time (receive stamps):

1. *Configure*: messages are taken in receive order until every sensor has sent a usable one. That
   fixes the image sizes; the policy is loaded and warmed up, which takes no bag time.
2. *Ticks*: at every multiple of the period (in nanoseconds since the epoch), the first one at or
   after that instant, the last one at or before the last message of an input. The first has
   number 0, and the number is part of the noise.
3. A tick sees every message that was received **at or before** its instant, so a message with the
   very stamp of a tick comes first.

A live node under ``use_sim_time`` does the same ticks if it is activated while ``/clock`` shows
the instant one period before the first tick, as its timer first fires one period later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_ros.control.core import ControlCore, TickResult
from pi05_ros.control.gates import NS_PER_MS
from pi05_ros.control.images import ForeignDecoder
from pi05_ros.control.inputs import Inputs
from pi05_ros.control.loading import (
    WARM_UP_PROMPT,
    check_settings,
    load,
    self_check,
    warm_up,
)
from pi05_ros.control.parameter_file import DEFAULT_ROBOT, settings_from_yaml
from pi05_ros.control.parameters import NodeSettings, settings_from_values
from pi05_ros.control.reasons import Skip
from pi05_ros.control.topics import TASK_PROMPT, InputTopic, input_topics
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import RobotSpec, load_robot
from pi05_ros.policy.types import Observation

from .action_log import ActionLog
from .bag import Bag, BagMessage
from .recorded_limits import recorded_limits
from .remapping import Remapping

if TYPE_CHECKING:
    from pi05_ros.policy.policy import Policy

# A longer silence of all inputs is a wrong receive stamp; ticking through it could take days.
MAX_SILENCE_NS = 3_600_000_000_000

LoadPolicy = Callable[[NodeSettings, Mapping[str, tuple[int, int]]], 'Policy']


class ReplayError(Pi05Error):
    """The recording cannot be replayed with these settings."""


@dataclass(frozen=True)
class Setup:
    """What the live node gets from its command line.

    Args:
        params_file: ROS 2 parameter file, or None.
        overrides: full parameter name -> value; they win over the file.
    """

    params_file: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    remapping: Remapping = Remapping()

    def settings(self) -> NodeSettings:
        """Return the node's settings.

        Raises:
            Pi05Error: the file, a parameter or the robot file is wrong.
        """
        if self.params_file is not None:
            return settings_from_yaml(self.params_file, self.remapping.node_name, self.overrides)
        robot = load_robot(str(self.overrides.get('robot', DEFAULT_ROBOT)))
        return settings_from_values(self.overrides, robot.camera_names)


@dataclass(frozen=True)
class TickCost:
    """Host time of one tick of the replay.

    Args:
        read_ms: to get the messages since the last tick out of the bag.
        push_ms: to hand them to the inputs.
        gate_ms: for gates and decoding.
        policy_ms: inside the policy but outside the model: prompt, statistics, transforms.
        model_ms: the model's own time (``StageTimes.total_ms``).
        other_ms: everything else, e.g. keeping the result and showing the progress.
    """

    read_ms: float
    push_ms: float
    gate_ms: float
    policy_ms: float
    model_ms: float
    other_ms: float

    @property
    def overhead_ms(self) -> float:
        """All but the model."""
        return self.read_ms + self.push_ms + self.gate_ms + self.policy_ms + self.other_ms


class Replay:
    """One replay: what it found so far, also after it broke off.

    Args:
        load_policy: loads the policy for the settings and the cameras' (height, width).
        foreign_decoder: for image encodings that are not read natively.
        on_tick: called after each tick.
    Attributes:
        policy_info: what ran; None until the policy was loaded.
        results: every tick.
        costs: host time of each.
        messages: how many were taken, by input name.
    """

    def __init__(
        self,
        settings: NodeSettings,
        remapping: Remapping,
        load_policy: LoadPolicy = load,
        foreign_decoder: ForeignDecoder | None = None,
        on_tick: Callable[[Replay], None] = lambda replay: None,
    ) -> None:
        self.settings = settings
        self.remapping = remapping
        self.robot: RobotSpec = check_settings(settings)
        self.inputs = Inputs(self.robot, settings, foreign_decoder)
        self.topics: dict[str, InputTopic] = {
            remapping.resolve(topic.topic): topic for topic in input_topics(self.robot, settings)
        }
        self.policy_info: dict[str, str] | None = None
        self.results: list[TickResult] = []
        self.costs: list[TickCost] = []
        self.messages = {topic.name: 0 for topic in self.topics.values()}
        self.core: ControlCore | None = None
        self.last_ns = 0
        self._load_policy = load_policy
        self._on_tick = on_tick
        self._policy: Policy | None = None
        self._read_ns = self._push_ns = 0
        self._mark_ns = 0

    def run(self, bag: Bag) -> None:
        """Replay the whole recording.

        Raises:
            Pi05Error: the bag lacks a topic or is damaged, no complete observation comes, the
                policy cannot be loaded or breaks. What was found until then stays.
        """
        topics = self._topics_in(bag)
        self.robot = recorded_limits(self.robot, self.settings, bag, self.remapping)
        self.inputs.robot = self.robot
        messages = self._timed(bag.messages(topics))
        try:
            due_ns = self._configure(bag, messages)
            self._mark()
            for message in messages:
                self._check_silence(bag, message)
                while due_ns < message.receive_ns:
                    due_ns = self._tick(due_ns)
                self._push(message)
            while due_ns <= self.last_ns:
                due_ns = self._tick(due_ns)
        finally:
            if self._policy is not None:
                self._policy.close()
        if not self.results:
            raise ReplayError(
                f'{bag.path}: no tick of {self.settings.rate_hz:g} Hz falls between the first '
                'complete observation and the last message; the recording is too short'
            )

    def action_log(self, origin: Mapping[str, Any]) -> ActionLog:
        """Return the actions so far."""
        chunks = [(r.now_ns, r.chunk) for r in self.results if r.chunk is not None]
        robot = self.robot
        return ActionLog.of(chunks, robot.action_names, robot.action_units, origin)

    def _topics_in(self, bag: Bag) -> list[str]:
        """Return the recorded topics of the inputs.

        Raises:
            ReplayError: lists every topic that is missing or has another type.
        """
        faults: list[str] = []
        remedies: list[str] = []
        present: list[str] = []
        for name, wanted in self.topics.items():
            found = bag.topics.get(name)
            if found is None:
                # Nobody has to publish the task: the parameter may hold it.
                if wanted.name != TASK_PROMPT:
                    faults.append(f'no {name} ({wanted.type_name})')
                    remedies += _transport_remedy(bag, name, wanted)
            elif found.msgtype != wanted.type_name:
                faults.append(f'{name} is {found.msgtype}, expected {wanted.type_name}')
            else:
                present.append(name)
        if faults:
            have = ', '.join(bag.topics) or 'none'
            remedy = f'Give {" ".join(remedies)}' if remedies else 'Use --remap or another robot'
            raise ReplayError(
                f'{bag.path} does not fit robot {self.robot.name}: {"; ".join(faults)}. '
                f'Its topics: {have}. {remedy}'
            )
        return present

    def _configure(self, bag: Bag, messages: Iterator[BagMessage]) -> int:
        """Take messages until there is an observation, load the policy; return the first tick."""
        found: Observation | Skip | None = None
        for message in messages:
            self._push(message)
            found = self._observation()
            if isinstance(found, Observation):
                break
        if not isinstance(found, Observation):
            why = 'it holds no message of any input' if found is None else str(found)
            raise ReplayError(f'{bag.path} never gives a complete observation: {why}')
        self._policy = policy = self._load_policy(self.settings, self.inputs.fix_sizes())
        self.policy_info = policy.info.as_dict()
        self_check(policy, found, self.settings)
        warm_up(policy, found, self.settings)
        self.core = ControlCore(self.inputs, policy, self.settings)
        period_ns = self.settings.period_ns
        return -(-self.last_ns // period_ns) * period_ns

    def _check_silence(self, bag: Bag, message: BagMessage) -> None:
        silence_ns = message.receive_ns - self.last_ns
        if silence_ns > MAX_SILENCE_NS:
            raise ReplayError(
                f'{bag.path}: no input for {silence_ns / 3.6e12:.1f} hours before the message on '
                f'{message.topic} with the receive stamp {message.receive_ns}; cut the recording '
                'there'
            )

    def _observation(self) -> Observation | Skip:
        """Decode what has come, as the live node does before it loads the policy."""
        prompt = self.inputs.prompt.text.strip() or WARM_UP_PROMPT
        skip = self.inputs.missing()
        return skip or self.inputs.observation(self.settings.stamp_source, prompt)

    def _push(self, message: BagMessage) -> None:
        began_ns = time.perf_counter_ns()
        name = self.topics[message.topic].name
        push = self.inputs.push if self.core is None else self.core.push
        push(name, message.raw, message.receive_ns)
        self.messages[name] += 1
        self.last_ns = message.receive_ns
        self._push_ns += time.perf_counter_ns() - began_ns

    def _tick(self, due_ns: int) -> int:
        """Run the tick at ``due_ns`` and return the instant of the next one."""
        assert self.core is not None, 'ticks begin after configure'
        result = self.core.tick(due_ns)
        self.results.append(result)
        self._on_tick(self)
        self._account(result)
        if result.error is not None:
            raise ReplayError(f'tick {result.tick}: {result.skip}') from result.error
        return due_ns + self.settings.period_ns

    def _timed(self, messages: Iterator[BagMessage]) -> Iterator[BagMessage]:
        """Pass the messages on and count the time to read them."""
        while True:
            began_ns = time.perf_counter_ns()
            message = next(messages, None)
            self._read_ns += time.perf_counter_ns() - began_ns
            if message is None:
                return
            yield message

    def _mark(self) -> None:
        """Begin to account the time of the next tick."""
        self._read_ns = self._push_ns = 0
        self._mark_ns = time.perf_counter_ns()

    def _account(self, result: TickResult) -> None:
        """Divide the time since the last tick."""
        whole_ms = (time.perf_counter_ns() - self._mark_ns) / NS_PER_MS
        read_ms, push_ms = self._read_ns / NS_PER_MS, self._push_ns / NS_PER_MS
        model_ms = 0.0 if result.chunk is None else result.chunk.times.total_ms
        known_ms = read_ms + push_ms + result.gate_ms + result.act_ms
        self.costs.append(
            TickCost(
                read_ms=read_ms,
                push_ms=push_ms,
                gate_ms=result.gate_ms,
                policy_ms=result.act_ms - model_ms,
                model_ms=model_ms,
                other_ms=whole_ms - known_ms,
            )
        )
        self._mark()


def _transport_remedy(bag: Bag, name: str, wanted: InputTopic) -> list[str]:
    """Return the option for a camera that was recorded with the other transport."""
    for transport, other in (
        ('compressed', f'{name}/compressed'),
        ('raw', name.removesuffix('/compressed')),
    ):
        if other != name and other in bag.topics:
            return [f'-p cameras.{wanted.name}.transport:={transport}']
    return []

"""A control core with a scripted policy, fed with CDR messages by the test."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from messages import joint_state_cdr, rgb_cdr, string_cdr

from pi05_ros.control.core import ControlCore, TickResult
from pi05_ros.control.inputs import Inputs
from pi05_ros.control.parameters import NodeSettings, settings_from_values
from pi05_ros.control.reasons import Skip
from pi05_ros.engine.pipeline import StageTimes
from pi05_ros.policy.robot import RobotSpec, load_robot
from pi05_ros.policy.types import ActionChunk, Observation

MS = 1_000_000
START_NS = 1_760_000_000_000_000_000
FRANKA = load_robot('franka')
JOINTS = list(FRANKA.state_joints)
TIMES = StageTimes(math.nan, 0.5, 2.0, 3.0, 4.0, math.nan, 9.5)
TASK = 'pick up the black bowl'


def gradient(height: int = 4, width: int = 6, start: int = 0) -> np.ndarray:
    """Return an image in which every pixel differs."""
    count = height * width * 3
    return (np.arange(count) + start).astype(np.uint8).reshape(height, width, 3)


class ScriptedPolicy:
    """Moves nothing; remembers observations; does what the test says on a call.

    Args:
        on_act: called first; may raise.
        value: of every action.
    """

    def __init__(self, on_act: Callable[[], None] = lambda: None, value: float = 0.25) -> None:
        self.on_act = on_act
        self.value = value
        self.seen: list[Observation] = []
        self.calls: list[tuple[int, int, int | None]] = []
        self.prepared: list[tuple[int, int]] = []
        self.rehearsed: list[Observation] = []

    def prepare(self, *, tick: int, seed: int) -> None:
        self.prepared.append((tick, seed))

    def rehearse(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> None:
        self.rehearsed.append(observation)

    def act(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> ActionChunk:
        self.on_act()
        self.seen.append(observation)
        self.calls.append((tick, seed, num_steps))
        return ActionChunk(
            actions=np.full((3, FRANKA.action_dim), self.value, dtype=np.float32),
            names=FRANKA.action_names,
            step_s=FRANKA.step_s,
            stamp_ns=observation.oldest_stamp_ns,
            stamps_ns=observation.stamps_ns,
            tick=tick,
            seed=seed,
            num_steps=num_steps or 10,
            prompt=observation.prompt,
            times=TIMES,
        )


def make_settings(robot: RobotSpec = FRANKA, **values: object) -> NodeSettings:
    """Return the shipped settings with a task and these changes."""
    chosen = {'prompt': TASK, 'rate_hz': 20.0, **values}
    return settings_from_values(
        {name.replace('__', '.'): value for name, value in chosen.items()}, robot.camera_names
    )


class Rig:
    """One core, its inputs and its policy; time is what the test says."""

    def __init__(self, policy: ScriptedPolicy | None = None, **values: object) -> None:
        self.settings = make_settings(**values)
        self.inputs = Inputs(FRANKA, self.settings)
        self.policy = policy or ScriptedPolicy()
        self.core = ControlCore(self.inputs, self.policy, self.settings)
        self.now_ns = START_NS

    def image(self, camera: str, age_ms: float = 10.0, image: np.ndarray | None = None) -> None:
        stamp_ns = self.now_ns - round(age_ms * MS)
        raw = rgb_cdr(gradient() if image is None else image, stamp_ns)
        self.core.push(camera, raw, stamp_ns + MS)

    def joints(self, age_ms: float = 5.0, names: list[str] | None = None, value=0.1) -> None:
        stamp_ns = self.now_ns - round(age_ms * MS)
        names = JOINTS if names is None else names
        raw = joint_state_cdr(names, [value] * len(names), stamp_ns=stamp_ns)
        self.core.push('joint_states', raw, stamp_ns + MS)

    def task(self, text: str) -> None:
        self.core.push('task_prompt', string_cdr(text), self.now_ns)

    def everything(self) -> None:
        """Push one fresh message of every sensor."""
        self.image('base')
        self.image('wrist')
        self.joints()

    def tick(self, after_ms: float = 0.0) -> TickResult:
        """Let time pass, then tick."""
        self.now_ns += round(after_ms * MS)
        return self.core.tick(self.now_ns)

    def fresh_tick(self, after_ms: float = 50.0) -> TickResult:
        """Let time pass, push fresh messages, then tick."""
        self.now_ns += round(after_ms * MS)
        self.core.advance(self.now_ns)
        self.everything()
        return self.core.tick(self.now_ns)

    def skip(self, after_ms: float = 0.0) -> Skip:
        """Tick, and return why it did not act."""
        result = self.tick(after_ms)
        assert result.chunk is None
        assert result.skip is not None
        self.assert_consistent()
        return result.skip

    def assert_consistent(self) -> None:
        counters = self.core.counters
        assert counters.ticks == counters.actions + sum(counters.skips.values())

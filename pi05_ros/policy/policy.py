"""The policy: one observation in, one chunk of actions in robot units out.

The way of the data, in the order of :meth:`Policy.act`::

    images, as the cameras gave them  ------------------------------.
    state   -> scale, robot transform, normalise -> bins -.          |
    prompt  -> one line of text --------------------------+-> tokens +-> pipeline -> actions
    seed, tick -> noise  --------------------------------------------'      |
    actions -> cut, unnormalise -> add the state -> robot transform, scale <'

Nothing is kept from one call to the next but the noise, which depends on seed and tick alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from pi05_ros.engine.pipeline import Pipeline

from .errors import PolicyError
from .noise import noise
from .robot import RobotSpec
from .stats import NormStats
from .tokenizer import PromptTokenizer
from .transforms import RobotUnits
from .types import ActionChunk, Observation

if TYPE_CHECKING:
    from pi05_ros.engine.cuda_pipeline import CudaPipeline
    from pi05_ros.engine.selfcheck import StageCheck
    from pi05_ros.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class PolicyInfo:
    """What runs, in words; every value is what was found, not what was asked for."""

    checkpoint: Path
    layout: str
    checkpoint_sha256: str
    robot: str
    stats_files: tuple[Path, ...]
    normalization: str
    tokenizer: Path
    tokenizer_is_paligemma: bool
    discrete_state: bool
    stage_backends: dict[str, str]
    precision: str
    device: str
    horizon: int
    num_steps: int

    def as_dict(self) -> dict[str, str]:
        """Return the keys and values of the diagnostics' Model status."""
        stages = {f'{stage}_backend': name for stage, name in self.stage_backends.items()}
        return {
            'checkpoint': str(self.checkpoint),
            'layout': self.layout,
            'checkpoint_sha256': self.checkpoint_sha256,
            'robot': self.robot,
            'stats_files': ', '.join(map(str, self.stats_files)),
            'normalization': self.normalization,
            'tokenizer': str(self.tokenizer),
            'tokenizer_is_paligemma': str(self.tokenizer_is_paligemma).lower(),
            'state_in_prompt': str(self.discrete_state).lower(),
            **stages,
            'precision': self.precision,
            'device': self.device,
            'horizon': str(self.horizon),
            'num_steps': str(self.num_steps),
        }


class Policy:
    """A loaded checkpoint bound to one robot; made by :func:`.loading.load_policy`.

    ``info`` says what runs: files, modes, backends. ``while_computing`` is called in every
    :meth:`act` while the host waits for a device; what it does must not take longer than that.
    """

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        robot: RobotSpec,
        stats: NormStats,
        tokenizer: PromptTokenizer,
        pipeline: Pipeline,
    ) -> None:
        self.checkpoint = checkpoint
        self.robot = robot
        self.stats = stats
        self.tokenizer = tokenizer
        self.pipeline = pipeline
        self._units = RobotUnits(robot)
        # What the robot file gives is put together here: a tick is late by all that it does.
        self._cameras = tuple(zip(robot.camera_names, pipeline.shape.view_sizes_px, strict=True))
        self._action_names, self._step_s = robot.action_names, robot.step_s
        self._drawn: tuple[tuple[int, int], np.ndarray] | None = None
        self.while_computing: Callable[[], None] | None = None
        # Once, here: the hash reads the whole weights file, which must not happen in a tick.
        self.info = self._describe()

    def act(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> ActionChunk:
        """Compute one chunk of actions from one observation.

        Args:
            observation: complete; images of the sizes that the policy was loaded for.
            tick: number of the control tick; with ``seed`` it determines the noise.
            seed: any 64-bit integer.
            num_steps: Euler steps; None takes what the policy was loaded with.
        Returns: actions (H, D) float32 in robot units, all finite.
        Raises:
            PolicyError: the observation is incomplete or not finite, the prompt does not fit, or
                the model gave a value that is not finite; carries the reason.
            BackendError: the pipeline cannot run this call.
        """
        shape = self.pipeline.shape
        state = self._state(observation)
        images, tokens, start = self._model_inputs(observation, state, tick, seed)
        result = self.pipeline.infer(
            images, tokens, start, num_steps, partial(self._rehearse_answer, start, state)
        )
        return ActionChunk(
            actions=self._robot_actions(result.actions, state),
            names=self._action_names,
            step_s=self._step_s,
            stamp_ns=observation.oldest_stamp_ns,
            stamps_ns=dict(observation.stamps_ns),
            tick=tick,
            seed=seed,
            num_steps=shape.num_steps if num_steps is None else num_steps,
            prompt=observation.prompt,
            times=result.times,
        )

    def prepare(self, *, tick: int, seed: int) -> None:
        """Draw the noise of a later tick, while there is time."""
        self._noise(seed, tick)

    def rehearse(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> None:
        """Do what :meth:`act` does before the model runs; nothing but the noise is kept.

        After a pause every operation comes from cold caches and takes several times as long.

        Raises:
            PolicyError, BackendError: as for :meth:`act`.
        """
        inputs = self._model_inputs(observation, self._state(observation), tick, seed)
        self.pipeline.rehearse(*inputs, num_steps)

    def self_check(self, observation: Observation, min_cosine: float) -> tuple[StageCheck, ...]:
        """Compare every fast stage with the oracle on one real observation.

        Returns: the agreement of each stage; empty where the oracle itself is what runs.
        Raises:
            SelfCheckError: a stage is below ``min_cosine``; the message has the figures.
            PolicyError: as for :meth:`act`.
        """
        if set(self.pipeline.stage_backends.values()) == {'eager'}:
            return ()
        from pi05_ros.engine.selfcheck import check_pipeline  # needs Triton

        inputs = self._model_inputs(observation, self._state(observation), tick=0, seed=0)
        fast = cast('CudaPipeline', self.pipeline)  # the only pipeline beside the oracle's
        return check_pipeline(fast, self.checkpoint, *inputs, min_cosine)

    def image_buffer(self, num_bytes: int) -> np.ndarray:
        """Return memory for a message with an image; see :meth:`Pipeline.image_buffer`."""
        return self.pipeline.image_buffer(num_bytes)

    def close(self) -> None:
        """Free the device memory; the policy cannot act afterwards."""
        self.pipeline.close()

    def _describe(self) -> PolicyInfo:
        pipeline = self.pipeline
        return PolicyInfo(
            checkpoint=Path(self.checkpoint.path),
            layout=self.checkpoint.layout,
            checkpoint_sha256=self.checkpoint.sha256,
            robot=self.robot.name,
            stats_files=self.stats.files,
            normalization=self.stats.describe(),
            tokenizer=self.tokenizer.info.path,
            tokenizer_is_paligemma=self.tokenizer.info.is_paligemma,
            discrete_state=self.robot.discrete_state,
            stage_backends=dict(pipeline.stage_backends),
            precision=pipeline.precision,
            device=pipeline.device,
            horizon=pipeline.shape.horizon,
            num_steps=pipeline.shape.num_steps,
        )

    def _model_inputs(
        self, observation: Observation, state: np.ndarray, tick: int, seed: int
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return what :meth:`Pipeline.infer` takes: images, tokens (T,), noise (H, A)."""
        images = self._images(observation)
        tokens = self.tokenizer.encode(observation.prompt, self._prompt_state(state))
        return images, tokens, self._noise(seed, tick)

    def _noise(self, seed: int, tick: int) -> np.ndarray:
        """Return the noise (H, A) float32 of a tick, which is drawn once."""
        if self._drawn is None or self._drawn[0] != (seed, tick):
            pipeline = self.pipeline
            drawn = noise(seed, tick, pipeline.shape.horizon, pipeline.config.action_dim)
            self._drawn = ((seed, tick), drawn)
        return self._drawn[1]

    def _images(self, observation: Observation) -> list[np.ndarray]:
        """Return the raw images in the model's view order; absent views are simply not there."""
        images = []
        for camera, size in self._cameras:
            image = observation.images.get(camera)
            if image is None:
                have = ', '.join(sorted(observation.images)) or 'none'
                raise PolicyError('missing_input', f'no image of camera {camera}; have: {have}')
            if image.shape[:2] != size:
                raise PolicyError(
                    'bad_image_size',
                    f'camera {camera} gives {image.shape[:2]} (height, width), the policy was '
                    f'loaded for {size}; reconfigure to change a camera size',
                )
            images.append(image)
        return images

    def _state(self, observation: Observation) -> np.ndarray:
        """Return the state (S,) float64 in the space of the statistics."""
        state = np.asarray(observation.state, dtype=np.float64)
        expected = (self.robot.state_dim,)
        if state.shape != expected:
            raise PolicyError(
                'joint_missing',
                f'the state has shape {state.shape}, robot {self.robot.name} needs {expected}: '
                f'{", ".join(self.robot.state_names)}',
            )
        self._check_state(state, state)
        with np.errstate(over='ignore'):  # an overflow is found below, by name
            values = self._units.state_to_policy(state)
        self._check_state(values, state)
        return values

    def _prompt_state(self, state: np.ndarray) -> np.ndarray | None:
        """Return the normalised state for the prompt, or None where it does not belong there."""
        if not self.robot.discrete_state or self.stats.state is None:
            return None
        with np.errstate(over='ignore'):
            normalized = self.stats.state.normalize(state)
        self._check_state(normalized, state)
        return normalized

    def _check_state(self, values: np.ndarray, state: np.ndarray) -> None:
        if not all(map(isfinite, values.tolist())):  # few numbers: faster than by NumPy
            i = int(np.isfinite(values).argmin())
            raise PolicyError(
                'joint_not_finite',
                f'{self.robot.state_names[i]} is {state[i]}, which gives {values[i]}; '
                'expected a finite number',
            )

    def _rehearse_answer(self, start: np.ndarray, state: np.ndarray) -> None:
        """Do what :meth:`act` does after the model, with the noise in place of its actions."""
        with suppress(PolicyError):  # the model's own are checked when they are there
            self._robot_actions(start, state)
        if self.while_computing is not None:
            self.while_computing()

    def _robot_actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Return the model's (H, A) as (H, D) float32 in robot units, every value finite."""
        self._check_actions(actions)
        used = actions[:, : self.robot.action_dim]  # what pads them to A is not computed with
        unnormalized = self.stats.actions.unnormalize(used)
        with np.errstate(over='ignore'):
            result = self._units.actions_to_robot(unnormalized, state).astype(np.float32)
        self._check_actions(result)
        return result

    def _check_actions(self, actions: np.ndarray) -> None:
        finite = np.isfinite(actions)
        if not finite.all():
            row, column = divmod(int(finite.argmin()), actions.shape[1])
            names = self.robot.action_names
            name = names[column] if column < len(names) else f'padding dimension {column}'
            raise PolicyError(
                'action_not_finite',
                f'the action {name} is {actions[row, column]} in row {row}; '
                'the whole chunk is refused',
            )

"""From settings to a policy that is loaded, checked on a real observation and warm."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import RobotSpec, load_robot
from pi05_ros.policy.types import Observation

from .core import PolicyLike
from .parameter_table import MAX_STEPS
from .parameters import NodeSettings, ParameterError

if TYPE_CHECKING:
    from pi05_ros.policy.policy import Policy

# The first call allocates and compiles; the third one has the speed of all later ones.
WARM_UP_CALLS = 3
# Stands in for the task while there is none yet; its actions are thrown away.
WARM_UP_PROMPT = 'do nothing'


class WarmUpError(Pi05Error):
    """The loaded model cannot act on the first real observation."""


def check_settings(settings: NodeSettings) -> RobotSpec:
    """Refuse the likely mistakes at once, before waiting for cameras or loading weights.

    Raises:
        Pi05Error: no checkpoint is named, or it or the robot file cannot be used.
    """
    from pi05_ros.model.checkpoint import open_checkpoint  # torch takes seconds to import

    robot = load_robot(settings.robot)
    if not settings.checkpoint:
        raise ParameterError(
            'checkpoint is empty; set it to a checkpoint directory '
            '(pi05-ros checkpoint make --size tiny --out DIR makes one to try)'
        )
    open_checkpoint(Path(settings.checkpoint).expanduser())
    return robot


def load(settings: NodeSettings, camera_sizes_px: Mapping[str, tuple[int, int]]) -> Policy:
    """Load the policy that the settings name.

    Args:
        camera_sizes_px: camera -> (height, width) of its images.
    Raises:
        Pi05Error: any file is unusable, the backend cannot run here, or a chunk has fewer rows
            than are to be sent.
    """
    from pi05_ros.policy.loading import PolicyOptions, load_policy  # torch, as above

    policy = load_policy(
        PolicyOptions(
            checkpoint=settings.checkpoint,
            robot=settings.robot,
            camera_sizes_px=camera_sizes_px,
            backend=settings.backend,
            precision=resolve_precision(settings),
            device=settings.device,
            tokenizer=settings.tokenizer,
            asset_id=settings.asset_id,
            num_steps=settings.num_steps,
            horizon=settings.horizon or None,
            max_steps=MAX_STEPS,
        )
    )
    rows = policy.info.horizon
    if settings.execute_horizon > rows:
        policy.close()
        raise ParameterError(
            f'execute_horizon is {settings.execute_horizon}, but a chunk has {rows} rows; '
            f'expected 0 (all of them) to {rows}'
        )
    return policy


def resolve_precision(settings: NodeSettings) -> str:
    """Return ``bfloat16`` or ``float32``: most CPUs have no bfloat16 arithmetic and crawl."""
    import torch  # takes seconds to import

    if settings.precision != 'auto':
        return settings.precision
    on_gpu = settings.device.startswith('cuda') or (
        settings.device == 'auto' and torch.cuda.is_available()
    )
    return 'bfloat16' if on_gpu else 'float32'


def self_check(policy: Policy, observation: Observation, settings: NodeSettings) -> str:
    """Compare the fast stages with the oracle on a real observation; return a line for the log.

    Raises:
        Pi05Error: a stage is below ``self_check_min_cosine``; has the figures of all.
    """
    checks = policy.self_check(observation, settings.self_check_min_cosine)
    if not checks:
        return 'every stage is the oracle itself, there is nothing to check it against'
    return f'against the oracle: {"; ".join(map(str, checks))}'


def warm_up(policy: PolicyLike, observation: Observation, settings: NodeSettings) -> float:
    """Call the policy a few times; the actions are not used.

    Returns: duration of the last call in ms.
    Raises:
        WarmUpError: the policy refuses a real observation, e.g. as its weights give NaN.
    """
    last_ms = 0.0
    for tick in range(WARM_UP_CALLS):
        began = time.perf_counter()
        try:
            policy.act(observation, tick=tick, seed=settings.seed, num_steps=settings.num_steps)
        except Pi05Error as refusal:
            raise WarmUpError(f'the first observation cannot be acted on: {refusal}') from refusal
        last_ms = (time.perf_counter() - began) * 1e3
    return last_ms

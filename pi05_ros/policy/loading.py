"""From a checkpoint directory and a robot file to a policy that can act."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from pi05_ros.engine.build import build_pipeline
from pi05_ros.engine.pipeline import PipelineShape
from pi05_ros.model.checkpoint import Checkpoint, open_checkpoint
from pi05_ros.model.config import Pi05Config

from .errors import RobotError
from .policy import Policy
from .robot import RobotSpec, load_robot
from .stats import load_stats
from .tokenizer import PromptTokenizer, find_tokenizer


@dataclass(frozen=True)
class PolicyOptions:
    """What to load, and for which inputs.

    Args:
        checkpoint: directory of the checkpoint.
        robot: a shipped robot name, or the path of a robot file.
        camera_sizes_px: camera name -> (height, width) of its images, one per camera of the robot.
        backend: 'auto', 'eager', 'cuda' or 'tensorrt'.
        precision: 'bfloat16' or 'float32'.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        tokenizer: path of the tokenizer; empty searches the checkpoint directory.
        asset_id: overrides the robot's asset id; empty keeps it.
        num_steps: Euler steps of a call that does not say.
        horizon: rows of a chunk; None takes the robot's, or else the checkpoint's.
        max_steps: most Euler steps that a call may ask for; None allows ``num_steps``.
    """

    checkpoint: str | Path
    robot: str
    camera_sizes_px: Mapping[str, tuple[int, int]]
    backend: str = 'auto'
    precision: str = 'bfloat16'
    device: str = 'auto'
    tokenizer: str = ''
    asset_id: str = ''
    num_steps: int = 10
    horizon: int | None = None
    max_steps: int | None = None


def load_policy(options: PolicyOptions) -> Policy:
    """Load everything that acting needs, the cheap and likely mistakes first.

    Raises:
        Pi05Error: the robot file, the checkpoint, its statistics, its tokenizer or the backend
            cannot be used; nothing stays allocated.
    """
    robot = load_robot(options.robot)
    checkpoint = open_checkpoint(Path(options.checkpoint).expanduser())
    config = checkpoint.config
    check_fit(robot, config)
    stats = load_stats(
        checkpoint.path, checkpoint.layout, robot, config.action_dim, options.asset_id
    )
    tokenizer = PromptTokenizer(
        find_tokenizer(checkpoint.path, options.tokenizer),
        max_tokens=config.max_prompt_tokens,
        vocab_size=config.vocab_size,
    )
    tokenizer.check_state_dim(robot.state_dim if robot.discrete_state else None)
    hashing = _start_hashing(checkpoint)
    pipeline = build_pipeline(
        checkpoint,
        pipeline_shape(options, robot, config),
        backend=options.backend,
        precision=options.precision,
        device=options.device,
    )
    hashing.join()
    return Policy(
        checkpoint=checkpoint, robot=robot, stats=stats, tokenizer=tokenizer, pipeline=pipeline
    )


def _start_hashing(checkpoint: Checkpoint) -> Thread:
    """Hash the weights beside loading them: 14 s for the full model on a CPU without SHA units."""

    def hash_weights() -> None:
        with suppress(OSError):  # whoever asks for the hash meets the error again
            _ = checkpoint.sha256

    thread = Thread(target=hash_weights, daemon=True)
    thread.start()
    return thread


def check_fit(robot: RobotSpec, config: Pi05Config) -> None:
    """Refuse a robot that the model has no room for.

    Raises:
        RobotError: more views, state or action dimensions than the checkpoint has.
    """
    for what, needs, has in (
        ('cameras', len(robot.camera_names), config.max_views),
        ('state dimensions', robot.state_dim, config.action_dim),
        ('action dimensions', robot.action_dim, config.action_dim),
    ):
        if needs > has:
            raise RobotError(
                f'robot {robot.name} has {needs} {what}, the checkpoint has room for {has}'
            )


def pipeline_shape(options: PolicyOptions, robot: RobotSpec, config: Pi05Config) -> PipelineShape:
    """Return the shape that the pipeline is built for.

    Raises:
        RobotError: the camera sizes are not those of exactly the robot's cameras.
    """
    sizes = options.camera_sizes_px
    if set(sizes) != set(robot.camera_names):
        raise RobotError(
            f'robot {robot.name} has the cameras {", ".join(robot.camera_names)}, '
            f'but image sizes are given for: {", ".join(sorted(sizes)) or "none"}'
        )
    default_horizon = robot.action_horizon or config.action_horizon
    return PipelineShape(
        view_sizes_px=tuple(sizes[name] for name in robot.camera_names),
        max_prompt_tokens=config.max_prompt_tokens,
        horizon=default_horizon if options.horizon is None else options.horizon,
        num_steps=options.num_steps,
        max_steps=options.num_steps if options.max_steps is None else options.max_steps,
    )

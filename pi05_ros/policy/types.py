"""What goes into the policy and what comes out, in robot units and without ROS types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pi05_ros.engine.pipeline import StageTimes


@dataclass(frozen=True)
class Observation:
    """One complete set of inputs, as the sensors gave them.

    Args:
        images: camera name -> (h, w, 3) uint8 RGB.
        state: (S,) float64 in robot units, in the order of the robot file; empty where the robot
            file declares no state.
        prompt: the task, as the user wrote it.
        stamps_ns: input name -> stamp of that input in nanoseconds of the ROS clock.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    prompt: str
    stamps_ns: Mapping[str, int]

    @property
    def oldest_stamp_ns(self) -> int:
        """Stamp of the oldest input, which becomes the stamp of the action."""
        return min(self.stamps_ns.values())


@dataclass(frozen=True)
class ActionChunk:
    """Actions in robot units, with what is needed to recompute them.

    Args:
        actions: (H, D) float32; row i belongs to ``stamp_ns + i * step_s``.
        names: D action dimension names, from the robot file.
        step_s: time between two rows, in seconds.
        stamp_ns: stamp of the oldest observation used.
        stamps_ns: stamp of each input used.
        tick: number of the control tick; with ``seed`` it determines the noise.
    """

    actions: np.ndarray
    names: tuple[str, ...]
    step_s: float
    stamp_ns: int
    stamps_ns: Mapping[str, int]
    tick: int
    seed: int
    num_steps: int
    prompt: str
    times: StageTimes

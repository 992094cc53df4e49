"""Numbers between the robot and the model: scale, normalise, add the state, ALOHA's own space.

Everything here is a pure function of float64 arrays. Letters: S state, A the model's action
dimension, D the robot's action dimension, H rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .robot import RobotSpec, Scaled

NormMode = Literal['quantile', 'zscore']


@dataclass(frozen=True)
class Normalizer:
    """An affine map per dimension, between policy units and what the model was trained on.

    Quantile maps ``offset .. offset + divisor`` to -1 .. 1, zscore maps to mean 0 and deviation 1.
    Nothing is clipped. Divisor and multiplier hold the epsilon of the training code, which is why
    they can differ (lerobot's zscore adds it in one direction only).

    Args:
        mode: 'quantile' or 'zscore'.
        offset: (N,) float64; the 1st percentile, or the mean.
        divisor: (N,) float64, positive.
        multiplier: (N,) float64.
    """

    mode: NormMode
    offset: np.ndarray
    divisor: np.ndarray
    multiplier: np.ndarray

    @property
    def dim(self) -> int:
        """Number of dimensions with statistics (N)."""
        return int(self.offset.shape[0])

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Map (..., M) policy units, M <= N, to the model's range; extra statistics are unused.

        Source: openpi transforms.py, Normalize (commit 15a9616).
        """
        count = values.shape[-1]
        scaled = (values - self.offset[:count]) / self.divisor[:count]
        return scaled * 2.0 - 1.0 if self.mode == 'quantile' else scaled

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Map (..., M) from the model's range to policy units, in float64.

        Dimensions beyond the statistics pass through unchanged: they are the model's padding.
        Source: openpi transforms.py, Unnormalize (commit 15a9616).
        """
        count = min(self.dim, values.shape[-1])
        result = np.array(values, dtype=np.float64)
        known = result[..., :count]
        share = (known + 1.0) / 2.0 if self.mode == 'quantile' else known
        result[..., :count] = share * self.multiplier[:count] + self.offset[:count]
        return result


def absolute_actions(actions: np.ndarray, state: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Add the state to the dimensions that the model gives relative to it, in every row.

    Args:
        actions: (H, A) in policy units.
        state: (S,) of the observation, in policy units; S covers the last index.
        deltas: indices, below A, of the dimensions to which the state of the same index is added.
    Source: openpi transforms.py, AbsoluteActions (commit 15a9616).
    """
    result = actions.copy()
    result[:, deltas] += state[deltas]
    return result


class RobotUnits:
    """The way between a robot's units and the space of the statistics.

    Made once per policy: in a tick, after a wait, every operation comes from cold caches and takes
    ten times as long as in a loop, so what depends on the robot alone is not computed there.
    """

    def __init__(self, robot: RobotSpec) -> None:
        self._is_aloha = robot.transform == 'aloha'
        self._action_dim = robot.action_dim
        self._deltas = np.flatnonzero(robot.delta_mask)
        self._state_scale, self._state_offset = _scale_offset(robot.state)
        self._action_scale, self._action_offset = _scale_offset(robot.actions)

    def state_to_policy(self, state: np.ndarray) -> np.ndarray:
        """Map a state (S,) from robot units to the space of the statistics."""
        values = state * self._state_scale + self._state_offset
        return aloha_state(values) if self._is_aloha else values

    def actions_to_robot(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Map unnormalised model output (H, A) to robot units (H, D).

        The order is openpi's: add the state, cut the padding, leave ALOHA's space; then units.

        Args:
            actions: (H, A) float64, unnormalised.
            state: (S,) as :meth:`state_to_policy` gave it.
        """
        absolute = absolute_actions(actions, state, self._deltas)[:, : self._action_dim]
        values = aloha_actions(absolute) if self._is_aloha else absolute
        return (values - self._action_offset) / self._action_scale


def _scale_offset(dims: Sequence[Scaled]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([dim.scale for dim in dims]), np.array([dim.offset for dim in dims])


# ALOHA's joints and the base model's differ in sign, and its grippers in kind: ALOHA has a linear
# position 0..1, the model an angle. Numbers: openpi aloha_policy.py:98-150 (commit 15a9616).
_ALOHA_SIGN = np.array([1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1], dtype=np.float64)
_ALOHA_GRIPPERS = [6, 13]
_GRIPPER_SHUT_M, _GRIPPER_OPEN_M = 0.01844, 0.05800
_GRIPPER_ARM_M, _GRIPPER_HORN_M = 0.036, 0.022
_MODEL_ANGLE_SHUT_RAD, _MODEL_ANGLE_OPEN_RAD = 0.5476, 1.6296
_LEADER_ANGLE_SHUT_RAD, _LEADER_ANGLE_OPEN_RAD = -0.6213, 1.4910


def aloha_state(state: np.ndarray) -> np.ndarray:
    """Map an ALOHA state (14,) to the base model's space."""
    result = _ALOHA_SIGN * state
    finger_m = state[_ALOHA_GRIPPERS] * (_GRIPPER_OPEN_M - _GRIPPER_SHUT_M) + _GRIPPER_SHUT_M
    # The horn and the arm of the gripper form a triangle with the finger's position as third side.
    with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
        sine = (_GRIPPER_HORN_M**2 + finger_m**2 - _GRIPPER_ARM_M**2) / (
            2 * _GRIPPER_HORN_M * finger_m
        )
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    span = _MODEL_ANGLE_OPEN_RAD - _MODEL_ANGLE_SHUT_RAD
    result[_ALOHA_GRIPPERS] = (angle - _MODEL_ANGLE_SHUT_RAD) / span
    return result


def aloha_actions(actions: np.ndarray) -> np.ndarray:
    """Map actions (H, 14) of the base model's space to ALOHA's."""
    result = _ALOHA_SIGN * actions
    angle = actions[:, _ALOHA_GRIPPERS] + _MODEL_ANGLE_SHUT_RAD
    span = _LEADER_ANGLE_OPEN_RAD - _LEADER_ANGLE_SHUT_RAD
    result[:, _ALOHA_GRIPPERS] = (angle - _LEADER_ANGLE_SHUT_RAD) / span
    return result

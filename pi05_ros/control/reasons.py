"""Why a tick published no action: stable names for counters, logs and diagnostics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pi05_ros.model.errors import Pi05Error


class Reason(str, Enum):
    """One name per cause. The values are part of the interface: people grep for them."""

    MISSING_INPUT = 'missing_input'
    STALE_INPUT = 'stale_input'
    FUTURE_STAMP = 'future_stamp'
    SKEWED_INPUTS = 'skewed_inputs'
    MALFORMED_MESSAGE = 'malformed_message'
    BAD_ENCODING = 'bad_encoding'
    BAD_STEP = 'bad_step'
    SHORT_BUFFER = 'short_buffer'
    BAD_IMAGE_SIZE = 'bad_image_size'
    UNDECODABLE_IMAGE = 'undecodable_image'
    JOINT_MISSING = 'joint_missing'
    JOINT_NOT_FINITE = 'joint_not_finite'
    PROMPT_TOO_LONG = 'prompt_too_long'
    CLOCK_JUMP_BACK = 'clock_jump_back'
    INFERENCE_FAILED = 'inference_failed'
    ACTION_NOT_FINITE = 'action_not_finite'
    ACTION_JUMP = 'action_jump'
    ACTION_TOO_FAST = 'action_too_fast'
    ACTION_TOO_LATE = 'action_too_late'
    ESTOP = 'estop'
    OVERRUN = 'overrun'

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Skip:
    """Why one tick did not act.

    Args:
        reason: the stable name.
        input_name: the guilty input; empty where no single input is guilty.
        detail: one line with the figure and its limit, e.g. ``wrist image 143 ms old > 80 ms``.
    """

    reason: Reason
    input_name: str
    detail: str

    def __str__(self) -> str:
        return f'{self.reason}: {self.detail}'


class InputFault(Pi05Error):
    """A message arrived that cannot be used; carries the reason that the tick will count."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

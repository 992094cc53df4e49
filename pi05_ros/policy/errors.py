"""What can be wrong with a robot file, statistics, a tokenizer or one observation."""

from __future__ import annotations

from typing import Literal

from pi05_ros.model.errors import Pi05Error

# Counted by name in the diagnostics; every one is also a reason of the control tick.
PolicyReason = Literal[
    'missing_input',
    'malformed_message',
    'bad_image_size',
    'joint_missing',
    'joint_not_finite',
    'prompt_too_long',
    'action_not_finite',
]


class RobotError(Pi05Error):
    """A robot file is missing, cannot be read, or does not fit the checkpoint."""


class UrdfError(Pi05Error):
    """A robot description cannot be read, or its limits do not fit the robot file."""


class NormError(Pi05Error):
    """Normalisation statistics are missing, damaged, or of another robot."""


class TokenizerError(Pi05Error):
    """The tokenizer file is missing, damaged, or of another model."""


class PolicyError(Pi05Error):
    """One call of the policy was refused; the next one may succeed.

    Args:
        reason: a stable name.
        message: what was found, what was expected.
    """

    def __init__(self, reason: PolicyReason, message: str) -> None:
        super().__init__(message)
        self.reason: PolicyReason = reason


class PromptError(PolicyError):
    """The task prompt is empty, cannot be encoded, or is too long."""

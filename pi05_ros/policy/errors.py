"""What can be wrong with a robot file, statistics, a tokenizer or one observation."""

from __future__ import annotations

from pi05_ros.model.errors import Pi05Error


class RobotError(Pi05Error):
    """A robot file is missing, cannot be read, or does not fit the checkpoint."""


class NormError(Pi05Error):
    """Normalisation statistics are missing, damaged, or of another robot."""


class TokenizerError(Pi05Error):
    """The tokenizer file is missing, damaged, or of another model."""


class PolicyError(Pi05Error):
    """One call of the policy was refused; the next one may succeed.

    Args:
        reason: a stable name that is counted in the diagnostics, such as ``state_not_finite``.
        message: what was found, what was expected.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class PromptError(PolicyError):
    """The task prompt is empty, cannot be encoded, or is too long."""

"""Every target by name."""

from __future__ import annotations

import checkpoint_targets
import file_targets
import message_targets
from target import Target

TARGETS: dict[str, Target] = {
    **message_targets.TARGETS,
    **checkpoint_targets.TARGETS,
    **file_targets.TARGETS,
}

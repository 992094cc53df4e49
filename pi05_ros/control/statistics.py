"""Where the time of the last ticks went."""

from __future__ import annotations

from dataclasses import fields

from pi05_ros.engine.pipeline import StageTimes
from pi05_ros.policy.types import ActionChunk

from .window import Window

STAGE_NAMES = tuple(field.name.removesuffix('_ms') for field in fields(StageTimes))


class TickStatistics:
    """Windows over the last ticks that acted, in ms.

    Attributes:
        stages: stage name (``vision``, ..., ``total``) -> window.
        tick: the whole tick on the host, inputs and publishing included.
        sensor_to_action: from the oldest observation's stamp to the action's publication.
    """

    def __init__(self) -> None:
        self.stages = {name: Window() for name in STAGE_NAMES}
        self.tick = Window()
        self.sensor_to_action = Window()

    def record(self, chunk: ActionChunk, tick_ms: float, sensor_to_action_ms: float) -> None:
        """Add one tick that acted."""
        for name, window in self.stages.items():
            window.add(getattr(chunk.times, f'{name}_ms'))
        self.tick.add(tick_ms)
        self.sensor_to_action.add(sensor_to_action_ms)

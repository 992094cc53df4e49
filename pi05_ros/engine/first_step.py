"""The first Euler step's layers beside the prefill, on a second stream.

The first step's input is the noise and its time is 1 whatever the images and the step count are,
and expert layer l reads the prefix K/V of layer l alone. So layer l of the first step can run as
soon as the prefill has filled that layer's cache: the same kernels with the same operands, and so
the same bits, as after the prefill. What is left to the denoise starts with the end of the step.
"""

from __future__ import annotations

import torch

from .denoise import DenoiseStage
from .prefill import PrefillStage


class FirstStepBesidePrefill:
    """Prefill and the first step's layers as one stage.

    Args:
        main: the stream on which :meth:`launch` is called.
        side: the stream of the first step; where its priority is lower than that of ``main``, it
            takes only multiprocessors that the prefill leaves free.
    """

    def __init__(
        self,
        prefill: PrefillStage,
        denoise: DenoiseStage,
        main: torch.cuda.Stream,
        side: torch.cuda.Stream,
    ) -> None:
        self._prefill, self._denoise = prefill, denoise
        self._main, self._side = main, side

    def launch(self, rows: int) -> None:
        """Enqueue both; whatever follows on the main stream follows both."""
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            self._denoise.launch_begin()
        self._prefill.launch(rows, after_cache=self._follow)
        self._main.wait_stream(self._side)

    def _follow(self, layer: int) -> None:
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            self._denoise.launch_first_layer(layer)

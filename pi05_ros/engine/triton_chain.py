"""The denoise as a chain of Triton kernels, for any GPU that Triton knows and its interpreter."""

from __future__ import annotations

import triton
from torch import Tensor

from pi05_ros.engine.denoise_layers import ExpertLayer, LayerBuffers
from pi05_ros.engine.denoise_tuning import DenoiseTuning
from pi05_ros.engine.expert_weights import ExpertWeights
from pi05_ros.engine.kernels import euler
from pi05_ros.engine.kernels.adarms import SCALE, table_row
from pi05_ros.engine.kernels.launch import block_size
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.sampler import step_size

_EULER_WARPS = 16


class TritonChain:
    """Six kernels per layer and one between steps.

    ``buffers.scaled`` holds x * (1 + scale) of the next norm.
    """

    backend = 'cuda'

    def __init__(
        self, config: Pi05Config, weights: ExpertWeights, buffers: LayerBuffers,
        noise: Tensor, actions: Tensor, tuning: DenoiseTuning,
    ) -> None:  # fmt: skip
        self.config, self._weights, self._buffers = config, weights, buffers
        self._noise, self._actions = noise, actions
        self.layer = ExpertLayer(buffers, weights, config.expert, tuning)

    def weights(self) -> ExpertWeights:
        """Return the weights as the checkpoint has them."""
        return self._weights

    def launch_begin(self, num_steps: int) -> None:
        """Enqueue the projection of the noise into the residual stream."""
        # Without PDL: everything enqueued before, such as the prefill, is complete after it.
        first = table_row(num_steps, 0)
        self._launch_euler(self._noise, first, first, 0.0, leave=False, enter=True, pdl=False)

    def launch_layer(self, num_steps: int, step: int, layer: int) -> None:
        """Enqueue one layer of one step."""
        self.layer.launch(table_row(num_steps, step), layer)

    def launch_step_end(self, num_steps: int, step: int) -> None:
        """Enqueue the Euler update and, unless it was the last step, the next step's input."""
        source = self._noise if step == 0 else self._actions
        row, following = table_row(num_steps, step), step + 1
        enter = following < num_steps
        self._launch_euler(
            source, row, table_row(num_steps, following) if enter else row,
            float(step_size(num_steps)), leave=True, enter=enter, pdl=self.layer.pdl,
        )  # fmt: skip

    def _launch_euler(
        self, source: Tensor, row: int, next_row: int, dt: float,
        *, leave: bool, enter: bool, pdl: bool,
    ) -> None:  # fmt: skip
        weights, width = self._weights, self.config.expert.width
        actions = self.config.action_dim
        euler.euler_kernel[(self._noise.shape[0],)](
            self._buffers.x, self._buffers.scaled, weights.modulations[next_row, 0, SCALE],
            weights.modulations[row, -1],
            weights.action_out, weights.action_out_bias,
            weights.action_in, weights.action_in_bias, source, self._actions, self.layer.ssq,
            dt, actions, W=width, PARTS=self.layer.parts,
            PARTS_POW2=triton.next_power_of_2(self.layer.parts),
            EPS=self.config.expert.rms_norm_eps, A_POW2=triton.next_power_of_2(actions),
            BK=block_size(width, 512, 'width'), LEAVE=leave, ENTER=enter,
            WARPS=_EULER_WARPS, PDL=pdl, PREFETCH=pdl,
            launch_pdl=pdl, num_warps=_EULER_WARPS,
        )  # fmt: skip

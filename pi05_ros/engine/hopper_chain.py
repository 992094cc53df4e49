"""The denoise as a chain of CUDA C++ kernels, for the released expert on Hopper GPUs."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from pi05_ros.engine.denoise_layers import LayerBuffers, shift_products
from pi05_ros.engine.expert_weights import ExpertWeights
from pi05_ros.engine.kernels import hopper_layout
from pi05_ros.engine.kernels.adarms import GATE, SCALE, SHIFT, table_row
from pi05_ros.engine.kernels.hopper_layout import PRODUCT_THREADS, PRODUCTS, THREADS, token_rows
from pi05_ros.engine.kernels.nvrtc import CudaKernel, TensorTiles, compile_module
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.sampler import step_size

_SOURCE = Path(hopper_layout.__file__).with_name('hopper_layer.cu')
# Products that get a block on every multiprocessor, see hopper_product.cuh.
_SPREAD = ('attention_out', 'gate_up', 'down')


def hopper_obstacle(config: Pi05Config, buffers: LayerBuffers) -> str | None:
    """Return why the chain cannot run with these buffers, or None if it can."""
    device, dtype = buffers.x.device, buffers.x.dtype
    if device.type != 'cuda' or torch.cuda.get_device_capability(device)[0] != 9:
        return f'{device} is no Hopper GPU'
    if dtype != torch.bfloat16:
        return f'they compute in bfloat16, not in {dtype}'
    return hopper_layout.hopper_misfit(
        config, buffers.x.shape[0], buffers.keys.shape[1], _processors(device)
    )


class HopperChain:
    """Six kernels; each is enqueued to start while the one before it still runs.

    ``buffers.scaled`` holds x * (1 + scale) of the next norm.
    """

    backend = 'cuda-hopper'

    def __init__(
        self, config: Pi05Config, weights: ExpertWeights, buffers: LayerBuffers,
        noise: Tensor, actions: Tensor,
    ) -> None:  # fmt: skip
        """Pack the weights and compile the kernels for this model and device.

        Raises:
            BackendError: the source does not compile here.
        """
        expert = config.expert
        self.config, self._buffers = config, buffers
        self._noise, self._actions = noise, actions
        self.horizon, device = noise.shape[0], noise.device
        plan = hopper_layout.hopper_plan(
            expert, self.horizon, buffers.keys.shape[1], _processors(device)
        )
        self.plan = plan
        self._packed = hopper_layout.pack_weights(weights, plan, expert)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        squares = floats(3, self.horizon, plan.square_parts(expert.width))
        self._entry_squares, self._attention_squares, self._mlp_squares = squares
        mods = weights.modulations
        self._qkv_shift = shift_products(mods[:, 0:-1:2, SHIFT], weights.qkv)
        self._gate_up_shift = shift_products(mods[:, 1:-1:2, SHIFT], weights.gate_up)
        self._velocity_bias = weights.action_out_bias + mods[:, -1, SHIFT] @ weights.action_out.T
        self._scale = expert.head_dim**-0.5 * math.log2(math.e)
        self._kernels = self._compile()

        def tiles(matrix: Tensor) -> TensorTiles:
            return TensorTiles(matrix, token_rows(self.horizon), hopper_layout.TILE_COLUMNS)

        self._scaled, self._attended = tiles(buffers.scaled), tiles(buffers.attended)
        self._activated = tiles(buffers.activated)

    def weights(self) -> ExpertWeights:
        """Return the weights as the checkpoint has them, a copy."""
        return hopper_layout.unpack_weights(self._packed, self.plan, self.config.expert)

    def defines(self) -> dict[str, int | str]:
        """Return the macros that the kernels are compiled with."""
        return hopper_layout.defines(self.plan, self.config, self.horizon)

    def _compile(self) -> dict[str, CudaKernel]:
        plan, horizon = self.plan, self.horizon
        expert, device = self.config.expert, self._noise.device
        module = compile_module(_SOURCE, tuple(self.defines().items()), device)
        shapes: dict[str, tuple[int, ...]] = {
            'attend': (
                plan.attend_blocks(expert, horizon), THREADS, plan.attend_bytes(expert.head_dim),
                plan.ranges,
            ),
            'step_end': (plan.step_end_blocks(horizon), THREADS, 0, plan.end_blocks),
        }  # fmt: skip
        for name in PRODUCTS:
            slab = getattr(plan, name)
            blocks = slab.blocks(*getattr(self._packed, name).shape[1:])
            if name in _SPREAD:
                blocks = max(blocks, _processors(device) // slab.split * slab.split)
            shapes[name] = (blocks, PRODUCT_THREADS, slab.shared_bytes(horizon), slab.split)
        return {name: CudaKernel(module, name, *shape) for name, shape in shapes.items()}

    def launch_begin(self, num_steps: int) -> None:
        """Enqueue the projection of the noise into the residual stream."""
        # Not early: everything enqueued before, such as the prefill, is complete after it.
        first = table_row(num_steps, 0)
        self._launch_step_end(self._noise, first, first, 0.0, leave=False, enter=True, early=False)

    def launch_layer(self, num_steps: int, step: int, layer: int) -> None:
        """Enqueue one layer of one step."""
        row = table_row(num_steps, step)
        self.launch_qkv(row, layer)
        self.launch_attend(row, layer)
        self.launch_attention_out(row, layer)
        self.launch_gate_up(row, layer)
        self.launch_down(row, layer)

    def launch_step_end(self, num_steps: int, step: int) -> None:
        """Enqueue the Euler update and, unless it was the last step, the next step's input."""
        source = self._noise if step == 0 else self._actions
        row, following = table_row(num_steps, step), step + 1
        enter = following < num_steps
        self._launch_step_end(
            source, row, table_row(num_steps, following) if enter else row,
            float(step_size(num_steps)), leave=True, enter=enter, early=True,
        )  # fmt: skip

    def launch_qkv(self, row: int, layer: int) -> None:
        """Enqueue q, k, v and their rotation."""
        b = self._buffers
        self._launch(
            'qkv', self._scaled, self._mlp_squares if layer else self._entry_squares,
            self._qkv_shift[row, layer], self._packed.qkv[layer], b.cos, b.sin, b.n_prefix, b.qkv,
        )  # fmt: skip

    def launch_attend(self, row: int, layer: int) -> None:
        """Enqueue the attention."""
        b = self._buffers
        self._launch(
            'attend', b.qkv, b.keys[layer], b.values[layer], b.n_prefix, b.attended, self._scale
        )

    def launch_attention_out(self, row: int, layer: int) -> None:
        """Enqueue the output projection and the gated residual."""
        self._launch_residual(
            'attention_out', self._attended, self._packed.attention_out[layer], row, 2 * layer,
            self._attention_squares,
        )  # fmt: skip

    def launch_gate_up(self, row: int, layer: int) -> None:
        """Enqueue gate, up and their product."""
        self._launch(
            'gate_up', self._scaled, self._attention_squares, self._gate_up_shift[row, layer],
            self._packed.gate_up[layer], self._buffers.activated,
        )  # fmt: skip

    def launch_down(self, row: int, layer: int) -> None:
        """Enqueue the down projection and the gated residual."""
        self._launch_residual(
            'down', self._activated, self._packed.down[layer], row, 2 * layer + 1,
            self._mlp_squares,
        )  # fmt: skip

    def _launch(self, name: str, *arguments: TensorTiles | Tensor | float) -> None:
        self._kernels[name].launch(arguments, early=True)

    def _launch_residual(
        self, name: str, tokens: TensorTiles, weight: Tensor, row: int, norm: int, squares: Tensor
    ) -> None:
        mods, b = self._packed.modulations[row], self._buffers
        gate, scale = mods[norm, GATE], mods[norm + 1, SCALE]
        self._launch(name, tokens, weight, gate, scale, b.x, b.scaled, squares)

    def _launch_step_end(
        self, source: Tensor, row: int, next_row: int, dt: float,
        *, leave: bool, enter: bool, early: bool,
    ) -> None:  # fmt: skip
        w, b = self._packed, self._buffers
        self._kernels['step_end'].launch(
            (
                b.scaled, self._mlp_squares, w.action_out, self._velocity_bias[row],
                w.action_in, w.action_in_bias, w.modulations[next_row, 0, SCALE],
                source, self._actions, b.x, self._entry_squares, dt, int(leave), int(enter),
            ),
            early=early,
        )  # fmt: skip


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

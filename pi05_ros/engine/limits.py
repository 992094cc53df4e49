"""What the CUDA backend can run, checked before a weight is read."""

from __future__ import annotations

import math

import torch

from pi05_ros.model.config import Pi05Config
from pi05_ros.model.names import expected_shapes
from pi05_ros.model.precision import parameter_dtype

from .pipeline import BackendError, PipelineShape
from .prefill import bucket_rows

_MIN_CAPABILITY = (8, 0)  # the first with bfloat16 matrix units
_MAX_VISION_TOKENS = 1024  # a view's scores are kept in registers, without a running softmax
_MAX_HORIZON = 512
# Captured graphs, cuBLAS workspaces and what a fragmented allocator holds; measured on an H200.
_RESERVE_BYTES = 1 << 30


def check_device(device: torch.device) -> None:
    """Refuse a device without CUDA or without bfloat16 matrix units."""
    if device.type != 'cuda' or not torch.cuda.is_available():
        raise BackendError(
            f"backend 'cuda' needs an NVIDIA GPU, got device {str(device)!r} and PyTorch "
            f"{torch.__version__}; use backend 'eager'"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        found, needed = ('.'.join(map(str, v)) for v in (capability, _MIN_CAPABILITY))
        raise BackendError(
            f'{torch.cuda.get_device_name(device)} has compute capability {found}; bfloat16 needs '
            f"{needed} (Ampere) or newer; use backend 'eager' in float32"
        )


def check_limits(config: Pi05Config, shape: PipelineShape) -> None:
    """Refuse what the kernels or the model cannot take, naming it."""
    views, prompt = len(shape.view_sizes_px), shape.max_prompt_tokens
    if not 1 <= views <= config.max_views:
        raise BackendError(f'{views} views asked for; the model takes 1 to {config.max_views}')
    if not 1 <= prompt <= config.max_prompt_tokens:
        raise BackendError(
            f'max_prompt_tokens {prompt} is outside 1 to {config.max_prompt_tokens}, which the '
            'model was trained with'
        )
    if not 1 <= shape.horizon <= _MAX_HORIZON:
        raise BackendError(f'horizon {shape.horizon} is outside 1 to {_MAX_HORIZON}')
    if not 1 <= shape.num_steps <= shape.max_steps:
        raise BackendError(f'num_steps {shape.num_steps} is outside 1 to {shape.max_steps}')
    _check_dimensions(config)


def _check_dimensions(config: Pi05Config) -> None:
    vlm, vision = config.vlm, config.vision
    advice = "use backend 'eager' for this model"
    if vlm.num_kv_heads != 1:
        raise BackendError(
            f'the fused attention shares one K/V head, the model has {vlm.num_kv_heads}; {advice}'
        )
    if vlm.head_dim & (vlm.head_dim - 1) or not 16 <= vlm.head_dim <= 256:
        raise BackendError(f'head_dim {vlm.head_dim} is no power of two from 16 to 256; {advice}')
    if vision.tokens_per_view > _MAX_VISION_TOKENS or not 16 <= vision.head_dim <= 128:
        raise BackendError(
            f'vision has {vision.tokens_per_view} tokens of head_dim {vision.head_dim}; the fused '
            f'attention takes up to {_MAX_VISION_TOKENS} tokens of 16 to 128; {advice}'
        )
    widths = {
        'vision width': vision.width,
        'vision mlp_dim': vision.mlp_dim,
        'vlm width': vlm.width,
        'vlm mlp_dim': vlm.mlp_dim,
        'expert width': config.expert.width,
    }
    for name, width in widths.items():
        if width % 8:
            raise BackendError(f'{name} {width} is no multiple of 8; {advice}')


def check_memory(
    config: Pi05Config, shape: PipelineShape, precision: str, device: torch.device
) -> None:
    """Refuse a GPU with too little free memory, saying how much is needed."""
    needed = needed_bytes(config, shape, precision)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise BackendError(
            f'{torch.cuda.get_device_name(device)} has {_gb(free)} of {_gb(total)} free, this '
            f'model in {precision} needs about {_gb(needed)}; close other programs on the GPU'
        )


def needed_bytes(config: Pi05Config, shape: PipelineShape, precision: str) -> int:
    """Estimate the most device memory that loading and running takes.

    The weights are on the device once, as they are taken over piece by piece; the expert's are
    there twice for a moment.
    """
    weights = expert = 0
    for name, size in expected_shapes(config).items():
        if name.endswith(('language_model.norm.weight', 'gemma_expert.lm_head.weight')):
            continue
        size_bytes = math.prod(size) * parameter_dtype(name, precision).itemsize
        weights += size_bytes
        expert += size_bytes if 'gemma_expert' in name else 0
    item = getattr(torch, precision).itemsize
    views, vision, vlm = len(shape.view_sizes_px), config.vision, config.vlm
    rows = bucket_rows(views * vision.tokens_per_view, shape.max_prompt_tokens)[-1] + 128
    per_row = 2 * vlm.width + (3 * vlm.num_heads + 2) * vlm.head_dim + 3 * vlm.mlp_dim
    activations = rows * (per_row + 2 * vlm.depth * vlm.head_dim)
    activations += views * vision.tokens_per_view * (10 * vision.width + vision.mlp_dim)
    return weights + expert + activations * item + _RESERVE_BYTES


def _gb(size_bytes: int) -> str:
    return f'{size_bytes / 1e9:.1f} GB'

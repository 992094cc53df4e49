"""Which dtype each parameter has (openpi gemma_pytorch.py)."""

from __future__ import annotations

import torch

from .errors import ConfigError

PRECISIONS = ('float32', 'bfloat16')

# Parts of a parameter's name, in a checkpoint or in the model, that keep it in float32 although
# the rest of the model is bfloat16: openpi's gemma_pytorch.py keeps the norms of both Gemma
# stacks and SigLIP's two input tables; the projections around the expert were never cast.
_ALWAYS_FLOAT32 = (
    'patch_embedding',
    'position_embedding',
    'input_layernorm',
    'post_attention_layernorm',
    '.norm.',
    'action_in_proj',
    'action_out_proj',
    'time_mlp_in',
    'time_mlp_out',
)


def parameter_dtype(name: str, precision: str) -> torch.dtype:
    """Return the dtype of one parameter.

    Args:
        name: its name in the model or in a checkpoint.
        precision: one of :data:`PRECISIONS`.
    Raises:
        ConfigError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f'unknown precision {precision!r}; known: {", ".join(PRECISIONS)}')
    if precision == 'float32' or any(part in name for part in _ALWAYS_FLOAT32):
        return torch.float32
    return torch.bfloat16

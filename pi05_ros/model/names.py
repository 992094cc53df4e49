"""The names of the tensors in a checkpoint, and what they are called in :class:`Pi05Model`.

A checkpoint uses the names of openpi's PyTorch model; lerobot puts ``model.`` in
front of each.
"""

from __future__ import annotations

import torch

from .config import Pi05Config
from .pi05 import Pi05Model

_PALIGEMMA = 'paligemma_with_expert.paligemma.model.'
_VISION = _PALIGEMMA + 'vision_tower.vision_model.'
_EXPERT = 'paligemma_with_expert.gemma_expert.'

# (prefix in the model, prefix in a checkpoint); what is in neither column has the same name.
_PREFIXES = (
    ('vision.patch_embedding.', _VISION + 'embeddings.patch_embedding.'),
    ('vision.position_embedding.', _VISION + 'embeddings.position_embedding.'),
    ('vision.layers.', _VISION + 'encoder.layers.'),
    ('vision.post_layernorm.', _VISION + 'post_layernorm.'),
    ('projector.', _PALIGEMMA + 'multi_modal_projector.linear.'),
    ('token_embedding.', 'paligemma_with_expert.paligemma.lm_head.'),
    ('language.', _PALIGEMMA + 'language_model.'),
    ('expert.', _EXPERT + 'model.'),
)

# The token embedding is tied to the output head of the language model and is stored under either
# name; where both are there, the embedding's own name counts.
EMBEDDING = 'paligemma_with_expert.paligemma.lm_head.weight'
EMBEDDING_ALIAS = _PALIGEMMA + 'language_model.embed_tokens.weight'

# Tensors that inference never reads. openpi writes both; only the second may be absent.
UNUSED_NORM = _PALIGEMMA + 'language_model.norm.weight'
UNUSED_HEAD = _EXPERT + 'lm_head.weight'


def checkpoint_name(model_name: str) -> str:
    """Return the checkpoint's name of a parameter of :class:`Pi05Model`."""
    for ours, theirs in _PREFIXES:
        if model_name.startswith(ours):
            return theirs + model_name.removeprefix(ours)
    return model_name


def model_name(checkpoint_name: str) -> str:
    """Return the name in :class:`Pi05Model` of a tensor of a checkpoint."""
    for ours, theirs in _PREFIXES:
        if checkpoint_name.startswith(theirs):
            return ours + checkpoint_name.removeprefix(theirs)
    return checkpoint_name


def expected_shapes(config: Pi05Config) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that openpi writes for a model of these dimensions."""
    with torch.device('meta'):
        model = Pi05Model(config)
    shapes = {checkpoint_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    shapes[UNUSED_NORM] = (config.vlm.width,)
    shapes[UNUSED_HEAD] = (config.vocab_size, config.expert.width)
    return shapes


def canonical_name(stored: str, layout: str) -> str | None:
    """Return openpi's name of a tensor as it is stored; None where it is to be ignored.

    Args:
        stored: the name in the file.
        layout: 'lerobot' also knows two names of π0 that some π0.5 uploads carry.
    """
    name = stored.removeprefix('model.')
    if layout == 'lerobot':
        if name.startswith('state_proj.'):
            return None
        name = name.replace('action_time_mlp_', 'time_mlp_', 1)
    return name

from __future__ import annotations

import math

import pytest
import torch

from pi05_ros.model.config import Pi05Config
from pi05_ros.model.names import (
    canonical_name,
    checkpoint_name,
    expected_shapes,
    model_name,
)
from pi05_ros.model.pi05 import Pi05Model


def published_shapes() -> dict[str, list[int]]:
    """Return the released model's tensors, written out without any config."""
    shapes: dict[str, list[int]] = {}
    paligemma = 'paligemma_with_expert.paligemma.model.'
    vision = paligemma + 'vision_tower.vision_model.'
    shapes[vision + 'embeddings.patch_embedding.weight'] = [1152, 3, 14, 14]
    shapes[vision + 'embeddings.patch_embedding.bias'] = [1152]
    shapes[vision + 'embeddings.position_embedding.weight'] = [256, 1152]
    for i in range(27):
        layer = f'{vision}encoder.layers.{i}.'
        for norm in ('layer_norm1', 'layer_norm2'):
            shapes[f'{layer}{norm}.weight'] = shapes[f'{layer}{norm}.bias'] = [1152]
        for projection in 'qkv':
            shapes[f'{layer}self_attn.{projection}_proj.weight'] = [1152, 1152]
            shapes[f'{layer}self_attn.{projection}_proj.bias'] = [1152]
        shapes[f'{layer}self_attn.out_proj.weight'] = [1152, 1152]
        shapes[f'{layer}self_attn.out_proj.bias'] = [1152]
        shapes[f'{layer}mlp.fc1.weight'] = [4304, 1152]
        shapes[f'{layer}mlp.fc1.bias'] = [4304]
        shapes[f'{layer}mlp.fc2.weight'] = [1152, 4304]
        shapes[f'{layer}mlp.fc2.bias'] = [1152]
    shapes[vision + 'post_layernorm.weight'] = shapes[vision + 'post_layernorm.bias'] = [1152]
    shapes[paligemma + 'multi_modal_projector.linear.weight'] = [2048, 1152]
    shapes[paligemma + 'multi_modal_projector.linear.bias'] = [2048]
    shapes['paligemma_with_expert.paligemma.lm_head.weight'] = [257152, 2048]
    stacks = (
        (paligemma + 'language_model.', 2048, 16384),
        ('paligemma_with_expert.gemma_expert.model.', 1024, 4096),
    )
    for stack, width, mlp in stacks:
        for i in range(18):
            layer = f'{stack}layers.{i}.'
            shapes[layer + 'self_attn.q_proj.weight'] = [2048, width]
            shapes[layer + 'self_attn.k_proj.weight'] = [256, width]
            shapes[layer + 'self_attn.v_proj.weight'] = [256, width]
            shapes[layer + 'self_attn.o_proj.weight'] = [width, 2048]
            shapes[layer + 'mlp.gate_proj.weight'] = [mlp, width]
            shapes[layer + 'mlp.up_proj.weight'] = [mlp, width]
            shapes[layer + 'mlp.down_proj.weight'] = [width, mlp]
            for norm in ('input_layernorm', 'post_attention_layernorm'):
                if width == 2048:
                    shapes[f'{layer}{norm}.weight'] = [2048]
                else:
                    shapes[f'{layer}{norm}.dense.weight'] = [3072, 1024]
                    shapes[f'{layer}{norm}.dense.bias'] = [3072]
    shapes[paligemma + 'language_model.norm.weight'] = [2048]
    shapes['paligemma_with_expert.gemma_expert.model.norm.dense.weight'] = [3072, 1024]
    shapes['paligemma_with_expert.gemma_expert.model.norm.dense.bias'] = [3072]
    shapes['paligemma_with_expert.gemma_expert.lm_head.weight'] = [257152, 1024]
    shapes |= {'action_in_proj.weight': [1024, 32], 'action_in_proj.bias': [1024]}
    shapes |= {'action_out_proj.weight': [32, 1024], 'action_out_proj.bias': [32]}
    for part in ('time_mlp_in', 'time_mlp_out'):
        shapes |= {f'{part}.weight': [1024, 1024], f'{part}.bias': [1024]}
    return shapes


def test_full_model_has_exactly_the_published_names_and_shapes():
    found = {name: list(shape) for name, shape in expected_shapes(Pi05Config.full()).items()}
    assert found == published_shapes()


def test_full_model_has_the_published_number_of_parameters():
    """SigLIP and projector 414.8 M, language model 1981.8 M, expert 311.4 M and 116.5 M."""
    with torch.device('meta'):
        model = Pi05Model(Pi05Config.full())
    millions = {
        part: round(sum(math.prod(p.shape) for p in getattr(model, part).parameters()) / 1e6, 1)
        for part in ('vision', 'projector', 'language', 'expert', 'token_embedding')
    }
    assert round(millions['vision'] + millions['projector'], 1) == pytest.approx(414.8, abs=0.11)
    assert millions['language'] == pytest.approx(1981.8, abs=0.11)
    assert millions['expert'] == pytest.approx(311.4 + 116.5, abs=0.11)
    assert millions['token_embedding'] == 526.6


def test_names_translate_both_ways():
    with torch.device('meta'):
        model = Pi05Model(Pi05Config.tiny())
    for name, _ in model.named_parameters():
        assert model_name(checkpoint_name(name)) == name


@pytest.mark.parametrize(
    'stored,layout,name',
    [
        ('action_in_proj.bias', 'openpi', 'action_in_proj.bias'),
        ('model.action_in_proj.bias', 'lerobot', 'action_in_proj.bias'),
        ('model.action_time_mlp_in.bias', 'lerobot', 'time_mlp_in.bias'),
        ('action_time_mlp_in.bias', 'openpi', 'action_time_mlp_in.bias'),
        ('model.state_proj.weight', 'lerobot', None),
        ('state_proj.weight', 'openpi', 'state_proj.weight'),
    ],
)
def test_stored_names_become_openpis(stored: str, layout: str, name: str | None):
    assert canonical_name(stored, layout) == name

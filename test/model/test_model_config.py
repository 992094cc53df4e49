from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from model_files import GOLDEN_DIR, small_config

from pi05_ros.model.config import Pi05Config
from pi05_ros.model.errors import ConfigError

DIMS = json.loads((GOLDEN_DIR / 'dims.json').read_text())


def test_full_prefix_is_the_published_968():
    assert Pi05Config.full().prefix_tokens(num_views=3, prompt_tokens=200) == 968


@pytest.mark.parametrize('config', [Pi05Config.full(), Pi05Config.tiny(), small_config()])
def test_dims_read_back_as_they_were_written(config: Pi05Config):
    assert Pi05Config.from_dims(json.loads(json.dumps(config.to_dims()))) == config


@pytest.mark.parametrize(
    'section,key,value,message',
    [
        ('vision', 'depth', 0, 'vision.depth must be a positive integer, got 0'),
        ('vision', 'width', 97, 'width 97 is not a multiple of its 4 heads'),
        ('vlm', 'head_dim', 32.0, 'vlm.head_dim must be a positive integer, got 32.0'),
        ('vlm', 'rms_norm_eps', 'tiny', "rms_norm_eps must be a positive number, got 'tiny'"),
        ('expert', 'colour', 3, "unknown dimension 'colour'; known: "),
        ('expert', 'depth', 4, 'depth must be equal; got vlm 3 and expert 4'),
        ('expert', 'num_heads', None, 'expert: .*num_heads'),
        ('', 'vocab', True, 'vocab must be a positive integer, got True'),
        ('', 'vision', [1], r'vision must be an object with dimensions, got \[1\]'),
    ],
)
def test_a_wrong_dimension_is_named(section: str, key: str, value: Any, message: str):
    dims = copy.deepcopy(DIMS)
    target = dims[section] if section else dims
    if value is None:
        del target[key]
    else:
        target[key] = value
    with pytest.raises(ConfigError, match=message):
        Pi05Config.from_dims(dims)

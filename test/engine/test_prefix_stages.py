"""Vision and prefill of the fast path, over plain operations: the same stages on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_pipeline import PlainPipeline, draw_images

from pi05_ros.engine.pipeline import PipelineShape
from pi05_ros.engine.prefill import bucket_rows
from pi05_ros.model.checkpoint import load_model, load_state, open_checkpoint
from pi05_ros.model.images import resize_with_pad, to_pixels


@pytest.fixture(scope='module')
def checkpoint(golden_dir):
    return open_checkpoint(golden_dir)


@pytest.fixture(scope='module')
def oracle(checkpoint):
    return load_model(checkpoint, 'cpu', 'float32')


@pytest.fixture
def make(checkpoint, oracle):
    """Return a function that builds the stages for some camera sizes."""

    def build(sizes, longest=200, folded=False):
        shape = PipelineShape(tuple(sizes), longest, checkpoint.config.action_horizon)
        return PlainPipeline(load_state(checkpoint), checkpoint.config, shape, oracle, folded)

    return build


@pytest.mark.parametrize('folded', [False, True], ids=['norms-apart', 'norms-folded'])
@pytest.mark.parametrize('case', ['two_views_37_tokens', 'three_views_200_tokens'])
def test_prefix_and_cache_equal_openpi(make, golden_dir, case, folded):
    golden = np.load(golden_dir / f'{case}_float32.npz')
    views = golden['images_u8'][golden['view_mask']]
    tokens = golden['tokens'][golden['token_mask']]
    pipeline = make([views.shape[1:3]] * len(views), folded=folded)
    rows = pipeline.run_prefix(list(views), tokens, golden['noise'])
    for name, found in (
        ('prefix_embs', pipeline.prefill.prefix[:rows]),
        ('prefix_keys', pipeline.prefill.keys[:, :rows]),
        ('prefix_values', pipeline.prefill.values[:, :rows]),
    ):
        assert np.abs(found.numpy() - golden[name]).max() < 2e-5, name


def test_cameras_of_different_sizes_are_resized_as_the_oracle_does(make, checkpoint, oracle):
    sizes = [(96, 128), (150, 120)]
    pipeline, images = make(sizes), draw_images(sizes)
    noise = np.zeros((checkpoint.config.action_horizon, 32), np.float32)
    tokens = np.arange(5)
    pipeline.run_prefix(images, tokens, noise)
    px = checkpoint.config.vision.image_px
    views = np.stack([resize_with_pad(image, px) for image in images])
    with torch.inference_mode():
        expected = oracle.embed_images(to_pixels(torch.tensor(views))).flatten(0, 1)
    assert torch.allclose(pipeline.prefill.prefix[:512], expected, atol=2e-5)


def test_a_longer_bucket_changes_nothing_that_is_valid(make, checkpoint):
    pipeline, images = make([(224, 224)]), draw_images([(224, 224)])
    noise = np.zeros((checkpoint.config.action_horizon, 32), np.float32)
    tokens = np.arange(7)
    rows = pipeline.run_prefix(images, tokens, noise)
    keys = pipeline.prefill.keys[:, :rows].clone()
    pipeline.run_prefix(images, np.arange(200), noise)  # leaves a long prompt's K and V behind
    pipeline.run_prefix(images, tokens, noise, rows=pipeline.prefill.buckets[-1])
    assert torch.allclose(pipeline.prefill.keys[:, :rows], keys, atol=1e-5)


def test_padded_rows_are_finite(make, checkpoint):
    pipeline = make([(224, 224)])
    noise = np.zeros((checkpoint.config.action_horizon, 32), np.float32)
    pipeline.run_prefix(draw_images([(224, 224)]), np.arange(3), noise)
    rows = pipeline.prefill.bucket(3)
    assert torch.isfinite(pipeline.prefill.keys[:, :rows]).all()


def test_every_prompt_length_has_a_bucket_just_above_it():
    buckets = bucket_rows(512, 200)
    assert buckets[-1] == 712 and list(buckets) == sorted(set(buckets))
    for tokens in range(1, 201):
        rows = next(rows for rows in buckets if rows >= 512 + tokens)
        assert rows - 512 - tokens < 8


def test_only_some_prefix_lengths_are_timed(make):
    timed = make([(224, 224)] * 2, longest=100).prefill.tuned_buckets
    assert timed == (544, 576, 608, 612)


@pytest.mark.parametrize('longest', [1, 7, 8, 9, 64])
def test_buckets_end_at_the_longest_prompt(longest):
    assert bucket_rows(256, longest)[-1] == 256 + longest

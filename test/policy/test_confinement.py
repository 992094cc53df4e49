"""A name that a file gives stays in the checkpoint; links that lie there are followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from policy_files import feature_stats, lerobot_steps, write_lerobot, write_norm_stats

from pi05_ros.model.checkpoint import check_weights, open_checkpoint
from pi05_ros.model.errors import CheckpointError
from pi05_ros.policy.errors import NormError, RobotError
from pi05_ros.policy.robot import find_robot, load_robot
from pi05_ros.policy.stats import find_openpi_stats, load_stats
from pi05_ros.policy.tokenizer import find_tokenizer

OUTWARD = ('../outside', '/outside', 'a/../../outside', '..', './../outside', 'a//b', '~/outside')


@pytest.mark.parametrize('asset_id', OUTWARD)
def test_an_asset_of_a_robot_file_does_not_lead_out(tmp_path, asset_id):
    text = find_robot('libero').read_text()
    line = next(line for line in text.splitlines() if line.startswith('asset_id:'))
    path = tmp_path / 'robot.yaml'
    path.write_text(text.replace(line, f'asset_id: {asset_id}'))
    with pytest.raises(RobotError, match='asset_id'):
        load_robot(str(path))


@pytest.mark.parametrize('asset_id', OUTWARD)
def test_an_asset_does_not_lead_out_though_the_file_is_there(tmp_path, asset_id):
    write_norm_stats(tmp_path / 'outside', feature_stats(8), feature_stats(7))
    (tmp_path / 'checkpoint' / 'assets').mkdir(parents=True)
    with pytest.raises(NormError, match='not a relative path of plain names'):
        find_openpi_stats(tmp_path / 'checkpoint', asset_id)


@pytest.mark.parametrize('lead', ['../', '{parent}/', './', 'sub/../../'])
def test_a_state_file_of_a_processor_does_not_lead_out(tmp_path, lead):
    before, after = lerobot_steps('QUANTILES')
    checkpoint = tmp_path / 'checkpoint'
    write_lerobot(checkpoint, (before, after), feature_stats(8), feature_stats(7))
    step = next(step for step in before['steps'] if 'state_file' in step)
    shutil.copy(checkpoint / step['state_file'], tmp_path)
    step['state_file'] = lead.format(parent=tmp_path) + step['state_file']
    (checkpoint / 'policy_preprocessor.json').write_text(json.dumps(before))
    with pytest.raises(NormError, match='is no name of a safetensors file beside it'):
        load_stats(checkpoint, 'lerobot', load_robot('libero_lerobot'), 32)


def test_the_index_of_a_split_checkpoint_is_not_followed(tmp_path):
    index = {'weight_map': {'a': '../outside.safetensors'}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(CheckpointError, match='it is split into several files; join them'):
        open_checkpoint(tmp_path)


def test_a_snapshot_of_links_into_a_store_of_blobs_is_read(tmp_path, tiny_checkpoint: Path):
    """The cache of huggingface_hub: every file of a snapshot is a link to ../../blobs."""
    blobs, snapshot = tmp_path / 'blobs', tmp_path / 'snapshots' / 'main'
    for number, path in enumerate(sorted(tiny_checkpoint.rglob('*'))):
        if path.is_file():
            blobs.mkdir(exist_ok=True)
            shutil.copy(path, blobs / str(number))
            link = snapshot / path.relative_to(tiny_checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blobs / str(number))
    check_weights(open_checkpoint(snapshot))
    assert find_tokenizer(snapshot).is_symlink()
    assert load_stats(snapshot, 'openpi', load_robot('franka'), 32).files[0].is_symlink()

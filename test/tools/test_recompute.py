from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bag_files import Row
from replay_bags import (
    CHUNK,
    TYPESTORE,
    chunk_row,
    serialize,
    shipped_rows,
    write_with_chunks,
)

from pi05_ros.tools.bag import open_bag
from pi05_ros.tools.random_checkpoint import make_checkpoint
from pi05_ros.tools.recompute import add_parser, run
from pi05_ros.tools.recomputer import RecomputeError
from pi05_ros.tools.remapping import Remapping
from pi05_ros.tools.replayer import Replay, Setup

TOPIC = '/pi05_policy/dry_run/action_chunk'


def recompute(*arguments: object) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return run(parser.parse_args(['recompute', *map(str, arguments)]))


@pytest.fixture(scope='module')
def answered(short_bag: Path, tiny_checkpoint: Path) -> Replay:
    overrides = {
        'checkpoint': str(tiny_checkpoint), 'rate_hz': 10.0, 'num_steps': 2, 'seed': 9,
        'precision': 'float32', 'backend': 'eager',
    }  # fmt: skip
    run = Replay(Setup(None, overrides).settings(), Remapping())
    with open_bag(short_bag) as bag:
        run.run(bag)
    return run


@pytest.fixture
def chunks(answered: Replay) -> list[Row]:
    assert answered.policy_info is not None
    made_with = {
        'checkpoint_sha256': answered.policy_info['checkpoint_sha256'],
        'backend': 'eager',
        'precision': 'float32',
    }
    return [
        chunk_row(TOPIC, result.now_ns + 3_000_000, result.chunk, **made_with)
        for result in answered.results
        if result.chunk is not None
    ]


def record(path: Path, rows: list[Row]) -> Path:
    return write_with_chunks(path, sorted(rows, key=lambda row: row[2]))


def test_recorded_actions_follow_from_the_recorded_inputs(
    chunks, tiny_checkpoint, tmp_path, capsys
):
    bag = record(tmp_path / 'bag', [*shipped_rows(), *chunks])
    assert recompute(bag, '--checkpoint', tiny_checkpoint) == 0
    assert '6 identical bit for bit, 0 different, 0 not recomputed' in capsys.readouterr().out


def test_chunks_of_which_only_some_rows_were_sent_follow_from_the_whole(
    answered, tiny_checkpoint, tmp_path, capsys
):
    made_with = {
        'checkpoint_sha256': answered.policy_info['checkpoint_sha256'],
        'backend': 'eager', 'precision': 'float32',
    }  # fmt: skip
    sent = [
        chunk_row(TOPIC, r.now_ns, replace(r.chunk, actions=r.chunk.actions[:3]), **made_with)
        for r in answered.results
    ]
    bag = record(tmp_path / 'bag', [*shipped_rows(), *sent])
    given = ('--checkpoint', tiny_checkpoint, '-p', 'execute_horizon:=3')
    assert recompute(bag, *given) == 0
    assert '6 identical bit for bit, 0 different, 0 not recomputed' in capsys.readouterr().out


def test_inputs_that_the_recorder_got_after_the_chunk_are_found(chunks, tiny_checkpoint, tmp_path):
    late = [(*row[:2], row[2] + 100_000_000, row[3]) for row in shipped_rows()]
    bag = record(tmp_path / 'bag', [*late, *chunks])
    assert recompute(bag, '--checkpoint', tiny_checkpoint) == 0


def test_a_chunk_that_does_not_follow_is_shown(
    answered, chunks, tiny_checkpoint, tmp_path, capsys
):
    result = answered.results[2]
    actions = result.chunk.actions.copy()
    actions[0, 3] += 0.25
    forged = chunk_row(
        TOPIC, result.now_ns + 3_000_000, replace(result.chunk, actions=actions),
        checkpoint_sha256=answered.policy_info['checkpoint_sha256'],
        backend='eager', precision='float32',
    )  # fmt: skip
    bag = record(tmp_path / 'bag', [*shipped_rows(), *chunks[:2], forged, *chunks[3:]])
    assert recompute(bag, '--checkpoint', tiny_checkpoint) == 1
    shown = capsys.readouterr().out
    assert '5 identical bit for bit, 1 different, 0 not recomputed' in shown
    assert 'first difference: tick 2, row 0, panda_joint4' in shown


def test_an_input_that_was_not_recorded_is_named(chunks, tiny_checkpoint, tmp_path, capsys):
    rows = shipped_rows()
    rows.remove([row for row in rows if row[0] == '/camera/wrist/image_raw'][1])
    bag = record(tmp_path / 'bag', [*rows, *chunks])
    assert recompute(bag, '--checkpoint', tiny_checkpoint) == 1
    assert 'tick 0: no wrist with the stamp' in capsys.readouterr().out


def test_other_weights_are_an_error(chunks, tmp_path):
    make_checkpoint('tiny', tmp_path / 'other', seed=1)
    bag = record(tmp_path / 'bag', [*shipped_rows(), *chunks])
    with pytest.raises(RecomputeError, match='tick 0 was made with checkpoint'):
        recompute(bag, '--checkpoint', tmp_path / 'other')


def test_a_recording_without_chunks_is_an_error(short_bag, tiny_checkpoint):
    with pytest.raises(RecomputeError, match='has pi05_ros/msg/ActionChunk on no topic; record'):
        recompute(short_bag, '--checkpoint', tiny_checkpoint)


def test_a_chunk_whose_provenance_does_not_fit_together_is_an_error(
    chunks, tiny_checkpoint, tmp_path
):
    message = TYPESTORE.deserialize_cdr(chunks[1][3], CHUNK)
    message.input_stamps = message.input_stamps[1:]
    spoilt = (*chunks[1][:3], serialize(message, CHUNK))
    bag = record(tmp_path / 'bag', [*shipped_rows(), chunks[0], spoilt])
    with pytest.raises(RecomputeError, match='is not a pi05_ros/msg/ActionChunk of this version'):
        recompute(bag, '--checkpoint', tiny_checkpoint)


def test_two_topics_with_chunks_need_a_choice(chunks, tiny_checkpoint, tmp_path):
    twice = [*chunks, *(('/other', *row[1:]) for row in chunks)]
    bag = record(tmp_path / 'bag', [*shipped_rows(), *twice])
    with pytest.raises(RecomputeError, match='choose one with --topic'):
        recompute(bag, '--checkpoint', tiny_checkpoint)
    assert recompute(bag, '--checkpoint', tiny_checkpoint, '--topic', 'other') == 0
    with pytest.raises(RecomputeError, match='no pi05_ros/msg/ActionChunk on /none'):
        recompute(bag, '--checkpoint', tiny_checkpoint, '--topic', '/none')

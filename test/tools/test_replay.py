"""The command line: the same actions from the same recording, and a report whatever happens."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_files import LIBERO_BAG, write_bag
from replay_bags import (
    IMAGE,
    JOINTS,
    STRING,
    as_png,
    cut,
    edit_message,
    edited,
    shipped_rows,
)

from pi05_ros.tools.action_log import ActionLog
from pi05_ros.tools.cli import main

# Every tick of 10 Hz in 0.6 s: cheap, and still several of them.
FAST = ['--rate-hz', '10', '-p', 'num_steps:=1', '--precision', 'float32', '--backend', 'eager']


class Run:
    """One call of ``pi05-ros replay``."""

    def __init__(self, status: int, report: dict[str, Any], actions: Path) -> None:
        self.status = status
        self.report = report
        self.actions = actions

    @property
    def digest(self) -> str:
        assert self.status == 0, self.report['error']
        assert self.report['actions'] > 0
        return str(self.report['actions_sha256'])


@pytest.fixture
def replay(tmp_path: Path, tiny_checkpoint: Path):
    def call(bag: Path, *options: str) -> Run:
        out, actions = tmp_path / 'report.json', tmp_path / 'actions.npz'
        out.unlink(missing_ok=True)
        actions.unlink(missing_ok=True)
        status = main([
            'replay', str(bag), '--checkpoint', str(tiny_checkpoint), *FAST, *options,
            '--out', str(out), '--actions', str(actions),
        ])  # fmt: skip
        return Run(status, json.loads(out.read_text()), actions)

    return call


# ---- the same actions


def test_same_command_gives_the_same_report_and_file(replay, short_bag: Path):
    first = replay(short_bag)
    content = first.actions.read_bytes()
    second = replay(short_bag)
    assert first.digest == second.digest
    assert second.actions.read_bytes() == content


def test_digest_is_of_the_bytes_in_the_file(replay, short_bag: Path):
    run = replay(short_bag)
    with np.load(run.actions) as file:
        assert file['actions'].dtype == np.dtype('<f4')
        assert hashlib.sha256(file['actions'].tobytes()).hexdigest() == run.digest


def test_storage_makes_no_difference(replay, short_bag: Path, tmp_path: Path):
    sqlite = write_bag(tmp_path / 'sqlite', shipped_rows(), storage='sqlite3')
    assert list(sqlite.glob('*.db3'))
    assert replay(sqlite).digest == replay(short_bag).digest


def test_lossless_compression_makes_no_difference(replay, short_bag: Path, tmp_path: Path):
    png = write_bag(tmp_path / 'png', edited(shipped_rows(), as_png))
    params = tmp_path / 'params.yaml'
    cameras = {name: {'transport': 'compressed'} for name in ('base', 'wrist')}
    params.write_text(json.dumps({'pi05_policy': {'ros__parameters': {'cameras': cameras}}}))
    assert replay(png, '--params-file', str(params)).digest == replay(short_bag).digest


def test_lossy_compression_makes_a_difference(replay, short_bag: Path):
    options = [f'cameras.{name}.transport:=compressed' for name in ('base', 'wrist')]
    jpeg = replay(LIBERO_BAG, '--rate-hz', '1', '-p', options[0], '-p', options[1])
    raw = replay(LIBERO_BAG, '--rate-hz', '1')
    assert jpeg.report['ticks'] == raw.report['ticks']
    assert jpeg.digest != raw.digest


def test_seed_makes_a_difference(replay, short_bag: Path):
    assert replay(short_bag, '--seed', '1').digest != replay(short_bag).digest


def test_remapped_topics_make_no_difference(replay, short_bag: Path, tmp_path: Path):
    def rename(row):
        return [(row[0].replace('/camera/base', '/front'), *row[1:])]

    renamed = write_bag(tmp_path / 'renamed', edited(shipped_rows(), rename))
    rule = 'camera/base/image_raw:=/front/image_raw'
    assert replay(renamed, '--remap', rule).digest == replay(short_bag).digest


def test_namespace_applies_to_every_topic(replay, short_bag: Path, tmp_path: Path):
    def into_namespace(row):
        return [(f'/left{row[0]}', *row[1:])]

    moved = write_bag(tmp_path / 'moved', edited(shipped_rows(), into_namespace))
    assert replay(moved, '--remap', '__ns:=/left').digest == replay(short_bag).digest


def test_no_option_is_needed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    # One tick is enough here: with the shipped defaults it is the shipped bag, whole.
    monkeypatch.setattr('pi05_ros.tools.replayer.Replay.run', lambda self, bag: None)
    assert main(['replay']) == 1
    assert 'a tiny one of random weights is made' in capsys.readouterr().out


@pytest.mark.ros
def test_other_encodings_are_read_as_the_node_reads_them(
    replay, short_bag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / 'cv_bridge.py').write_text(
        'import numpy\n'
        'class CvBridgeError(Exception): pass\n'
        'class CvBridge:\n'
        '    def imgmsg_to_cv2(self, message, desired_encoding):\n'
        '        assert (message.encoding, desired_encoding) == ("own", "rgb8")\n'
        '        pixels = numpy.frombuffer(message.data, numpy.uint8)\n'
        '        return pixels.reshape(message.height, message.width, 3)\n'
    )

    # Not there at first, and gone for the tests that follow.
    monkeypatch.setitem(sys.modules, 'cv_bridge', None)

    def rename(message):
        message.encoding = 'own'

    bag = write_bag(tmp_path / 'own', edited(shipped_rows(), edit_message(IMAGE, rename)))
    assert "encoding 'own' is not one of" in replay(bag).report['error']
    monkeypatch.delitem(sys.modules, 'cv_bridge')
    monkeypatch.syspath_prepend(tmp_path)
    assert replay(bag).digest == replay(short_bag).digest


# ---- what is told


def test_report_adds_up(replay, short_bag: Path):
    report = replay(short_bag).report
    assert report['ticks'] == report['actions'] + sum(report['skips'].values()) == 6
    assert report['first_tick_ns'] % report['period_ns'] == 0
    assert report['messages']['base'] == 13
    parts = sum(report['overhead_parts_mean_ms'].values())
    assert parts == pytest.approx(report['overhead_per_tick_ms']['mean_ms'])
    assert report['stages']['denoise']['count'] == report['actions']
    assert report['model']['denoise_backend'] == 'eager'
    assert report['error'] is None


def test_output_shows_ticks_stages_overhead_and_digest(replay, short_bag, capsys):
    digest = replay(short_bag).digest
    shown = capsys.readouterr().out
    assert f'SHA-256 of the actions: {digest}' in shown
    assert re.search(r'outside of the model: mean \d+\.\d\d ms per tick', shown)
    assert re.search(r'KV prefill +\d', shown)
    assert re.search(r'action +6\b', shown)


def test_comparing_with_itself_is_identical(replay, short_bag, tmp_path, capsys):
    reference = tmp_path / 'reference.npz'
    replay(short_bag, '--record-golden', str(reference))
    report = replay(short_bag, '--compare', str(reference)).report
    assert report['comparison']['identical'] is True
    assert 'identical bit for bit on 6 common ticks' in capsys.readouterr().out


def test_comparing_names_the_first_difference(replay, short_bag, tmp_path, capsys):
    reference = tmp_path / 'reference.npz'
    replay(short_bag, '--record-golden', str(reference))
    comparison = replay(short_bag, '--seed', '7', '--compare', str(reference)).report['comparison']
    assert comparison['identical'] is False
    assert comparison['first_difference']['tick'] == 0
    assert len(comparison['dimensions']) == 8
    assert all(d['mean_abs_error'] > 0 for d in comparison['dimensions'])
    assert 'first difference: tick 0, row 0, panda_joint1' in capsys.readouterr().out


def test_comparing_with_something_else_is_refused_before_the_replay(short_bag, tmp_path, capsys):
    other = tmp_path / 'other.npz'
    np.savez(other, weights=np.zeros(3))
    assert main(['replay', str(short_bag), '--compare', str(other)]) == 2
    assert 'is not an action log' in capsys.readouterr().err


# ---- bad input: an error or a counted skip, and the report all the same


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_truncated_bag_is_an_error_with_a_report(replay, tmp_path, storage, capsys):
    whole = write_bag(tmp_path / 'whole', shipped_rows(), storage=storage)
    file = next(path for path in whole.iterdir() if path.suffix in ('.mcap', '.db3'))
    cut(file, file, 0.6)
    run = replay(whole)
    assert run.status == 2
    assert re.search('cannot be read as a bag', run.report['error'])
    assert str(run.report['error']) in capsys.readouterr().err


def test_missing_topic_is_an_error_that_lists_the_topics(replay, tmp_path):
    rows = [row for row in shipped_rows() if 'wrist' not in row[0]]
    run = replay(write_bag(tmp_path / 'bag', rows))
    assert run.status == 2
    assert re.search(
        r'no /camera/wrist/image_raw \(sensor_msgs/msg/Image\).*Its topics: /camera/base/',
        run.report['error'],
    )


def test_other_transport_is_an_error_with_the_options_to_give(replay, short_bag, tmp_path):
    bag = write_bag(tmp_path / 'bag', edited(shipped_rows(), as_png))
    run = replay(bag)
    assert run.status == 2
    given = run.report['error'].split('Give ')[1].split()
    assert given == [
        '-p', 'cameras.base.transport:=compressed', '-p', 'cameras.wrist.transport:=compressed',
    ]  # fmt: skip
    assert replay(bag, *given).digest == replay(short_bag).digest


def test_other_type_is_an_error_that_names_both(replay, tmp_path):
    def retype(row):
        return [row if row[1] != JOINTS else (row[0], STRING, *row[2:])]

    run = replay(write_bag(tmp_path / 'bag', edited(shipped_rows(), retype)))
    assert run.status == 2
    assert re.search(
        '/joint_states is std_msgs/msg/String, expected sensor_msgs/msg/JointState',
        run.report['error'],
    )


def test_joints_of_another_robot_are_an_error_that_names_them(replay, tmp_path):
    def rename(message):
        message.name = [name.replace('panda', 'ur5') for name in message.name]

    run = replay(write_bag(tmp_path / 'b', edited(shipped_rows(), edit_message(JOINTS, rename))))
    assert run.status == 2
    assert re.search(r'lacks panda_joint1.*it has ur5_joint1', run.report['error'])
    assert run.report['ticks'] == 0


def test_joints_that_change_on_the_way_are_counted(replay, tmp_path):
    rows = shipped_rows()
    middle_ns = (rows[0][2] + rows[-1][2]) // 2

    def rename(message):
        message.name = [f'other_{name}' for name in message.name]

    edit = edit_message(JOINTS, rename)
    spoilt = [new for row in rows for new in (edit(row) if row[2] > middle_ns else [row])]
    run = replay(write_bag(tmp_path / 'bag', spoilt))
    assert run.status == 0
    assert run.report['skips'] == {'joint_missing': 3}
    assert run.report['actions'] == 3


def test_stamps_out_of_order_are_counted(replay, tmp_path):
    seen = 0

    def jump_back(message):
        nonlocal seen
        seen += 1
        if seen > 10:
            message.header.stamp.sec -= 5

    rows = edited(shipped_rows(), edit_message(IMAGE, jump_back))
    run = replay(write_bag(tmp_path / 'bag', rows))
    assert run.report['skips']['stale_input'] > 0
    assert 'ms old > 100 ms' in run.report['first_skips']['stale_input']['detail']


def test_records_out_of_order_are_replayed_in_order(replay, short_bag, tmp_path):
    shuffled = write_bag(tmp_path / 'bag', shipped_rows()[::-1])
    assert replay(shuffled).digest == replay(short_bag).digest


def test_zero_duration_is_an_error(replay, tmp_path):
    rows = shipped_rows()
    off_the_tick_ns = rows[0][2] + 1
    rows = [(*row[:2], off_the_tick_ns, row[3]) for row in rows]
    run = replay(write_bag(tmp_path / 'bag', rows))
    assert run.status == 2
    assert re.search('the recording is too short', run.report['error'])


def test_bag_without_messages_is_an_error(replay, tmp_path):
    run = replay(write_bag(tmp_path / 'bag', []))
    assert run.status == 2
    assert run.report['error']


def test_no_task_is_counted_and_no_action_is_status_1(replay, tmp_path, capsys):
    rows = [row for row in shipped_rows() if row[0] != '/task_prompt']
    run = replay(write_bag(tmp_path / 'bag', rows))
    assert run.status == 1
    assert run.report['skips'] == {'missing_input': 6}
    assert 'prompt is empty' in run.report['first_skips']['missing_input']['detail']
    assert 'skip: missing_input' in capsys.readouterr().out


def test_without_an_action_there_is_nothing_to_pin(replay, tmp_path, capsys):
    rows = [row for row in shipped_rows() if row[0] != '/task_prompt']
    golden = tmp_path / 'golden.npz'
    run = replay(write_bag(tmp_path / 'bag', rows), '--record-golden', str(golden))
    assert run.status == 2
    assert 'nothing to pin' in capsys.readouterr().err
    assert not golden.exists()


def test_file_that_cannot_be_written_is_refused_before_the_replay(short_bag, tmp_path, capsys):
    nowhere = tmp_path / 'nowhere' / 'actions.npz'
    with pytest.raises(SystemExit) as ended:
        main(['replay', str(short_bag), '--actions', str(nowhere)])
    assert ended.value.code == 2
    found = capsys.readouterr()
    assert f'cannot write {nowhere}' in found.err
    assert not found.out


def test_task_can_come_from_the_parameter(replay, tmp_path):
    rows = [row for row in shipped_rows() if row[0] != '/task_prompt']
    run = replay(write_bag(tmp_path / 'bag', rows), '-p', 'prompt:=lift the bowl')
    assert run.status == 0


def test_unknown_parameter_is_an_error_with_a_report(replay, short_bag):
    run = replay(short_bag, '-p', 'num_step:=3')
    assert run.status == 2
    assert 'did you mean num_steps?' in run.report['error']


def test_path_that_is_no_bag_is_an_error_with_a_report(replay, tmp_path):
    run = replay(tmp_path / 'nothing')
    assert run.status == 2
    assert 'does not exist' in run.report['error']


def test_actions_of_a_broken_off_replay_are_saved(replay, tmp_path, monkeypatch):
    from pi05_ros.tools.bag import Bag, BagError

    read = Bag.messages

    def break_off(self, topics=None):
        for number, message in enumerate(read(self, topics)):
            if number == 60:
                raise BagError('the file is damaged here')
            yield message

    bag = write_bag(tmp_path / 'bag', shipped_rows())
    monkeypatch.setattr(Bag, 'messages', break_off)
    golden = tmp_path / 'golden.npz'
    run = replay(bag, '--record-golden', str(golden))
    assert run.status == 2
    assert not golden.exists()
    assert run.report['error'] == 'the file is damaged here'
    assert run.report['actions'] == len(ActionLog.load(run.actions).ticks) > 0

import shutil
from pathlib import Path

import pytest
from bag_files import (
    LIBERO_BAG,
    START_NS,
    string_cdr,
    write_bag,
    write_split_bag,
    write_unindexed_mcap,
)

from pi05_ros.tools.bag import BagError, open_bag

STRING = 'std_msgs/msg/String'


def string_rows(*entries: tuple[str, int]) -> list:
    return [(topic, STRING, ns, string_cdr(f'{topic} {ns}')) for topic, ns in entries]


def test_shipped_bag_lists_its_topics_and_counts():
    with open_bag(LIBERO_BAG) as bag:
        assert bag.topics['/joint_states'].count == 300
        assert bag.topics['/camera/wrist/image_raw'].msgtype == 'sensor_msgs/msg/Image'
        assert bag.message_count == 601
        assert bag.duration_ns == 2_990_000_000


def test_a_pass_of_a_loop_lasts_one_interval_longer_than_the_recording():
    with open_bag(LIBERO_BAG) as bag:
        assert bag.lap_ns == 3_000_000_000


def test_a_lone_storage_file_reads_like_its_directory():
    with open_bag(LIBERO_BAG) as whole, open_bag(LIBERO_BAG / f'{LIBERO_BAG.name}.mcap') as lone:
        assert list(lone.messages()) == list(whole.messages())


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_messages_come_in_receive_order_with_ties_by_topic_name(tmp_path, storage):
    rows = string_rows(('/b', 20), ('/a', 20), ('/b', 5), ('/c', 20), ('/a', 30))
    with open_bag(write_bag(tmp_path / 'bag', rows, storage)) as bag:
        order = [(message.topic, message.receive_ns - START_NS) for message in bag.messages()]
    assert order == [('/b', 5), ('/a', 20), ('/b', 20), ('/c', 20), ('/a', 30)]


def test_both_storages_give_the_same_bytes_in_the_same_order(tmp_path):
    with open_bag(LIBERO_BAG) as bag:
        messages = list(bag.messages(['/joint_states', '/eef_pose', '/task_prompt']))
        rows = [
            (m.topic, bag.topics[m.topic].msgtype, m.receive_ns - START_NS, m.raw)
            for m in messages
        ]
    with open_bag(write_bag(tmp_path / 'bag', rows[::-1], 'sqlite3')) as copy:
        assert list(copy.messages()) == messages


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_files_of_a_split_recording_are_merged_by_receive_stamp(tmp_path, storage):
    parts = [
        string_rows(('/a', 0), ('/b', 10), ('/b', 21)),
        string_rows(('/a', 20), ('/b', 22), ('/c', 30)),
        string_rows(('/a', 29), ('/b', 30)),
    ]
    with open_bag(write_split_bag(tmp_path / 'bag', parts, storage)) as bag:
        order = [(m.topic, m.receive_ns - START_NS) for m in bag.messages()]
        assert bag.topics['/b'].count == 4
    assert order == [
        ('/a', 0), ('/b', 10), ('/a', 20), ('/b', 21), ('/b', 22), ('/a', 29), ('/b', 30),
        ('/c', 30),
    ]  # fmt: skip


def test_a_file_without_an_index_is_read_in_receive_order(tmp_path):
    rows = string_rows(('/a', 10), ('/b', 0), ('/b', 30), ('/a', 20), ('/a', 30))
    with open_bag(write_unindexed_mcap(tmp_path / 'bag.mcap', rows)) as bag:
        order = [(m.topic, m.receive_ns - START_NS) for m in bag.messages(['/a', '/b'])]
        assert [m.receive_ns - START_NS for m in bag.messages(['/a'])] == [10, 20, 30]
    assert order == [('/b', 0), ('/a', 10), ('/a', 20), ('/a', 30), ('/b', 30)]


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
@pytest.mark.parametrize('compression', ['file', 'message'])
def test_compression_makes_no_difference(tmp_path, storage, compression):
    rows = string_rows(('/b', 20), ('/a', 20), ('/b', 5))
    plain = write_bag(tmp_path / 'plain', rows, storage)
    packed = write_bag(tmp_path / 'packed', rows, storage, compression)
    with open_bag(plain) as first, open_bag(packed) as second:
        assert list(second.messages()) == list(first.messages())


@pytest.mark.parametrize('compression', ['file', 'message'])
def test_a_lone_file_of_a_compressed_recording_names_the_directory(tmp_path, compression):
    packed = write_bag(tmp_path / 'bag', string_rows(('/a', 0)), compression=compression)
    file = next(path for path in packed.iterdir() if path.name != 'metadata.yaml')
    with pytest.raises(BagError, match='give the directory'), open_bag(file) as bag:
        list(bag.messages())


def test_only_the_topics_asked_for_are_read():
    with open_bag(LIBERO_BAG) as bag:
        assert {message.topic for message in bag.messages(['/eef_pose'])} == {'/eef_pose'}


def test_a_topic_that_was_not_recorded_is_named():
    with (
        open_bag(LIBERO_BAG) as bag,
        pytest.raises(BagError, match='no topic /nope; it has /'),
    ):
        list(bag.messages(['/nope', '/eef_pose']))


def test_a_bag_that_spans_no_time_cannot_be_looped(tmp_path):
    with (
        open_bag(write_bag(tmp_path / 'bag', string_rows(('/a', 0)))) as bag,
        pytest.raises(BagError, match='cannot be looped'),
    ):
        _ = bag.lap_ns


def copy_of_libero(tmp_path: Path) -> tuple[Path, Path]:
    copy = Path(shutil.copytree(LIBERO_BAG, tmp_path / 'bag'))
    storage = copy / f'{LIBERO_BAG.name}.mcap'
    storage.chmod(0o644)
    return copy, storage


@pytest.mark.parametrize('kept_bytes', [0, 5, 60, 2_000_000, -1])
def test_a_truncated_bag_is_refused_in_one_line(tmp_path, kept_bytes):
    copy, storage = copy_of_libero(tmp_path)
    storage.write_bytes(storage.read_bytes()[:kept_bytes])
    with pytest.raises(BagError, match='truncated') as caught, open_bag(copy):
        pass
    assert '\n' not in str(caught.value)


def test_damage_in_the_middle_is_reported_after_the_messages_before_it(tmp_path):
    copy, storage = copy_of_libero(tmp_path)
    content = bytearray(storage.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    storage.write_bytes(content)
    count = 0
    with open_bag(copy) as bag, pytest.raises(BagError, match='cannot be read as a bag'):
        for _ in bag.messages():
            count += 1
    assert 0 < count < 601


def test_what_is_not_a_bag_is_refused_with_what_was_expected(tmp_path):
    text = tmp_path / 'notes.mcap'
    text.write_text('not a recording')
    with pytest.raises(BagError, match=r'does not exist; expected'), open_bag(tmp_path / 'gone'):
        pass
    with pytest.raises(BagError, match=r'no metadata\.yaml'), open_bag(tmp_path):
        pass
    with pytest.raises(BagError, match='cannot be read as a bag'), open_bag(text):
        pass


@pytest.mark.parametrize('name', ['a' * 300, 'nul\0'])
def test_a_path_that_cannot_be_looked_at_is_refused_in_one_line(tmp_path, name):
    with (
        pytest.raises(BagError, match='does not exist|cannot be read') as caught,
        open_bag(tmp_path / name),
    ):
        pass
    assert '\n' not in str(caught.value)


def test_metadata_that_is_not_yaml_is_refused(tmp_path):
    copy, _ = copy_of_libero(tmp_path)
    (copy / 'metadata.yaml').chmod(0o644)
    (copy / 'metadata.yaml').write_text('rosbag2_bagfile_information: [')
    with pytest.raises(BagError, match='cannot be read as a bag'), open_bag(copy):
        pass

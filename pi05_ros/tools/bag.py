"""Read a rosbag2 recording (MCAP or sqlite3) in receive order, as the bytes that were recorded.

The order does not depend on the storage: messages that were received in the same nanosecond come
in the order of their topic names. Whoever reads a bag, live or offline, reads it through here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rosbags.interfaces import ConnectionExtRosbag2, QosDurability
from rosbags.rosbag2 import Reader

from pi05_ros.model.errors import Pi05Error

from .bag_order import ordered_rows

# How a Zstandard frame begins, and no CDR message.
_ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'


class BagError(Pi05Error):
    """The path is not a readable rosbag2 recording, or lacks what was asked of it."""


@dataclass(frozen=True)
class BagTopic:
    """One recorded topic; ``latched`` if its publisher offered transient-local durability."""

    name: str
    msgtype: str
    count: int
    latched: bool


@dataclass(frozen=True)
class BagMessage:
    """One recorded message: ``raw`` is the CDR payload with its encapsulation bytes."""

    topic: str
    receive_ns: int
    raw: bytes


class Bag:
    """An open recording; made by :func:`open_bag`.

    ``topics`` maps each recorded topic name to its :class:`BagTopic`, sorted by name.
    """

    def __init__(self, path: Path, reader: Reader) -> None:
        self.path = path
        self._reader = reader
        self.topics = _topics(path, reader)
        self.message_count = sum(topic.count for topic in self.topics.values())

    @property
    def start_ns(self) -> int:
        """Receive time of the first message, nanoseconds of the recording machine's clock."""
        return self._reader.start_time

    @property
    def duration_ns(self) -> int:
        """Time from the first message to the last."""
        # rosbags counts to the nanosecond after the last message.
        return max(self._reader.duration - 1, 0)

    @property
    def lap_ns(self) -> int:
        """Length of one pass in a loop: the duration and one interval of the busiest topic.

        Without that interval the first message of a pass would fall on the last of the pass
        before it.
        """
        busiest = max((topic.count for topic in self.topics.values()), default=0)
        if busiest < 2 or self.duration_ns == 0:
            raise BagError(f'{self.path}: its messages span no time, so it cannot be looped')
        return self.duration_ns + self.duration_ns // (busiest - 1)

    def require(self, names: Collection[str]) -> None:
        """Raise a :class:`BagError` that names each topic of ``names`` that was not recorded."""
        missing = [name for name in names if name not in self.topics]
        if missing:
            raise BagError(
                f'{self.path} has no topic {", ".join(missing)}; it has {", ".join(self.topics)}'
            )

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Yield the messages of ``topics`` (None: all) in receive order.

        Raises:
            BagError: a topic was not recorded, or the file is damaged; everything before the
                damaged place has been yielded by then.
        """
        wanted = self.topics if topics is None else topics
        self.require(wanted)
        chosen = [c for c in self._reader.connections if c.topic in wanted]
        if not chosen:
            return
        with _readable(self.path):
            rows = ordered_rows(self._reader, chosen)
            for _, tied in groupby(rows, key=lambda row: row[1]):
                for connection, receive_ns, raw in sorted(tied, key=lambda row: row[0].topic):
                    if raw[:4] == _ZSTD_MAGIC:
                        raise BagError(
                            f'{self.path}: its messages are compressed one by one, which only '
                            'metadata.yaml says; give the directory that holds both'
                        )
                    yield BagMessage(connection.topic, receive_ns, bytes(raw))


@contextmanager
def open_bag(path: str | Path) -> Iterator[Bag]:
    """Open a bag directory, or a lone ``.mcap`` or ``.db3`` file.

    Raises:
        BagError: no such path, not a bag, or a bag that was not closed properly.
    """
    path = Path(path)
    with ExitStack() as stack:
        with _readable(path):
            _check_kind(path)
            reader = Reader(path)
            reader.open()
            stack.callback(reader.close)
            bag = Bag(path, reader)
        yield bag


def _check_kind(path: Path) -> None:
    """Say what a path should be that rosbags would only call unknown."""
    if not path.exists():
        raise BagError(f'{path} does not exist; expected a rosbag2 directory, .mcap or .db3 file')
    if path.is_dir() and not (path / 'metadata.yaml').exists():
        raise BagError(
            f'{path} is not a rosbag2 directory: it has no metadata.yaml '
            '(after an interrupted recording, "ros2 bag reindex" writes one)'
        )
    if path.suffix == '.zstd':
        raise BagError(
            f'{path} is a compressed file of a recording; give the directory that holds it and '
            'metadata.yaml'
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever the reader makes of a damaged file into one line."""
    try:
        yield
    except Pi05Error:
        raise
    # The reader meets damage as struct, zstd, SQL, key, type and assertion errors alike.
    except Exception as error:
        detail = ' '.join(str(error).split()) or type(error).__name__
        raise BagError(
            f'{path} cannot be read as a bag: {detail} (not a rosbag2 recording, or a truncated '
            'one; "ros2 bag reindex" or "mcap recover" may mend it)'
        ) from error


def _topics(path: Path, reader: Reader) -> Mapping[str, BagTopic]:
    """Sum up the connections by topic; recordings of split files may repeat one."""
    counts: Counter[str] = Counter()
    types: dict[str, str] = {}
    latched: set[str] = set()
    times = reader.start_time, reader.duration
    for connection in reader.connections:
        name = connection.topic
        kinds = [type(value) for value in (name, connection.msgtype, connection.msgcount, *times)]
        if kinds != [str, str, int, int, int]:
            raise BagError(f'{path}: its metadata describe topic {name!r:.80} in no valid way')
        if types.setdefault(name, connection.msgtype) != connection.msgtype:
            raise BagError(
                f'{path}: {name} was recorded as {types[name]} and {connection.msgtype}'
            )
        counts[name] += connection.msgcount
        ext = connection.ext
        if isinstance(ext, ConnectionExtRosbag2) and any(
            qos.durability is QosDurability.TRANSIENT_LOCAL for qos in ext.offered_qos_profiles
        ):
            latched.add(name)
    return {n: BagTopic(n, types[n], counts[n], n in latched) for n in sorted(types)}

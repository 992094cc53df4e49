"""Rows of a recording in receive order across its files, where rosbags reads one after the other.

A recorder stamps messages as they arrive and writes them a little later, topic by topic, so the
stamps overlap where one file of a split recording ends and the next begins. And a file without an
index (the ``fastwrite`` profile of rosbag2 makes them) keeps the order of writing.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from copy import copy
from typing import Any

import numpy as np
from rosbags.interfaces import Connection
from rosbags.rosbag2 import Reader
from rosbags.rosbag2.reader import DirectoryReader
from rosbags.rosbag2.storage_mcap import McapReader

Row = tuple[Connection, int, bytes]  # connection, receive stamp in ns, serialised message


def ordered_rows(reader: Reader, connections: Collection[Connection]) -> Iterator[Row]:
    """Yield the messages of an open recording by receive stamp; equal ones as they were written.

    Raises:
        Exception: whatever rosbags makes of a damaged file.
    """
    storage = reader.storage
    if not isinstance(storage, DirectoryReader):
        yield from _Ordered(storage).messages(connections)
        return
    files: list[Iterator[Row]] = []
    for file in storage.storages:
        # The directory's reader maps connections and decompresses; here it has one file only.
        one: Any = copy(storage)
        one.storages = [_Ordered(file)]
        files.append(one.messages(connections))
    yield from heapq.merge(*files, key=lambda row: row[1])


class _Ordered:
    """A storage file whose rows come by receive stamp even without an index."""

    def __init__(self, storage: Any) -> None:
        self.connections = storage.connections
        self._storage = storage

    def messages(
        self,
        connections: Collection[Connection],
        start: int | None = None,
        stop: int | None = None,
    ) -> Iterator[Row]:
        storage = self._storage
        if not isinstance(storage, McapReader) or storage.chunks:
            yield from storage.messages(connections, start, stop)
            return
        # Read twice: only what was written too early has to be held, not a whole recording.
        stamps_ns = [row[1] for row in storage.messages_scan(connections, start, stop)]
        places = iter(np.argsort(np.array(stamps_ns, np.int64), kind='stable').tolist())
        held: dict[int, Row] = {}
        due = next(places, None)
        for place, row in enumerate(storage.messages_scan(connections, start, stop)):
            held[place] = row
            while due in held:
                yield held.pop(due)
                due = next(places, None)

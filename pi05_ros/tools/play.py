"""``pi05-ros play BAG``: a recording as live topics.

The recorded bytes are published as they are, except for the header stamps: without ``--clock``
they are moved to now, because a node that checks the age of its inputs would refuse all of them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pi05_ros.model.errors import Pi05Error
from pi05_ros.transport import DEFAULT_PROFILE, profile_environment

from .bag import Bag, BagTopic, open_bag
from .playback import Event, Pacer, read_ahead, read_stamp, timeline, with_stamp
from .terminal import Progress, make_console, positive

if TYPE_CHECKING:
    from rclpy.node import Node
    from rclpy.publisher import Publisher

NODE_NAME = 'pi05_play'
DEFAULT_CLOCK_HZ = 100.0
FASTDDS_VARIABLES = (
    'FASTDDS_BUILTIN_TRANSPORTS',
    'FASTDDS_DEFAULT_PROFILES_FILE',
    'FASTRTPS_DEFAULT_PROFILES_FILE',
)
FLUSH_LIMIT_NS = 500_000_000
# Latched by convention; recorders that do not store the offered QoS lose the durability.
LATCHED_NAMES = frozenset({'task_prompt', 'tf_static', 'robot_description'})
_NS_PER_S = 1_000_000_000


class PlayError(Pi05Error):
    """The recording holds nothing that can be published here."""


@dataclass
class Channel:
    """One topic being played."""

    topic: BagTopic
    publisher: Publisher
    stamped: bool


@dataclass
class Tally:
    """What a playback did so far."""

    published: Counter[str] = field(default_factory=Counter)
    laps: int = 0
    bag_ns: int = 0
    behind_ns: int = 0
    elapsed_s: float = 0.0


def add_parser(subparsers: Any) -> None:
    """Add ``play`` to the command line."""
    parser = subparsers.add_parser(
        'play',
        help='publish a rosbag2 recording as live topics',
        description='Publish a rosbag2 recording (MCAP or sqlite3) as live topics. Header stamps '
        'are moved to now, unless --clock or --keep-stamps is given.',
    )
    parser.add_argument('bag', help='bag directory, .mcap or .db3 file')
    parser.add_argument('--loop', action='store_true', help='start again at the end, until Ctrl-C')
    parser.add_argument(
        '--rate', type=positive, default=1.0, metavar='X', help='speed factor (default 1.0)'
    )
    parser.add_argument(
        '--clock',
        type=positive,
        nargs='?',
        const=DEFAULT_CLOCK_HZ,
        metavar='HZ',
        help='publish /clock in bag time at HZ (default 100) for nodes with use_sim_time, and '
        'keep the recorded stamps',
    )
    parser.add_argument('--keep-stamps', action='store_true', help='do not move header stamps')
    parser.add_argument('--topics', nargs='+', metavar='TOPIC', help='play these topics only')
    parser.add_argument(
        '--ros-args',
        nargs=argparse.REMAINDER,
        default=[],
        help='standard ROS arguments, e.g. -r /camera/base/image_raw:=/front/image_raw',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Play until the end of the bag or until SIGINT or SIGTERM; return 0."""
    stop = threading.Event()
    console = make_console()
    with open_bag(args.bag) as bag, stopped_by_signals(stop):
        use_image_transports()
        import rclpy
        from rclpy.signals import SignalHandlerOptions

        ros_args = ['--ros-args', *args.ros_args] if args.ros_args else []
        rclpy.init(args=ros_args, signal_handler_options=SignalHandlerOptions.NO)
        try:
            node = rclpy.create_node(
                NODE_NAME, enable_rosout=False, start_parameter_services=False
            )
            player = Player(node, bag, args, console)
            player.play(stop)
            node.destroy_node()
        finally:
            rclpy.try_shutdown()
    console.print(summary(player.tally, [c.topic for c in player.channels.values()]))
    return 0


def use_image_transports() -> None:
    """Let Fast DDS send whole images, unless the user has chosen transports."""
    if not any(name in os.environ for name in FASTDDS_VARIABLES):
        os.environ.update(profile_environment(DEFAULT_PROFILE))


class Player:
    """Publishes one bag on one node."""

    def __init__(self, node: Node, bag: Bag, args: argparse.Namespace, console: Console) -> None:
        self.bag = bag
        self.tally = Tally()
        self.channels = open_channels(node, bag, args.topics, console)
        self._console = console
        self._rate: float = args.rate
        self._loop: bool = args.loop
        self._lap_ns = bag.lap_ns if args.loop else 0
        self._restamp = args.clock is None and not args.keep_stamps
        self._clock_period_ns = round(args.rate * _NS_PER_S / args.clock) if args.clock else None
        self._publish_clock = _clock_publisher(node) if args.clock else None

    def play(self, stop: threading.Event) -> None:
        """Publish until the end of the bag, or until ``stop`` is set."""
        names = list(self.channels)
        events = timeline(self.bag, names, loop=self._loop, clock_ns=self._clock_period_ns)
        pacer = Pacer(self._rate, stop.wait)
        started_s = time.monotonic()
        wall_minus_steady_ns = time.time_ns() - time.monotonic_ns()
        with (
            closing(read_ahead(events)) as ready,
            Progress(self._console, self._draw, self._line) as progress,
        ):
            for event in ready:
                if not pacer.wait_until(event.due_ns):
                    return
                self._publish(event, pacer, wall_minus_steady_ns)
                self.tally.laps = event.lap_ns // self._lap_ns if self._loop else 0
                self.tally.bag_ns = event.due_ns - self.bag.start_ns
                self.tally.behind_ns = pacer.behind_ns
                self.tally.elapsed_s = time.monotonic() - started_s
                progress.update()
        self._flush()

    def _flush(self) -> None:
        """Let slow subscribers fetch the last messages before the publishers disappear."""
        from rclpy.duration import Duration

        for channel in self.channels.values():
            channel.publisher.wait_for_all_acked(Duration(nanoseconds=FLUSH_LIMIT_NS))

    def _publish(self, event: Event, pacer: Pacer, wall_minus_steady_ns: int) -> None:
        if event.clock_ns is not None and self._publish_clock:
            self._publish_clock(event.clock_ns)
        if event.message is None:
            return
        message = event.message
        channel = self.channels[message.topic]
        raw = message.raw
        # A zero stamp means "no stamp" and stays.
        if self._restamp and channel.stamped and (stamp_ns := read_stamp(raw)):
            moved_ns = pacer.steady_ns(stamp_ns + event.lap_ns) + wall_minus_steady_ns
            raw = with_stamp(raw, moved_ns)
        channel.publisher.publish(raw)
        self.tally.published[message.topic] += 1

    def _line(self) -> str:
        tally = self.tally
        text = (
            f'playing {self.bag.path.name}: {tally.bag_ns / _NS_PER_S:.1f} s of bag time in '
            f'{tally.elapsed_s:.1f} s, {tally.published.total()} messages'
        )
        if self._loop:
            text += f', pass {tally.laps + 1}'
        if tally.behind_ns:
            text += f', fell behind by {tally.behind_ns / _NS_PER_S:.2f} s in all'
        return text

    def _draw(self) -> Text:
        style = 'yellow' if self.tally.behind_ns else 'green'
        return Text.assemble(('▶ ', style), self._line(), ('   Ctrl-C ends', 'dim'))


def open_channels(
    node: Node, bag: Bag, asked: list[str] | None, console: Console
) -> dict[str, Channel]:
    """Create a publisher per topic that has messages.

    Topics whose message type is not installed are listed and skipped, unless asked for.

    Raises:
        BagError: a topic that was asked for was not recorded.
        PlayError: its type is not installed, or nothing is left to play.
    """
    names = [f'/{name.lstrip("/")}' for name in asked] if asked else list(bag.topics)
    bag.require(names)
    channels: dict[str, Channel] = {}
    unknown: list[str] = []
    for name in names:
        topic = bag.topics[name]
        msg_class = find_message_class(topic.msgtype)
        if msg_class is None:
            unknown.append(f'{name} ({topic.msgtype})')
        elif topic.count:
            publisher = node.create_publisher(msg_class, name, _qos(topic))
            channels[name] = Channel(topic, publisher, _starts_with_header(msg_class))
    if unknown and (asked or not channels):
        raise PlayError(f'message type not installed for {", ".join(unknown)}')
    if unknown:
        count = '1 topic' if len(unknown) == 1 else f'{len(unknown)} topics'
        listed = ', '.join(unknown)
        console.print(f'WARN {count} skipped, type not installed: {listed}', soft_wrap=True)
    if not channels:
        raise PlayError(f'{bag.path} holds no message on {", ".join(names) or "any topic"}')
    return channels


def find_message_class(msgtype: str) -> Any | None:
    """Return the message class of e.g. ``sensor_msgs/msg/Image``; None if it is not installed."""
    package, _, name = msgtype.partition('/msg/')
    if not package:
        return None
    try:
        msg_class = getattr(importlib.import_module(f'{package}.msg'), name)
    except (ImportError, AttributeError):
        return None
    return msg_class


def summary(tally: Tally, topics: list[BagTopic]) -> Table:
    """Return what was published, per topic, as a table."""
    caption = f'{tally.bag_ns / _NS_PER_S:.2f} s of bag time in {tally.elapsed_s:.2f} s'
    if tally.behind_ns:
        caption += f'; fell behind by {tally.behind_ns / _NS_PER_S:.2f} s, not made up for'
    table = Table(caption=caption, caption_justify='left', box=box.SIMPLE_HEAD)
    table.add_column('topic', overflow='fold')
    table.add_column('type', overflow='fold')
    table.add_column('messages', justify='right', no_wrap=True)
    table.add_column('Hz', justify='right', no_wrap=True)
    for topic in topics:
        count = tally.published[topic.name]
        rate = f'{count / tally.elapsed_s:.1f}' if tally.elapsed_s > 0 and count > 1 else '-'
        table.add_row(topic.name, topic.msgtype, str(count), rate)
    return table


def _qos(topic: BagTopic) -> Any:
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    latched = topic.latched or topic.name.rsplit('/', 1)[-1] in LATCHED_NAMES
    # A reliable publisher serves reliable and best-effort subscribers alike.
    return QoSProfile(
        depth=1 if latched else 10,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def _starts_with_header(msg_class: Any) -> bool:
    first = next(iter(msg_class.get_fields_and_field_types().items()), None)
    return first == ('header', 'std_msgs/Header')


def _clock_publisher(node: Node) -> Callable[[int], None]:
    from builtin_interfaces.msg import Time
    from rosgraph_msgs.msg import Clock

    publisher = node.create_publisher(Clock, '/clock', 10)

    def publish(time_ns: int) -> None:
        seconds, nanoseconds = divmod(time_ns, _NS_PER_S)
        publisher.publish(Clock(clock=Time(sec=seconds, nanosec=nanoseconds)))

    return publish


class stopped_by_signals:
    """Set ``stop`` on SIGINT and SIGTERM while active."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, lambda *_: self._stop.set())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

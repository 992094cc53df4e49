"""A node, its sensors and the observer in processes of their own, and what a fault did to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import rclpy
from helpers import Observer, Watch
from lifecycle_msgs.msg import Transition
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rclpy.qos import QoSProfile
from sensors_process import POSE
from std_msgs.msg import Float64MultiArray

from pi05_ros.tools.processes import Child, Children

HERE = Path(__file__).parent
NODE = (sys.executable, '-m', 'pi05_ros.policy_node')
# A policy without a model in the real node; see there for what it can be made to do.
STAND_IN = (sys.executable, str(HERE / 'stand_in_node.py'))
TASK = 'pick up the black bowl'
ARM = tuple(POSE.values())[:7]


@dataclass(frozen=True)
class Row:
    """One line of the table of faults, every cell from the run."""

    fault: str
    deed: str
    said: str
    recovered: str


@dataclass
class FaultTable:
    """What became of every fault that was injected."""

    rows: list[Row] = field(default_factory=list)

    def add(self, fault: str, deed: str, said: str, recovered: str) -> None:
        self.rows.append(Row(fault, deed, said, recovered))

    def markdown(self) -> str:
        cells = [('fault', 'what the node did', 'what it said', 'recovered'), ('---',) * 4]
        for row in self.rows:
            said = ' '.join(row.said.split()).replace('|', r'\|')
            cells.append((row.fault, row.deed, f'`{said}`', row.recovered))
        return '\n'.join(f'| {" | ".join(line)} |' for line in cells) + '\n'


class SensorsProcess:
    """``sensors_process.py`` as a child; see there for sources and what can be changed."""

    def __init__(self, name: str, *sources: str, namespace: str = '') -> None:
        remap = ['--ros-args', '-r', f'__ns:={namespace}'] if namespace else []
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / 'sensors_process.py'), name, *sources, *remap],
            stdin=subprocess.PIPE,
            text=True,
        )

    def change(self, source: str, **values: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({source: values}) + '\n')
        self._process.stdin.flush()

    def close(self) -> None:
        """Let it leave in order: it says goodbye to who listens."""
        self._process.communicate()

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._process.kill()
        self._process.communicate()


@dataclass
class Seen:
    """The counters and commands before a fault, to be compared with those after it."""

    counts: dict[str, int]
    commands: int


class FaultBench(Watch):
    """One node under test; it commands ``commands`` in its namespace."""

    def __init__(self, node: Child, namespace: str = '') -> None:
        observer = Observer(
            rclpy.create_node('observer', enable_rosout=False),
            name=f'{namespace}/pi05_policy'.lstrip('/'),
        )
        super().__init__(observer.listen())
        self.node = node
        self.commands: list[tuple[float, ...]] = []
        self._topic = f'{namespace}/commands'
        self.listen_to_commands()

    def listen_to_commands(self) -> None:
        self.commands_from = self.observer.node.create_subscription(
            Float64MultiArray,
            self._topic,
            lambda message: self.commands.append(tuple(message.data)),
            QoSProfile(depth=100),
        )

    def describe(self) -> str:
        return f'{super().describe()}\n{self.node.tail()}'

    def configure(self) -> bool:
        # The service of a process that ended just now may still look as if it were there.
        self.until_said('Lifecycle', 'unconfigured')
        return self.change_state(Transition.TRANSITION_CONFIGURE)

    def set_task(self, task: str) -> None:
        """Set the parameter, as ``ros2 param set`` does."""
        client = AsyncParameterClient(self.observer.node, f'/{self.observer.name}')
        self.until(client.services_are_ready)
        future = client.set_parameters([Parameter('prompt', value=task)])
        self.until(future.done)
        assert future.result().results[0].successful

    def start(self) -> None:
        """Configure and activate."""
        assert self.configure(), self.describe()
        assert self.change_state(Transition.TRANSITION_ACTIVATE), self.describe()
        self.until_acting()

    def stop(self, number: signal.Signals) -> int | None:
        """Send a signal, wait until nothing of the process is left, return its exit code."""
        self.node.signal_group(number)
        self.until(lambda: not self.node.group_exists())
        return self.node.exit_code

    def is_holding(self) -> bool:
        """Whether the newest command is the measured position; an action never is, to the bit."""
        return bool(self.commands) and self.commands[-1][:7] == ARM

    def counts(self) -> dict[str, int]:
        """Return the newest counters; they are consistent whatever happened."""
        counts = self.observer.counts()
        if counts:
            reasons = set(counts) - {'ticks', 'actions', 'skipped'}
            assert counts['ticks'] == counts['actions'] + counts['skipped']
            assert counts['skipped'] == sum(counts[reason] for reason in reasons)
        return counts

    def until_acting(self) -> None:
        """Wait for a new action, and for diagnostics that know of it."""
        sent, actions = len(self.commands), self.counts().get('actions', -1)
        self.until(lambda: len(self.commands) > sent and not self.is_holding())
        self.until(lambda: self.counts().get('actions', -1) > actions)

    def seen(self) -> Seen:
        """Wait for new diagnostics, and remember what was before the fault."""
        last = self.observer.diagnostics[-1]
        self.until(lambda: self.observer.diagnostics[-1] is not last)
        return Seen(self.counts(), len(self.commands))

    def until_said(self, part: str, pattern: str) -> str:
        """Wait until the part's message matches; return the message."""
        self.until(lambda: re.search(pattern, self.observer.message(part)))
        return self.observer.message(part)

    def deed(self, before: Seen) -> str:
        """Say what the node did since, from its own counters and from what it sent."""
        counts = self.counts()
        new = {name: count - before.counts.get(name, 0) for name, count in counts.items()}
        actions, skipped = new.pop('actions'), new.pop('skipped')
        del new['ticks']
        reasons = [name for name, count in sorted(new.items()) if count]
        shown = ', '.join(f'`{name}`' for name in reasons)
        # A busy machine makes ticks late; that is no answer to the fault.
        did = ['went on acting'] if actions and set(reasons) <= {'overrun'} else []
        if skipped:
            did.append(f'skipped {skipped} tick{"s" * (skipped > 1)}: {shown}')
        if any(command[:7] == ARM for command in self.commands[before.commands :]):
            did.append('held')
        return '; '.join(did)


class Bay:
    """Starts the processes of one test file; all are gone when it is closed.

    Args:
        parameters: of every node, unless the node's own say otherwise.
    """

    def __init__(self, logs: Path, parameters: dict[str, object]) -> None:
        self._logs = logs
        self._parameters = parameters
        self._children = Children()
        self._sensors: list[SensorsProcess] = []
        self._benches: list[FaultBench] = []

    def sensors(self, name: str, *sources: str, namespace: str = '') -> SensorsProcess:
        self._sensors.append(SensorsProcess(name, *sources, namespace=namespace))
        return self._sensors[-1]

    def node(
        self,
        command: Sequence[str] = NODE,
        arguments: Sequence[str] = (),
        namespace: str = '',
        **parameters: object,
    ) -> FaultBench:
        """Start a node's process.

        Args:
            command: the program, with arguments of its own.
            arguments: further ROS arguments.
        """
        words = [*command, '--ros-args', *arguments]
        if namespace:
            words += ['-r', f'__ns:={namespace}']
        for name, value in (self._parameters | parameters).items():
            text = json.dumps(value) if isinstance(value, str | bool) else str(value)
            words += ['-p', f'{name}:={text}']
        log = self._logs / f'node{len(self._benches)}.log'
        child = self._children.start('node', words, os.environ, log)
        self._benches.append(FaultBench(child, namespace))
        return self._benches[-1]

    def close(self) -> None:
        for bench in self._benches:
            bench.close()
        self._children.stop()
        for sensors in self._sensors:
            sensors.kill()


@contextmanager
def open_bay(logs: Path, parameters: dict[str, object]) -> Iterator[Bay]:
    """Initialise rclpy and close the bay, whatever the tests in it did."""
    from rclpy.signals import SignalHandlerOptions

    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    bay = Bay(logs, parameters)
    try:
        yield bay
    finally:
        bay.close()
        rclpy.try_shutdown()

"""Sensors, observers and a small policy for tests of the node over real DDS."""

from __future__ import annotations

import array
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import Executor, SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.task import Future
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from pi05_ros.control.reasons import Reason
from pi05_ros.engine.pipeline import StageTimes
from pi05_ros.msg import ActionChunk as ActionChunkMessage
from pi05_ros.policy.policy import PolicyInfo
from pi05_ros.policy.robot import RobotSpec, load_robot
from pi05_ros.policy.types import ActionChunk, Observation
from pi05_ros.policy_node import PolicyNode

DATA = Path(__file__).resolve().parent.parent / 'data'
TINY = DATA / 'golden' / 'pi05_tiny'
JOINTS = (*(f'panda_joint{i}' for i in range(1, 8)), 'panda_finger_joint1', 'panda_finger_joint2')
TASK = 'pick up the black bowl'
DEADLINE_S = 30.0
ASK_AGAIN_S = 0.5
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
_NAN = float('nan')
TIMES = StageTimes(
    h2d_ms=_NAN, preprocess_ms=0.5, vision_ms=2.0, prefill_ms=3.0, denoise_ms=4.0, d2h_ms=_NAN,
    total_ms=9.5,
)  # fmt: skip


class SmallPolicy:
    """Stands in for the model: moves every joint by nothing, and remembers what it was shown.

    Args:
        on_act: called with every observation; may raise what the test wants to happen.
    """

    def __init__(
        self, robot: RobotSpec, on_act: Callable[[Observation], None] = lambda observation: None
    ) -> None:
        self.robot = robot
        self.on_act = on_act
        self.seen: list[Observation] = []
        self.prepared: list[tuple[int, int]] = []
        self.rehearsed: list[Observation] = []
        self.closed = False
        self.info = PolicyInfo(
            checkpoint=TINY,
            layout='golden',
            checkpoint_sha256='0' * 64,
            robot=robot.name,
            stats_files=(),
            normalization='quantile',
            tokenizer=Path('none'),
            tokenizer_is_paligemma=False,
            discrete_state=robot.discrete_state,
            stage_backends={'vision': 'small', 'prefill': 'small', 'denoise': 'small'},
            precision='float32',
            device='cpu',
            horizon=4,
            num_steps=10,
        )

    def self_check(self, observation: Observation, min_cosine: float) -> tuple:
        return ()

    def prepare(self, *, tick: int, seed: int) -> None:
        self.prepared.append((tick, seed))

    def rehearse(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> None:
        self.rehearsed.append(observation)

    def act(
        self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None
    ) -> ActionChunk:
        self.on_act(observation)
        self.seen.append(observation)
        state = observation.state
        row = np.resize(state if len(state) else np.zeros(1), self.robot.action_dim)
        return ActionChunk(
            actions=np.tile(row.astype(np.float32), (4, 1)),
            names=self.robot.action_names,
            step_s=self.robot.step_s,
            stamp_ns=observation.oldest_stamp_ns,
            stamps_ns=dict(observation.stamps_ns),
            tick=tick,
            seed=seed,
            num_steps=num_steps or 10,
            prompt=observation.prompt,
            times=TIMES,
        )

    def image_buffer(self, num_bytes: int) -> np.ndarray:
        return np.empty(num_bytes, dtype=np.uint8)

    def close(self) -> None:
        self.closed = True


@dataclass
class CameraScript:
    """How one test camera behaves; change it while it runs."""

    size_px: tuple[int, int] = (24, 32)
    encoding: str = 'rgb8'
    channels: int = 3
    step: int | None = None
    cut_bytes: int = 0
    lag_ns: int = 0
    running: bool = True
    value: int = 100


class Sensors(Node):
    """Two cameras, joint states and a task, published when the test says so.

    Args:
        cameras: camera -> how it behaves.
        qos: of the images and joint states.
    """

    def __init__(
        self,
        namespace: str = '',
        cameras: dict[str, CameraScript] | None = None,
        qos: QoSProfile | None = None,
    ) -> None:
        super().__init__('test_sensors', namespace=namespace)
        qos = qos or QoSProfile(depth=5)
        self.cameras = cameras or {'base': CameraScript(), 'wrist': CameraScript()}
        self.joints: tuple[str, ...] = JOINTS
        self.joints_running = True
        self.joint_position = 0.1
        self.image_publishers = {
            name: self.create_publisher(Image, f'camera/{name}/image_raw', qos)
            for name in self.cameras
        }
        self.joint_publisher = self.create_publisher(JointState, 'joint_states', qos)
        self.task_publisher = self.create_publisher(String, 'task_prompt', LATCHED)

    def say_task(self, text: str = TASK) -> None:
        self.task_publisher.publish(String(data=text))

    def send(self, now_ns: int | None = None) -> None:
        """Publish one message of everything that runs, stamped now."""
        now_ns = self.get_clock().now().nanoseconds if now_ns is None else now_ns
        for name, camera in self.cameras.items():
            if camera.running:
                self.image_publishers[name].publish(image_message(camera, now_ns))
        if self.joints_running:
            message = JointState(name=list(self.joints))
            message.position = [self.joint_position] * len(self.joints)
            stamp(message, now_ns)
            self.joint_publisher.publish(message)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Send at 50 Hz from a thread: while the node configures, nothing spins."""
        ended = threading.Event()

        def stream() -> None:
            while not ended.wait(0.02):
                self.send()

        thread = threading.Thread(target=stream, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def image_message(camera: CameraScript, now_ns: int) -> Image:
    """Return one image of a test camera."""
    height, width = camera.size_px
    step = width * camera.channels if camera.step is None else camera.step
    size = height * width * camera.channels - camera.cut_bytes
    message = Image(
        height=height,
        width=width,
        encoding=camera.encoding,
        step=step,
        data=array.array('B', bytes([camera.value]) * size),
    )
    stamp(message, now_ns - camera.lag_ns)
    return message


def stamp(message: object, now_ns: int) -> None:
    """Set the header stamp of a message."""
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(now_ns, 1_000_000_000)


@dataclass
class Observer:
    """What the node said so far."""

    node: Node
    chunks: list[ActionChunkMessage] = field(default_factory=list)
    diagnostics: deque[DiagnosticArray] = field(default_factory=lambda: deque(maxlen=200))
    name: str = 'pi05_policy'

    def listen(self) -> Observer:
        self.node.create_subscription(
            ActionChunkMessage, f'/{self.name}/dry_run/action_chunk', self.chunks.append, 10
        )
        self.node.create_subscription(
            DiagnosticArray, '/diagnostics', lambda message: self.diagnostics.append(message), 10
        )
        return self

    def status(self, part: str) -> DiagnosticStatus:
        """Return the newest status of that part; one without a message while there is none."""
        for message in reversed(self.diagnostics):
            for status in message.status:
                if status.name == f'{self.name}: {part}':
                    return status
        return DiagnosticStatus()

    def message(self, part: str) -> str:
        return self.status(part).message

    def values(self, part: str) -> dict[str, str]:
        return {pair.key: pair.value for pair in self.status(part).values}

    def counts(self) -> dict[str, int]:
        """Return the counters of the Action status, skips by their reason."""
        values = self.values('Action')
        if 'ticks' not in values:
            return {}
        counts = {name: int(values[name]) for name in ('ticks', 'actions', 'skipped')}
        for item in values['skipped by reason'].split(', '):
            reason, _, count = item.partition('=')
            if count:
                counts[str(Reason(reason))] = int(count)
        return counts


class Watch:
    """Spins some nodes and an observer of the policy node until something is true."""

    def __init__(self, observer: Observer, *nodes: Node) -> None:
        self.observer = observer
        self.executor: Executor = SingleThreadedExecutor()
        for member in (observer.node, *nodes):
            self.executor.add_node(member)

    def until(self, predicate: Callable[[], object]) -> None:
        """Spin until something is true.

        Raises:
            AssertionError: it never became true.
        """
        deadline = time.monotonic() + DEADLINE_S
        while not predicate():
            assert time.monotonic() < deadline, self.describe()
            self.executor.spin_once(timeout_sec=0.005)

    def describe(self) -> str:
        """Say what the node said last, for a test that waited in vain."""
        parts = ('Lifecycle', 'Inputs', 'Action')
        return '; '.join(f'{part}: {self.observer.message(part)}' for part in parts)

    def request_state(self, transition: int) -> Future:
        """Ask for a transition through the node's service, as ``ros2 lifecycle`` does."""
        node, name = self.observer.node, self.observer.name
        client = node.create_client(ChangeState, f'/{name}/change_state')
        # A request is lost on a server that does not know its client yet, which no client can see.
        # This one is announced after the other: once it is answered, the node knows both.
        probe = node.create_client(GetState, f'/{name}/get_state')
        self.until(lambda: client.service_is_ready() and probe.service_is_ready())
        answers: dict[float, Future] = {}

        def known() -> bool:
            if time.monotonic() > max(answers, default=0.0) + ASK_AGAIN_S:
                answers[time.monotonic()] = probe.call_async(GetState.Request())
            return any(answer.done() for answer in answers.values())

        self.until(known)
        request = ChangeState.Request()
        request.transition.id = transition
        return client.call_async(request)

    def change_state(self, transition: int) -> bool:
        """Ask for a transition and tell whether it worked."""
        future = self.request_state(transition)
        self.until(future.done)
        return future.result().success

    def close(self) -> None:
        self.executor.shutdown()
        self.observer.node.destroy_node()


class Spinner(Watch):
    """The same, with sensors that send at 50 Hz meanwhile."""

    def __init__(self, sensors: Sensors, observer: Observer, *nodes: Node) -> None:
        super().__init__(observer, sensors, *nodes)
        self.sensors = sensors
        self._next_send_s = 0.0

    def until(self, predicate: Callable[[], object], send: bool = True) -> None:
        def sent() -> object:
            if send and time.monotonic() >= self._next_send_s:
                self._next_send_s = time.monotonic() + 0.02
                self.sensors.send()
            return predicate()

        super().until(sent)

    def close(self) -> None:
        super().close()
        self.sensors.destroy_node()


class Bench(Spinner):
    """A node, its sensors and an observer in one process, spun by the test."""

    def __init__(self, node: PolicyNode, sensors: Sensors, observer: Observer) -> None:
        super().__init__(sensors, observer, node)
        self.node = node

    def configure(self) -> bool:
        """Trigger configure while the sensors stream; tell whether it worked."""
        with self.sensors.streaming():
            return self.node.trigger_configure() == TransitionCallbackReturn.SUCCESS

    def start(self) -> None:
        """Configure and activate."""
        assert self.configure(), self.node.last_error
        assert self.node.trigger_activate() == TransitionCallbackReturn.SUCCESS


class ProcessBench(Spinner):
    """A node in another process; sensors and an observer here."""

    def __init__(
        self, process: subprocess.Popen, log: Path, sensors: Sensors, observer: Observer
    ) -> None:
        super().__init__(sensors, observer)
        self.process = process
        self._log = log

    def log_text(self) -> str:
        return self._log.read_text()

    def describe(self) -> str:
        return f'{super().describe()}\n{self.log_text()}'


@contextmanager
def bench(
    policy: SmallPolicy | None = None,
    parameters: dict[str, object] | None = None,
    sensors: Sensors | None = None,
    **options: object,
) -> Iterator[Bench]:
    """Make a node with a small policy, and sensors that keep sending while it configures."""
    chosen = {'checkpoint': str(TINY), 'prompt': TASK, 'rate_hz': 20.0, **(parameters or {})}
    overrides = [Parameter(name, value=value) for name, value in chosen.items()]
    policy = policy or SmallPolicy(load_robot('franka'))
    options.setdefault('load_policy', lambda settings, sizes: policy)
    node = PolicyNode(parameter_overrides=overrides, **options)
    sensors = sensors or Sensors()
    observer = Observer(rclpy.create_node('test_observer')).listen()
    made = Bench(node, sensors, observer)
    try:
        yield made
    finally:
        node.close()
        made.close()

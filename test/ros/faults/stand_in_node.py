"""The real node with a stand-in for the model, which fails in ways that need a GPU to fail.

``python stand_in_node.py [--load-s S] [--close-s S] --ros-args ...``: so long loading and freeing
take. The task says what the next call of the model does, see :data:`FAILURES`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rclpy.utilities import remove_ros_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import SmallPolicy  # noqa: E402

from pi05_ros.policy.robot import load_robot  # noqa: E402
from pi05_ros.policy.types import Observation  # noqa: E402
from pi05_ros.policy_node import PolicyNode  # noqa: E402
from pi05_ros.ros.run import leave, run  # noqa: E402
from pi05_ros.ros.signals import StopSignal  # noqa: E402

# Task -> what is raised: as PyTorch 2.13 words them, with its lines on how to debug.
ADVICE = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace \
below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1"""
FAILURES = {
    'out of memory': (
        'OutOfMemoryError',
        'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB '
        'of which 1.06 GiB is free.',
    ),
    'illegal access': (
        'AcceleratorError',
        f'CUDA error: an illegal memory access was encountered{ADVICE}',
    ),
    'launch failure': ('RuntimeError', f'CUDA error: unspecified launch failure{ADVICE}'),
    'harmless': ('AcceleratorError', f'CUDA error: invalid argument{ADVICE}'),
}


def make_error(kind: str) -> Exception:
    import torch  # PyTorch's own types, where this one has them

    name, text = FAILURES[kind]
    types = {'RuntimeError': RuntimeError, 'OutOfMemoryError': torch.OutOfMemoryError}
    return types.get(name, getattr(torch, name, RuntimeError))(text)


class StandIn(SmallPolicy):
    """Fails as the task says; a dead CUDA context fails freeing, too."""

    def __init__(self, load_s: float, close_s: float) -> None:
        time.sleep(load_s)
        super().__init__(load_robot('franka'), self.fail)
        self._close_s = close_s
        self._is_dead = False

    def fail(self, observation: Observation) -> None:
        if observation.prompt in FAILURES:
            self._is_dead = observation.prompt not in ('out of memory', 'harmless')
            raise make_error(observation.prompt)

    def close(self) -> None:
        if self._is_dead:
            raise make_error('illegal access')
        time.sleep(self._close_s)
        super().close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--load-s', type=float, default=0.0)
    parser.add_argument('--close-s', type=float, default=0.0)
    args = parser.parse_args(remove_ros_args(sys.argv)[1:])

    def make_node(stop: StopSignal) -> PolicyNode:
        return PolicyNode(stop, lambda settings, sizes: StandIn(args.load_s, args.close_s))

    leave(run(make_node))


if __name__ == '__main__':
    main()

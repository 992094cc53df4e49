"""What all tests share: an own ROS domain per process, one tiny checkpoint, the `ros` marker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

# Set before rclpy is imported anywhere, and inherited by every child process. Never the
# user's own domain: a robot may listen there. Domains up to 101 have free ports on every system;
# neighbouring process ids (pytest-xdist's workers) get different ones.
os.environ['ROS_DOMAIN_ID'] = str(1 + os.getpid() * 7 % 100)
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
for _variable in (
    'ROS_LOCALHOST_ONLY',
    'ROS_STATIC_PEERS',
    'ROS_NAMESPACE',
    'FASTDDS_DEFAULT_PROFILES_FILE',
    'FASTRTPS_DEFAULT_PROFILES_FILE',
):
    os.environ.pop(_variable, None)
# Shared memory left by a killed process can stall the next one.
os.environ['FASTDDS_BUILTIN_TRANSPORTS'] = 'UDPv4'
# On the tiny model more threads only wait for one another.
os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)
# Without a GPU, Triton kernels run through its interpreter: to be chosen before their import.
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'
# Children that a test starts in another directory run this source tree, too.
os.environ['PYTHONPATH'] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
)

# A shell gives its background jobs an ignored SIGINT, and they hand it on to every child.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_ROS_FOLDERS = {'ros', 'launch'}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Only the conftest of the test root may do this."""
    parser.addoption('--fault-table', metavar='FILE', help='write the table of test/ros/faults')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the ROS side, which run on every supported ROS 2."""
    for item in items:
        if item.path.relative_to(ROOT / 'test').parts[0] in _ROS_FOLDERS:
            item.add_marker(pytest.mark.ros)


@pytest.fixture(scope='session')
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny checkpoint with random weights, the same in every run."""
    from pi05_ros.tools.random_checkpoint import make_checkpoint

    path = tmp_path_factory.mktemp('tiny') / 'checkpoint'
    make_checkpoint('tiny', path, seed=0)
    return path


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """Environment of a child process that must not see this source tree."""
    return {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}

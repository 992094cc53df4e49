"""Every run of the ROS tests talks in a domain of its own, on this machine only."""

from __future__ import annotations

import gc
import os

import pytest

# Before rclpy is imported anywhere. Domains up to 101 have free ports on every system.
_WORKER = os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw')
os.environ.setdefault('ROS_DOMAIN_ID', str(1 + (os.getpid() * 7 + int(_WORKER)) % 100))
os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('FASTDDS_BUILTIN_TRANSPORTS', 'UDPv4')
os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture
def ros():
    """Initialise rclpy as the node's main() does, and end it whatever the test did."""
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    yield
    rclpy.try_shutdown()
    # A lifecycle node's services live until it is collected; the next test may start a process
    # with a node of the same name, and would ask the dead one.
    gc.collect()

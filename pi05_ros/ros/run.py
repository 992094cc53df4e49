"""The main loop of a node's process."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions

from pi05_ros.control.device import first_line

from .lifecycle import ManagedNode
from .signals import StopSignal

SPIN_S = 0.1


def run(make_node: Callable[[StopSignal], ManagedNode], args: Sequence[str] | None = None) -> int:
    """Spin one node until SIGINT or SIGTERM, then take it down step by step.

    Args:
        args: command line with ``--ros-args``; None takes the process's.
    Returns: the exit code; 1 if ROS 2 does not start.
    """
    stop = StopSignal()
    stop.install()
    try:
        # rclpy's handlers would shut the context down before a last command could be published.
        rclpy.init(
            args=None if args is None else list(args),
            signal_handler_options=SignalHandlerOptions.NO,
        )
    except RuntimeError as error:  # of rcl: its arguments, its log folder, its middleware
        print(f'pi05_ros: ROS 2 does not start: {first_line(error)}', file=sys.stderr)
        return 1
    try:
        node = make_node(stop)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        try:
            while rclpy.ok() and not stop.requested:
                executor.spin_once(timeout_sec=SPIN_S)
        except ExternalShutdownException:
            node.get_logger().info('the ROS context was shut down')
        finally:
            node.close()
            executor.shutdown()
    finally:
        rclpy.try_shutdown()
    return 0


def leave(exit_code: int) -> NoReturn:
    """End the process now, with its exit hooks but without the interpreter's own teardown.

    That would walk every object of PyTorch once more: 2 s on a busy machine (measured on two
    cores), in which a process that has freed everything looks as if it hung.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)

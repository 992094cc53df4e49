"""``pi05-ros doctor``: why the node hears nothing, or not enough, and the line that mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from pi05_ros import __version__
from pi05_ros.control.gpu import NvmlMissing, open_nvml, read_gpu
from pi05_ros.control.parameters import NodeSettings, settings_from_values
from pi05_ros.control.topics import input_topics
from pi05_ros.policy.robot import load_robot

from .checkpoint_report import report_on
from .findings import (
    PROFILE_VARIABLES,
    Finding,
    input_findings,
    transport_findings,
)
from .remapping import Remapping, parameter_override, remap_rule
from .terminal import make_console, positive

if TYPE_CHECKING:
    from pi05_ros.ros.probe import InputProbe

NODE_NAME = 'pi05_doctor'
EXIT_FINDINGS = 1
SHOWN_VARIABLES = (
    'ROS_DISTRO',
    'ROS_DOMAIN_ID',
    'ROS_AUTOMATIC_DISCOVERY_RANGE',
    'ROS_STATIC_PEERS',
    'FASTDDS_BUILTIN_TRANSPORTS',
    *PROFILE_VARIABLES,
)


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = subparsers.add_parser(
        'doctor',
        help='check inputs, QoS, loss, transport, GPU and versions, and say what to change',
        description='Look at everything that the node needs, as the node would see it. Give it '
        'the parameters and remaps of the node, and run it in the same environment. '
        'Exit status: 0 if nothing is wrong, 1 with findings.',
    )
    parser.add_argument('--checkpoint', metavar='DIR', help='look into a checkpoint as well')
    parser.add_argument('--robot', metavar='NAME', help='name or path; default: as the node')
    parser.add_argument('--params-file', type=Path, metavar='YAML', help='as for the node')
    parser.add_argument(
        '-p', '--param', dest='params', action='append', default=[], type=parameter_override,
        metavar='NAME:=VALUE', help='as for the node, e.g. cameras.base.transport:=compressed',
    )  # fmt: skip
    parser.add_argument(
        '-r', '--remap', dest='remaps', action='append', default=[], type=remap_rule,
        metavar='FROM:=TO', help='as for the node, also __ns:=/NAMESPACE',
    )  # fmt: skip
    parser.add_argument(
        '--discovery', type=positive, default=3.0, metavar='S',
        help='longest wait for publishers to be found; default: 3',
    )  # fmt: skip
    parser.add_argument(
        '--listen', type=positive, default=2.0, metavar='S',
        help='how long rate and loss are measured; default: 2',
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found; return 0 if nothing is wrong, else 1."""
    settings = settings_of(args)
    probes, middleware = probe(settings, args.remaps, args.discovery, args.listen)
    gpus, findings = examine_gpu(settings)
    findings = [*input_findings(probes, settings), *transport_findings(os.environ), *findings]
    if settings.checkpoint:
        report = report_on(Path(settings.checkpoint))
        findings += [
            Finding(f'checkpoint: {fault}', f'pi05-ros checkpoint inspect {settings.checkpoint}')
            for fault in report.missing
        ]
    console = make_console()
    _print_inputs(console, probes)
    _print_rows(console, {**middleware, **versions(), **gpus})
    _print_findings(console, findings)
    return EXIT_FINDINGS if findings else 0


def settings_of(args: argparse.Namespace) -> NodeSettings:
    """Return the settings of the node that is to be checked.

    Raises:
        ParameterError: a parameter is wrong.
        RobotError: the robot file cannot be used.
    """
    from pi05_ros.control.parameter_file import DEFAULT_ROBOT, read_parameter_file

    node_name = Remapping(tuple(args.remaps)).node_name
    values = read_parameter_file(args.params_file, node_name) if args.params_file else {}
    values |= dict(args.params)
    for name in ('checkpoint', 'robot'):
        if getattr(args, name):
            values[name] = getattr(args, name)
    cameras = load_robot(str(values.get('robot', DEFAULT_ROBOT))).camera_names
    return settings_from_values(values, cameras)


def probe(
    settings: NodeSettings,
    remaps: list[tuple[str, str]],
    discovery_s: float,
    listen_s: float,
) -> tuple[list[InputProbe], dict[str, str]]:
    """Listen to the inputs; also return what decides who is heard."""
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    from rclpy.utilities import get_rmw_implementation_identifier

    from pi05_ros.ros.probe import probe_inputs

    rules = [part for of, to in remaps if of != '__node' for part in ('-r', f'{of}:={to}')]
    rclpy.init(
        args=['--ros-args', *rules] if rules else [],
        signal_handler_options=SignalHandlerOptions.NO,
    )
    try:
        node = rclpy.create_node(NODE_NAME)
        topics = input_topics(load_robot(settings.robot), settings)
        probes = probe_inputs(node, topics, discovery_s, listen_s)
        middleware = {
            'RMW': get_rmw_implementation_identifier(),
            'domain id': str(node.context.get_domain_id()),
        }
    finally:
        rclpy.try_shutdown()
    shown = {name: os.environ.get(name) or 'not set' for name in SHOWN_VARIABLES}
    return probes, {**middleware, **shown}


def versions() -> dict[str, str]:
    """Return the versions of what the node runs on, as Python's package metadata has them."""
    found = {'pi05_ros': __version__}
    for name, packages in {
        'torch': ('torch',),
        'triton': ('triton',),
        'rclpy': ('rclpy', 'ros-rclpy'),
    }.items():
        found[name] = next(filter(None, map(_version, packages)), 'not known')
    return found


def examine_gpu(settings: NodeSettings) -> tuple[dict[str, str], list[Finding]]:
    """Return every GPU with its driver, and what keeps PyTorch from using one."""
    import torch

    findings = []
    try:
        gpus = _gpus()
        shown = gpus or {'GPU': 'none'}
    except NvmlMissing as error:
        gpus, shown = {}, {'GPU': str(error)}
    usable = torch.cuda.is_available()
    if gpus and not usable:
        what = f'PyTorch {torch.__version__} cannot use the GPU that the driver shows'
        findings.append(Finding(what, 'pip install --force-reinstall torch  # a CUDA build'))
    elif settings.device.startswith('cuda') and not usable:
        what = f'device is {settings.device}, and PyTorch {torch.__version__} finds no GPU'
        findings.append(Finding(what, 'device: cpu'))
    return shown, findings


def _gpus() -> dict[str, str]:
    nvml = open_nvml()
    try:
        shown = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            reading = read_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
            shown[f'GPU {index}'] = f'{reading.name}, driver {reading.driver}'
        return shown
    finally:
        nvml.nvmlShutdown()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ''


def _print_inputs(console: Console, probes: list[InputProbe]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column('input')
    table.add_column('publishers', overflow='fold')
    table.add_column('asked')
    for heading in ('matches', 'Hz', 'lost'):
        table.add_column(heading, justify='right')
    for found in probes:
        durability = 'transient_local' if found.topic.latched else 'volatile'
        table.add_row(
            found.resolved,
            '\n'.join(map(str, found.publishers)) or 'none',
            f'{found.topic.reliability}, {durability}',
            'no' if found.mismatch else 'yes' if found.publishers else '',
            f'{found.rate_hz:.1f}',
            'n/a' if found.lost is None else f'{found.lost} ({100 * found.loss:.1f} %)',
        )
    console.print(table)


def _print_rows(console: Console, rows: dict[str, str]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style='bold')
    table.add_column(overflow='fold')
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)


def _print_findings(console: Console, findings: list[Finding]) -> None:
    for number, finding in enumerate(findings, 1):
        console.print(f'{number}. {finding.what}', markup=False, soft_wrap=True)
        console.print(f'   {finding.fix}', markup=False, soft_wrap=True, highlight=False)
    if not findings:
        console.print('nothing is wrong')

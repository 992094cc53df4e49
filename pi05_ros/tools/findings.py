"""What is wrong, and the line that mends it: the judgements of ``pi05-ros doctor``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pi05_ros.control.parameters import NodeSettings
from pi05_ros.control.topics import TASK_PROMPT
from pi05_ros.transport import DEFAULT_PROFILE, profile_environment

if TYPE_CHECKING:
    from pi05_ros.ros.probe import InputProbe

# Below it, an image now and then; above it, the transport does not hold the images.
MAX_LOSS = 0.01
NODE_LINE = 'ros2 run pi05_ros policy_node --ros-args'
PROFILE_VARIABLES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        what: which part, and its figure.
        fix: the line to type, or to change.
    """

    what: str
    fix: str


def input_findings(probes: Iterable[InputProbe], settings: NodeSettings) -> list[Finding]:
    """Judge every input; the latched task may also come as a parameter."""
    findings = []
    used = {probe.resolved for probe in probes}
    for probe in probes:
        if probe.topic.name == TASK_PROMPT:
            findings += _task_findings(probe, settings)
        elif not probe.publishers:
            findings.append(_missing(probe, used))
        elif probe.mismatch:
            findings.append(_mismatched(probe))
        elif not probe.received:
            findings.append(_silent(probe))
        else:
            findings += _slow_or_lossy(probe, settings)
    return findings


def transport_findings(variables: Mapping[str, str]) -> list[Finding]:
    """Judge the environment variables that decide who hears whom."""
    findings = []
    expected = next(iter(profile_environment(DEFAULT_PROFILE)))
    for name in PROFILE_VARIABLES:
        path = variables.get(name)
        if path and not Path(path).is_file():
            findings.append(Finding(f'{name}: there is no file {path}', profile_line()))
        elif path and name != expected and not variables.get(expected):
            what = f'{name} is set, but the Fast DDS that is installed reads {expected}'
            findings.append(Finding(what, f'export {expected}={path}'))
    if variables.get('ROS_AUTOMATIC_DISCOVERY_RANGE', '').upper() == 'OFF':
        what = 'ROS_AUTOMATIC_DISCOVERY_RANGE is OFF: no other process is found'
        findings.append(Finding(what, 'export ROS_AUTOMATIC_DISCOVERY_RANGE=SUBNET'))
    return findings


def profile_line() -> str:
    """Return the line that gives a process the transports that hold whole images."""
    ((name, path),) = profile_environment(DEFAULT_PROFILE).items()
    return f'export {name}={path}'


def _task_findings(probe: InputProbe, settings: NodeSettings) -> list[Finding]:
    if probe.mismatch:
        return [_mismatched(probe)]
    if probe.publishers or settings.prompt:
        return []
    line = (
        'ros2 topic pub -1 --qos-durability transient_local '
        f'{probe.resolved} std_msgs/msg/String "data: pick up the cup"'
    )
    return [Finding(f'no task: nobody publishes {probe.resolved}, prompt is empty', line)]


def _missing(probe: InputProbe, used: set[str]) -> Finding:
    domain = os.environ.get('ROS_DOMAIN_ID') or '0'
    what = f'nobody publishes {probe.resolved} (ROS_DOMAIN_ID {domain})'
    others = [name for name in probe.elsewhere if name not in used]
    if others:
        return Finding(what, f'{NODE_LINE} -r {probe.topic.topic}:={others[0]}')
    return Finding(what, f'start its driver with: export ROS_DOMAIN_ID={domain}')


def _mismatched(probe: InputProbe) -> Finding:
    what, _, fix = probe.mismatch.partition('; ')
    if fix:
        return Finding(what, fix.removeprefix('set '))
    transports = {
        'sensor_msgs/msg/Image': 'raw',
        'sensor_msgs/msg/CompressedImage': 'compressed',
    }
    offered = next(
        (transports[p.type_name] for p in probe.publishers if p.type_name in transports), ''
    )
    if probe.is_image and offered:
        camera = probe.topic.name
        return Finding(
            what,
            f'{NODE_LINE} -p cameras.{camera}.transport:={offered} '
            f'-r camera/{camera}/image_raw{"/compressed" if offered == "compressed" else ""}'
            f':={probe.resolved}',
        )
    others = next(iter(probe.elsewhere), f'<topic of type {probe.topic.type_name}>')
    return Finding(what, f'{NODE_LINE} -r {probe.topic.topic}:={others}')


def _silent(probe: InputProbe) -> Finding:
    who = ', '.join(sorted({publisher.node for publisher in probe.publishers}))
    what = f'{who} matches on {probe.resolved}, but nothing came in {probe.seconds:.1f} s'
    if probe.is_image:
        return Finding(what, f'start {who} with: {profile_line()}')
    return Finding(what, f'ros2 topic hz {probe.resolved}')


def _slow_or_lossy(probe: InputProbe, settings: NodeSettings) -> list[Finding]:
    findings = []
    if probe.loss > MAX_LOSS:
        who = ', '.join(sorted({publisher.node for publisher in probe.publishers}))
        what = f'{probe.resolved}: {100 * probe.loss:.0f} % of the messages of {who} are lost'
        findings.append(Finding(what, f'start {who} with: {profile_line()}'))
    name, limit_ms = settings.age_limit(probe.topic.name)
    period_ms = 1000 / probe.rate_hz
    if period_ms > limit_ms:
        what = (
            f'{probe.resolved}: {probe.rate_hz:.1f} Hz, so a message gets {period_ms:.0f} ms old, '
            f'more than {name} {limit_ms:g}'
        )
        findings.append(Finding(what, f'{name}: {2 * period_ms:.0f}.0'))
    return findings

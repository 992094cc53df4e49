"""Write the tables of README.md that the code determines.

Usage: python docs/write_tables.py

Between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` stands what this file makes of the
code; ``test/test_docs.py`` fails when README.md and the code have drifted apart.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, not what is installed

from pi05_ros.control import status
from pi05_ros.control.core import ControlCore
from pi05_ros.control.gpu import GpuReading, gpu_status
from pi05_ros.control.inputs import Inputs
from pi05_ros.control.parameter_table import CAMERA_PARAMETERS, PARAMETERS, ParameterSpec
from pi05_ros.control.parameters import settings_from_values
from pi05_ros.control.reasons import Reason
from pi05_ros.control.statistics import STAGE_NAMES, TickStatistics
from pi05_ros.engine.pipeline import STAGES
from pi05_ros.launch_arguments import ARGUMENTS
from pi05_ros.policy.policy import PolicyInfo
from pi05_ros.policy.robot import load_robot
from pi05_ros.ros.bridge import Converter, environment
from pi05_ros.tools.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / 'README.md'
_TABLE = re.compile(r'(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)', re.DOTALL)

LEVELS = {
    'Lifecycle': 'WARN: a transition is running, or the clock stands still. '
    'ERROR: the last transition failed.',
    'Inputs': 'WARN: too old, from the future, cameras apart, no task, or images taken the slow '
    'way. ERROR: missing, unusable, its QoS does not match, or two nodes publish one camera.',
    'Pipeline': 'WARN: P99 of the tick above the period, or `auto` runs eager on a GPU. ERROR: '
    'P50 above the period.',
    'Action': 'WARN: some ticks of the last second did not act, nobody subscribes to the '
    'commands, or the clock stands still. ERROR: none did.',
    'Model': 'always OK',
    'GPU': 'WARN: it slows itself down because of heat or power.',
}
REASONS = {
    Reason.MISSING_INPUT: 'no message of an input yet, or no task',
    Reason.STALE_INPUT: 'older than `max_image_age_ms` (or the `max_age_ms` of its camera) or '
    '`max_joint_age_ms`',
    Reason.FUTURE_STAMP: 'stamped later than now by more than `max_future_ms`: clocks differ',
    Reason.SKEWED_INPUTS: 'cameras further apart than `max_skew_ms`',
    Reason.MALFORMED_MESSAGE: 'the bytes are not a whole message of that type',
    Reason.BAD_ENCODING: 'an image encoding that is neither read natively nor by cv_bridge',
    Reason.BAD_STEP: 'the row length of an image contradicts its width',
    Reason.SHORT_BUFFER: 'an image with fewer bytes than its size says',
    Reason.BAD_IMAGE_SIZE: 'the size changed since configure, or is impossible',
    Reason.UNDECODABLE_IMAGE: 'a compressed image that cannot be decoded',
    Reason.JOINT_MISSING: 'a joint of the robot file is not in `joint_states`',
    Reason.JOINT_NOT_FINITE: 'a joint or pose value is NaN or infinite',
    Reason.PROMPT_TOO_LONG: "the task does not fit into the model's prompt",
    Reason.CLOCK_JUMP_BACK: 'the ROS clock went back; all inputs were dropped',
    Reason.INFERENCE_FAILED: 'the model failed; the node leaves the active state',
    Reason.ACTION_NOT_FINITE: 'the model returned NaN or infinity: the whole chunk is dropped',
    Reason.ACTION_JUMP: 'the first row is further than `max_jump` from the measured joints',
    Reason.ACTION_TOO_FAST: 'faster than `max_rate` from row to row, or since the action before',
    Reason.ACTION_TOO_LATE: 'watchdog or emergency stop acted while the action was computed',
    Reason.ESTOP: '`~/estop` was called, and `~/estop_reset` not yet',
    Reason.OVERRUN: 'the tick before took longer than the period',
}  # fmt: skip


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, with a newline at the end."""
    lines = [header, ['---'] * len(header), *rows]
    return ''.join('| ' + ' | '.join(cells) + ' |\n' for cells in lines)


def parameter_table() -> str:
    """Return every parameter with type, default, allowed values and meaning."""
    specs = [(spec.name, spec) for spec in PARAMETERS]
    specs += [(f'cameras.<camera>.{spec.name}', spec) for spec in CAMERA_PARAMETERS]
    rows = [
        [f'`{name}`', _default(spec), _allowed(spec),
         spec.settable, _escaped(spec.description)]
        for name, spec in specs
    ]  # fmt: skip
    return markdown(['parameter', 'default', 'allowed', 'set', 'meaning'], rows)


def diagnostics_statuses() -> list[status.Status]:
    """Return every status of a configured node, with its keys."""
    robot = load_robot('franka')
    settings = settings_from_values({'checkpoint': 'DIR'}, robot.camera_names)
    inputs = Inputs(robot, settings)
    info = PolicyInfo(
        checkpoint=Path('DIR'), layout='', checkpoint_sha256='', robot='', stats_files=(),
        normalization='', tokenizer=Path('DIR'), tokenizer_is_paligemma=True,
        discrete_state=True, stage_backends=dict.fromkeys(STAGES, ''), precision='', device='',
        horizon=1, num_steps=1,
    )  # fmt: skip
    core = ControlCore(inputs, None, settings)  # type: ignore[arg-type]
    ros = SimpleNamespace(context=SimpleNamespace(get_domain_id=lambda: 0))
    surroundings = environment(ros, Converter('', None))  # type: ignore[arg-type]
    view = status.LifecycleView('active', '', '', environment=surroundings)
    statistics = TickStatistics()
    return [
        status.lifecycle_status(view),
        status.inputs_status(inputs, settings, 0, {}, {}, 'direct'),
        status.pipeline_status(statistics, settings, info.stage_backends, info.device),
        status.action_status(core, statistics, status.OutputView('', 0, ''), True, 0),
        status.model_status(info.as_dict(), settings, ''),
        gpu_status('cuda:0', GpuReading('', '')),
    ]


def diagnostics_table() -> str:
    """Return every status with its levels and keys; one camera, one stage stands for all."""
    rows = []
    for part in diagnostics_statuses():
        keys = dict.fromkeys(_general(key) for key, _ in part.values)
        rows.append([f'`{part.part}`', LEVELS[part.part], ', '.join(f'`{key}`' for key in keys)])
    return markdown(['status', 'level', 'keys'], rows)


def reason_table() -> str:
    """Return every reason for which a tick publishes no action."""
    rows = [[f'`{reason}`', REASONS[reason]] for reason in Reason]
    return markdown(['reason', 'meaning'], rows)


def launch_table() -> str:
    """Return the arguments of policy.launch.py."""
    rows = [
        [f'`{argument.name}`', _launch_default(argument.default), _escaped(argument.description)]
        for argument in ARGUMENTS
    ]
    return markdown(['argument', 'default', 'meaning'], rows)


def command_table() -> str:
    """Return the subcommands of pi05-ros with their one line of help."""
    actions = build_parser()._subparsers
    assert actions is not None
    (subparsers,) = (
        action for action in actions._actions if isinstance(action, argparse._SubParsersAction)
    )
    rows = [[f'`pi05-ros {c.dest}`', c.help or ''] for c in subparsers._choices_actions]
    return markdown(['command', 'what it does'], rows)


TABLES: dict[str, Callable[[], str]] = {
    'parameters': parameter_table,
    'diagnostics': diagnostics_table,
    'reasons': reason_table,
    'launch': launch_table,
    'commands': command_table,
}


def with_tables(text: str) -> str:
    """Return a document with its tables as the code has them."""
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def _general(key: str) -> str:
    first, _, rest = key.partition(' ')
    if first in ('base', 'wrist'):
        return f'<camera> {rest}'
    if first in (*STAGE_NAMES, 'tick') and rest != 'asked':
        return f'<stage> {rest}'
    return key


def _allowed(spec: ParameterSpec) -> str:
    return spec.constraints.replace('one of: ', '').replace(f'{2**62:g}', '2^62')


def _default(spec: ParameterSpec) -> str:
    value = str(spec.default).lower() if isinstance(spec.default, bool) else str(spec.default)
    return f'`{value}`' if value else ''


def _launch_default(value: str) -> str:
    path = Path(value)
    shown = f'{path.parent.name}/{path.name}' if path.is_absolute() else value
    return f'`{shown}`' if shown else ''


def _escaped(text: str) -> str:
    return text.replace('|', '\\|').replace('<', '&lt;').replace('>', '&gt;')


if __name__ == '__main__':
    README.write_text(with_tables(README.read_text(encoding='utf-8')), encoding='utf-8')

"""What is refused before anything is loaded, and the warm-up on a real observation."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rig import Rig, ScriptedPolicy, make_settings

from pi05_ros.control.loading import (
    WARM_UP_CALLS,
    WarmUpError,
    check_settings,
    load,
    resolve_precision,
    warm_up,
)
from pi05_ros.control.parameters import ParameterError
from pi05_ros.model.errors import CheckpointError
from pi05_ros.policy.errors import PolicyError
from pi05_ros.policy.types import Observation

TINY = Path(__file__).resolve().parent.parent / 'data' / 'golden' / 'pi05_tiny'


def first_observation() -> Observation:
    rig = Rig()
    rig.everything()
    found = rig.inputs.observation('header')
    assert isinstance(found, Observation)
    return found


def test_checkpoint_must_be_named_and_exist(tmp_path):
    with pytest.raises(ParameterError, match='checkpoint is empty; set it to'):
        check_settings(make_settings())
    with pytest.raises(CheckpointError, match='does not exist'):
        check_settings(make_settings(checkpoint=str(tmp_path / 'none')))
    assert check_settings(make_settings(checkpoint=str(TINY))).name == 'franka'


def test_more_rows_to_execute_than_a_chunk_has_are_refused(tiny_checkpoint):
    sizes = dict.fromkeys(('base', 'wrist'), (24, 32))
    settings = make_settings(checkpoint=str(tiny_checkpoint), horizon=5, execute_horizon=6)
    with pytest.raises(ParameterError, match='execute_horizon is 6, but a chunk has 5 rows; exp'):
        load(settings, sizes)
    load(replace(settings, execute_horizon=5), sizes).close()


def test_automatic_precision_is_float32_on_a_cpu():
    assert resolve_precision(make_settings(device='cpu')) == 'float32'
    assert resolve_precision(make_settings(device='cuda:1')) == 'bfloat16'
    assert resolve_precision(make_settings(device='cpu', precision='bfloat16')) == 'bfloat16'


def test_warm_up_acts_a_few_times_on_the_real_observation():
    policy, observation = ScriptedPolicy(), first_observation()
    assert warm_up(policy, observation, make_settings(seed=3, num_steps=2)) >= 0.0
    assert policy.seen == [observation] * WARM_UP_CALLS
    assert policy.calls == [(tick, 3, 2) for tick in range(WARM_UP_CALLS)]


def test_model_that_refuses_the_first_observation_is_refused():
    def refuse() -> None:
        raise PolicyError('action_not_finite', 'the action x is nan')

    with pytest.raises(WarmUpError, match='first observation cannot be acted on: the action x'):
        warm_up(ScriptedPolicy(refuse), first_observation(), make_settings())


def test_control_imports_neither_ros_nor_torch():
    """Replay runs it without ROS, and a node answers before PyTorch is there."""
    code = (
        'import sys\n'
        'import pi05_ros.control.core, pi05_ros.control.status, pi05_ros.control.loading\n'
        'import pi05_ros.control.parameter_file\n'
        "bad = {'rclpy', 'torch', 'pi05_ros.msg', 'sensor_msgs'} & set(sys.modules)\n"
        'assert not bad, bad\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)

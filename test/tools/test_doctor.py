"""``pi05-ros doctor``: exit status, what it prints, and what it says about the environment."""

from __future__ import annotations

import argparse
from pathlib import Path

import pynvml
import pytest

from pi05_ros.control.parameters import settings_from_values
from pi05_ros.tools import cli, doctor
from pi05_ros.tools.findings import Finding, profile_line, transport_findings
from pi05_ros.transport import profile_environment

PROFILE = next(iter(profile_environment('large_images')))
OTHER_PROFILE = next(name for name in doctor.PROFILE_VARIABLES if name != PROFILE)


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, 'nvmlInit', fail)


@pytest.fixture
def nothing_to_hear(monkeypatch: pytest.MonkeyPatch):
    """Without DDS: what the inputs look like is tested in test/ros."""
    monkeypatch.setattr(doctor, 'probe', lambda *args: ([], {'RMW': 'rmw_test'}))


@pytest.mark.usefixtures('no_driver', 'nothing_to_hear')
def test_nothing_wrong_is_status_0(capsys: pytest.CaptureFixture[str]):
    assert cli.main(['doctor']) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith('nothing is wrong')
    for shown in ('rmw_test', 'torch', 'triton', 'rclpy', 'NVML Shared Library Not Found'):
        assert shown in printed


@pytest.mark.usefixtures('no_driver', 'nothing_to_hear')
def test_findings_of_a_checkpoint_are_status_1(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(['doctor', '--checkpoint', str(tiny_checkpoint)]) == 0
    bare = tmp_path / 'bare'
    bare.mkdir()
    for name in ('config.json', 'model.safetensors'):
        (bare / name).write_bytes((tiny_checkpoint / name).read_bytes())
    capsys.readouterr()
    assert cli.main(['doctor', '--checkpoint', str(bare)]) == 1
    printed = capsys.readouterr().out
    assert '1. checkpoint: ' in printed
    assert f'   pi05-ros checkpoint inspect {bare}' in printed


def test_wrong_parameter_is_status_2(capsys: pytest.CaptureFixture[str]):
    assert cli.main(['doctor', '-p', 'rate:=5']) == 2
    assert 'unknown parameter rate' in capsys.readouterr().err


def test_options_win_over_parameters_and_those_over_the_file(tmp_path: Path):
    file = tmp_path / 'policy.yaml'
    file.write_text('/**:\n  ros__parameters:\n    robot: libero\n    rate_hz: 5.0\n    seed: 3\n')
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    options = ['--params-file', str(file), '-p', 'rate_hz:=10.0', '--robot', 'franka']
    settings = doctor.settings_of(parser.parse_args(['doctor', *options]))
    assert (settings.robot, settings.rate_hz, settings.seed) == ('franka', 10.0, 3)


@pytest.mark.usefixtures('no_driver')
def test_gpu_that_is_asked_for_and_not_there_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    _, found = doctor.examine_gpu(settings_from_values({'device': 'cuda:0'}, ()))
    assert [finding.fix for finding in found] == ['device: cpu']


def test_gpu_that_pytorch_cannot_use_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr(doctor, '_gpus', lambda: {'GPU 0': 'NVIDIA H200, driver 580'})
    shown, (found,) = doctor.examine_gpu(settings_from_values({}, ()))
    assert shown == {'GPU 0': 'NVIDIA H200, driver 580'}
    assert 'cannot use the GPU that the driver shows' in found.what


def test_environment_that_is_fine_gives_no_finding():
    assert transport_findings({}) == []
    assert transport_findings(profile_environment('large_images')) == []


def test_profile_that_does_not_exist_is_named():
    assert transport_findings({PROFILE: '/nowhere.xml'}) == [
        Finding(f'{PROFILE}: there is no file /nowhere.xml', profile_line())
    ]


def test_profile_in_a_variable_that_fast_dds_does_not_read_is_named():
    (path,) = profile_environment('large_images').values()
    assert transport_findings({OTHER_PROFILE: path}) == [
        Finding(
            f'{OTHER_PROFILE} is set, but the Fast DDS that is installed reads {PROFILE}',
            f'export {PROFILE}={path}',
        )
    ]


def test_discovery_that_is_off_is_named():
    (found,) = transport_findings({'ROS_AUTOMATIC_DISCOVERY_RANGE': 'OFF'})
    assert found.fix == 'export ROS_AUTOMATIC_DISCOVERY_RANGE=SUBNET'

"""What was installed in this environment is the whole package, usable far from its source."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pi05_ros import resources
from pi05_ros.model.errors import Pi05Error

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_path('purelib'))
SHARE = Path(sys.prefix, 'share', 'pi05_ros')
EXECUTABLES = Path(sys.prefix, 'lib', 'pi05_ros')

installed = pytest.mark.skipif(
    not (SITE / 'pi05_ros' / 'resources.py').is_file(),
    reason='pi05_ros is not installed in this environment',
)


def run_away_from_source(command: list[str], env: dict[str, str], cwd: Path) -> str:
    result = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@installed
def test_every_module_is_installed_as_it_is_here():
    here = {p.relative_to(ROOT): p for p in (ROOT / 'pi05_ros').rglob('*') if p.is_file()}
    different = [
        str(name)
        for name, path in here.items()
        if '__pycache__' not in name.parts
        if not (SITE / name).is_file() or (SITE / name).read_bytes() != path.read_bytes()
    ]
    assert different == []


@installed
@pytest.mark.parametrize('folder', ['config', 'launch', 'msg'])
def test_shared_files_are_installed(folder):
    here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob('*.*') if p.suffix != '.pyc'}
    assert {name for name in here if not (SHARE / name).exists()} == set()


@installed
def test_messages_and_resources_are_found_from_elsewhere(clean_environment, tmp_path):
    code = (
        'from pi05_ros.msg import ActionChunk, StageTiming\n'
        'from pi05_ros import resources\n'
        'print(resources.share_dir(), resources.demo_bag())'
    )
    output = run_away_from_source([sys.executable, '-c', code], clean_environment, tmp_path)
    assert output == f'{SHARE} {SHARE / "demo" / "libero_spatial_bowl"}'


@installed
@pytest.mark.parametrize('folder', [EXECUTABLES, Path(sys.prefix, 'bin')])
def test_the_command_runs_from_elsewhere(folder, clean_environment, tmp_path):
    output = run_away_from_source(
        [str(folder / 'pi05-ros'), '--version'], clean_environment, tmp_path
    )
    assert output.startswith('pi05_ros ')
    assert (folder / 'policy_node').is_file()


@installed
def test_the_package_is_in_the_ament_index():
    assert (SHARE.parent / 'ament_index' / 'resource_index' / 'packages' / 'pi05_ros').is_file()
    assert (SHARE / 'package.xml').read_bytes() == (ROOT / 'package.xml').read_bytes()


def test_a_source_tree_is_its_own_share_directory():
    assert resources.share_dir() == ROOT
    assert resources.robot_dir() == ROOT / 'config' / 'robots'
    assert (resources.demo_bag() / 'metadata.yaml').is_file()


def test_modules_without_the_rest_of_the_package_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, '__file__', str(tmp_path / 'pi05_ros' / 'resources.py'))
    with pytest.raises(Pi05Error, match=r'no share/pi05_ros .* install the package'):
        resources.share_dir()

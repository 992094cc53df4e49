"""package.xml, setup.py, CMakeLists.txt and the lock files agree with the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import pi05_ros

ROOT = Path(__file__).parents[2]
MANIFEST = ElementTree.parse(ROOT / 'package.xml').getroot()
LOCKS = ('python', 'kilted', 'jazzy')
# Name of the import -> (name on the package index, name of the ROS dependency). Without the
# latter where no Debian package has it; pip installs those beside ROS 2.
PYTHON_PACKAGES = {
    'PIL': ('pillow', 'python3-pil'),
    'matplotlib': ('matplotlib', 'python3-matplotlib'),
    'numpy': ('numpy', 'python3-numpy'),
    'pydantic': ('pydantic', 'python3-pydantic'),
    'pynvml': ('nvidia-ml-py', ''),
    'rich': ('rich', 'python3-rich'),
    'rosbags': ('rosbags', ''),
    'safetensors': ('safetensors', ''),
    'sentencepiece': ('sentencepiece', ''),
    'torch': ('torch', ''),
    'yaml': ('pyyaml', 'python3-yaml'),
}
# Used where they are installed; what needs them says what to install.
OPTIONAL = {'cv_bridge', 'tensorrt', 'torch_tensorrt', 'triton', 'modelopt', 'cuda', 'pyarrow'}


@pytest.fixture(scope='module')
def setup_module():
    spec = importlib.util.spec_from_file_location('pi05_ros_setup', ROOT / 'setup.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_same_everywhere():
    assert MANIFEST.findtext('version') == pi05_ros.__version__


def imports_of(folder: str) -> set[str]:
    found: set[str] = set()
    for path in (ROOT / folder).rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or '').split('.')[0])
    return found - set(sys.stdlib_module_names) - {'pi05_ros'}


def is_ros(name: str) -> bool:
    kinds = ('_msgs', '_srvs', '_interfaces')
    return name in {'rclpy', 'launch', 'launch_ros'} or name.endswith(kinds)


def test_every_python_package_that_is_imported_is_required(setup_module):
    imported = {n for n in imports_of('pi05_ros') | imports_of('launch') if not is_ros(n)}
    imported -= OPTIONAL
    assert imported <= set(PYTHON_PACKAGES), 'add it here, in setup.py and in package.xml'
    required = {re.split(r'[<>=]', r)[0] for r in setup_module.REQUIREMENTS}
    assert {PYTHON_PACKAGES[name][0] for name in imported} == required
    depends = {e.text for e in MANIFEST.findall('exec_depend')}
    debian = {PYTHON_PACKAGES[name][1] for name in imported} - {''}
    assert debian == {d for d in depends if d.startswith('python3-')}


def test_every_ros_package_that_is_imported_is_a_dependency():
    imported = {n for n in imports_of('pi05_ros') | imports_of('launch') if is_ros(n)}
    declared = {e.text for tag in ('depend', 'exec_depend') for e in MANIFEST.findall(tag)}
    assert imported <= declared


def test_every_message_is_generated():
    cmake = (ROOT / 'CMakeLists.txt').read_text(encoding='utf-8')
    listed = set(re.findall(r'^\s+(msg/\w+\.msg)$', cmake, flags=re.MULTILINE))
    assert listed == {f'msg/{path.name}' for path in (ROOT / 'msg').glob('*.msg')}


@pytest.mark.parametrize('name', LOCKS)
def test_lock_files_pin_exact_versions(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    loose = [line for line in lines if not re.match(r'#|[\w.-]+(\[\w+\])?==[\w.+]+( ;|$)', line)]
    assert loose == []


@pytest.mark.parametrize('name', LOCKS)
def test_lock_files_hold_all_that_is_asked_for(name):
    def names(suffix: str) -> set[str]:
        text = (ROOT / 'requirements' / f'{name}{suffix}').read_text(encoding='utf-8')
        found = re.findall(r'^([\w.-]+)', text, flags=re.MULTILINE)
        return {n.lower().replace('_', '-') for n in found}

    assert names('.in') <= names('.txt')


def test_setup_files_name_no_server():
    files = [ROOT / 'Makefile', ROOT / 'pyproject.toml', ROOT / 'setup.py', ROOT / '.ci' / 'run']
    files += (ROOT / 'requirements').iterdir()
    wrong = [path.name for path in files if re.search(r'https?://|index-url', path.read_text())]
    assert wrong == []


def test_missing_generators_are_an_error_that_says_what_to_install(
    setup_module, monkeypatch, tmp_path
):
    monkeypatch.delenv('AMENT_PREFIX_PATH', raising=False)
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    with pytest.raises(SystemExit, match=r'no ROS 2 message generators in .*kilted\.txt'):
        setup_module.ros_prefixes()


def test_a_sourced_ros_is_searched_first(setup_module, monkeypatch, tmp_path):
    generators = tmp_path / 'share' / 'rosidl_default_generators'
    modules = tmp_path / 'lib' / 'python3' / 'dist-packages'
    for folder in (generators, modules):
        folder.mkdir(parents=True)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path))
    assert setup_module.ros_prefixes() == [str(tmp_path), sys.prefix]
    assert setup_module.sourced_python_paths() == [str(modules)]

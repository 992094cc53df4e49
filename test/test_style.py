"""Rules about the source that no linter knows, or that must hold wherever the tests run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'pi05_ros'
MAX_LINES = 400
# A file that may be longer, and why. The limit is for reading, so the reason is one, too.
LONGER_FILES: dict[str, str] = {}

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ('pi05_ros', 'launch', 'test', 'docs', 'scripts')
    for path in (ROOT / folder).rglob('*.py')
)
FOLDERS = (
    *('.ci', 'cmake', 'config', 'docs', 'launch', 'msg', 'pi05_ros', 'requirements'),
    *('scripts', 'test'),
)
TEXT_SUFFIXES = {'.py', '.md', '.rst', '.toml', '.txt', '.xml', '.yaml', '.sh', '.in', '.msg', ''}
TEXTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, pattern in (('.', '*'), *((folder, '**/*') for folder in FOLDERS))
    for path in (ROOT / folder).glob(pattern)
    if path.is_file() and path.suffix in TEXT_SUFFIXES and '__pycache__' not in path.parts
    if path.name != '.git'  # a file where the checkout is a worktree
)


@pytest.mark.parametrize('part', ['model', 'engine', 'policy', 'control'])
def test_a_part_below_ros_imports_without_rclpy(part):
    """The AST test beside this one does not see what an imported module imports in turn."""
    modules = [
        '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        for path in sorted((PACKAGE / part).glob('*.py'))
    ]
    loaded = import_in_new_process(modules)
    foreign = {name.split('.')[0] for name in loaded}
    assert not foreign & {'rclpy', 'launch_ros', 'std_msgs', 'sensor_msgs'}


def test_the_model_needs_nothing_else_of_this_package():
    modules = [f'pi05_ros.model.{p.stem}' for p in sorted((PACKAGE / 'model').glob('*.py'))]
    loaded = {name for name in import_in_new_process(modules) if name.startswith('pi05_ros.')}
    assert {name.split('.')[1] for name in loaded} == {'model'}


def import_in_new_process(modules: list[str]) -> list[str]:
    imports = '; '.join(f'import {name}' for name in modules)
    command = f"import sys; {imports}; print('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, '-c', command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout.split()


@pytest.mark.parametrize('name', SOURCES)
def test_a_file_is_short_enough_to_read(name):
    lines = len((ROOT / name).read_text(encoding='utf-8').splitlines())
    assert lines <= MAX_LINES or name in LONGER_FILES, f'{lines} lines; split it'


def test_every_exception_from_the_length_is_still_needed():
    for name, reason in LONGER_FILES.items():
        assert reason
        assert len((ROOT / name).read_text(encoding='utf-8').splitlines()) > MAX_LINES, name


@pytest.mark.parametrize('name', [n for n in SOURCES if n.startswith(('pi05_ros/', 'launch/'))])
def test_what_is_public_has_a_docstring(name):
    tree = ast.parse((ROOT / name).read_text(encoding='utf-8'))
    assert list(undocumented(tree, Path(name).stem)) == []


def undocumented(node: ast.AST, where: str):
    """Yield the public functions and classes without a docstring, nested functions excepted."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if child.name.startswith('_'):
                continue
            if ast.get_docstring(child) is None:
                yield f'{where}.{child.name}'
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f'{where}.{child.name}')


def test_no_file_names_a_path_of_one_machine():
    # Split, so that this file does not name them either.
    places = '|'.join(('/wo' + 'rk', '/ro' + 'ot', '/ho' + 'me', '/us' + 'ers', '/t' + 'mp'))
    machine_path = re.compile(rf'(?<![\w.$)}}/])(?:{places})/\w', re.IGNORECASE)
    wrong = [
        f'{name}:{number}: {line.strip()}'
        for name in TEXTS
        for number, line in enumerate((ROOT / name).read_text('utf-8').splitlines(), 1)
        if machine_path.search(line)
    ]
    assert wrong == []


def test_no_function_is_left_unfinished():
    markers = re.compile('|'.join((r'\bTO' + r'DO\b', r'\bFIX' + r'ME\b', r'\bXX' + r'X\b')))
    wrong = [n for n in SOURCES if markers.search((ROOT / n).read_text(encoding='utf-8'))]
    assert wrong == []

"""Nothing in the package runs what it reads: no pickle, no eval, no shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ('pi05_ros', 'launch', 'scripts') for path in (ROOT / folder).rglob('*.py')
)
MODULES = {'pickle', 'cPickle', '_pickle', 'marshal', 'shelve', 'dill', 'cloudpickle', 'joblib'}
BUILTINS = {'eval', 'exec', 'compile', '__import__'}
CALLS = {
    *('torch.load', 'torch.hub.load', 'os.system', 'os.popen', 'runpy.run_path'),
    *('yaml.load', 'yaml.load_all', 'yaml.full_load', 'yaml.unsafe_load', 'yaml.unsafe_load_all'),
    *('subprocess.getoutput', 'subprocess.getstatusoutput'),
}
NUMPY_LOAD = {'np.load', 'numpy.load', 'np.lib.format.read_array'}


def dangerous(source: str) -> Iterator[str]:
    """Yield what a source does that can run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f'{node.module}.{alias.name}'
                for alias in node.names
                if node.module in MODULES or f'{node.module}.{alias.name}' in CALLS
            )
        elif isinstance(node, ast.Call):
            yield from dangerous_call(node)


def dangerous_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in CALLS | BUILTINS:
        yield name
    elif name in NUMPY_LOAD and given.get('allow_pickle') != 'False':
        yield f'{name} without allow_pickle=False'
    elif given.get('allow_pickle', 'False') != 'False':
        yield f'{name} with allow_pickle'
    elif given.get('shell', 'False') != 'False':
        yield f'{name} with shell'


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert list(dangerous(path.read_text(encoding='utf-8'))) == []


@pytest.mark.parametrize(
    'source',
    [
        'import pickle',
        'from pickle import loads',
        'from os import system',
        'import torch\ntorch.load("a")',
        'np.load("a")',
        'np.load("a", allow_pickle=True)',
        'np.savez("a", allow_pickle=flag)',
        'yaml.load(text, Loader=Any)',
        'eval("1")',
        'exec("1")',
        'os.system("ls")',
        'subprocess.run("ls", shell=True)',
    ],
)
def test_the_check_sees_what_it_looks_for(source):
    assert list(dangerous(source))

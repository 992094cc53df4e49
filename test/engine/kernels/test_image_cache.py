"""Compiled kernels on disk: never out of date, never half of one, never in the way."""

from __future__ import annotations

import logging

import pytest

from pi05_ros.engine.kernels.image_cache import cached_image, image_folder

INPUTS = [b'version', b'__global__ void f() {}']


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path / 'pi05_ros' / 'kernels'


class Compiler:
    """Gives another image every time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return bytes([self.calls]) * 1000


def test_what_was_compiled_is_read_and_not_compiled_again(folder):
    compiler = Compiler()
    first = cached_image(INPUTS, compiler)
    assert cached_image(INPUTS, compiler) == first == bytes([1]) * 1000
    assert compiler.calls == 1
    assert image_folder() == folder and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    'inputs',
    [[INPUTS[0], b'__global__ void g() {}'], [b'other', INPUTS[1]], [b'v', b'ersion' + INPUTS[1]]],
    ids=['source', 'version', 'border'],
)
def test_other_inputs_are_another_image(inputs):
    compiler = Compiler()
    assert cached_image(INPUTS, compiler) != cached_image(inputs, compiler)


@pytest.mark.parametrize('damage', [lambda b: b[:-1], lambda b: b'', lambda b: b[:-1] + b'x'])
def test_a_damaged_file_is_compiled_again(folder, damage):
    compiler = Compiler()
    cached_image(INPUTS, compiler)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cached_image(INPUTS, compiler) == bytes([2]) * 1000
    assert cached_image(INPUTS, compiler) == bytes([2]) * 1000
    assert list(folder.iterdir()) == [path]


def test_a_place_that_is_no_folder_costs_the_time_to_compile_and_is_said(folder, caplog):
    folder.parent.mkdir()
    folder.write_text('in the way')
    compiler = Compiler()
    with caplog.at_level(logging.INFO):
        images = [cached_image(INPUTS, compiler) for _ in range(2)]
    assert images == [bytes([1]) * 1000, bytes([2]) * 1000]
    assert 'are not kept in' in caplog.text and folder.read_text() == 'in the way'


def test_a_user_without_a_home_compiles(monkeypatch, caplog):
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr('pathlib.Path.home', _no_home)
    with caplog.at_level(logging.INFO):
        assert cached_image(INPUTS, Compiler()) == bytes([1]) * 1000
    assert 'not kept: no home' in caplog.text


def _no_home() -> None:
    raise RuntimeError('no home')

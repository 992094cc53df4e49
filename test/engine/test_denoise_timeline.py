"""The marks of scripts/denoise_timeline.py; their times need a GPU."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def timeline(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / 'scripts'))
    import denoise_timeline

    yield denoise_timeline
    for name in ('denoise_timeline', 'bench_denoise'):
        sys.modules.pop(name)


def test_every_kernel_of_a_layer_gets_its_marks(timeline, tmp_path):
    source = timeline.write_marked_sources(tmp_path)
    written = ''.join(path.read_text() for path in tmp_path.iterdir())
    assert source.parent == tmp_path
    for index in range(len(timeline.KERNELS)):
        marks = [f'timeline[{index}][blockIdx.x][{mark}] = ' for mark in range(4)]
        assert [written.count(mark) for mark in marks] == [1, 1, 1, 1]
    assert written.count('times().waited = time_now()') == 1
    assert written.count('times().arrived = time_now()') == 1


def test_a_kernel_of_another_form_is_said(timeline, tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, 'KERNELS', (*timeline.KERNELS, 'no_such_kernel'))
    with pytest.raises(SystemExit, match='no_such_kernel'):
        timeline.write_marked_sources(tmp_path)

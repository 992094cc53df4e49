"""What is handed to the compiler of CUDA C++."""

from __future__ import annotations

from pathlib import Path

from pi05_ros.engine.kernels.nvrtc import included_files


def test_headers_of_headers_are_found_once(tmp_path: Path):
    files = {
        'kernel.cu': '#include "block.cuh"\n#include "tile.cuh"\n',
        'block.cuh': '#include "base.cuh"\n',
        'tile.cuh': '#include "base.cuh"\n',
        'base.cuh': '#include <cuda.h>\n// #include "nothing.cuh"\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = included_files(tmp_path / 'kernel.cu')
    assert [path.name for path in found] == ['block.cuh', 'tile.cuh', 'base.cuh']

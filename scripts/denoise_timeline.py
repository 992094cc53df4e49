#!/usr/bin/env python3
"""Print when the kernels of one denoise layer start, wait, get their weights and end, on a GPU.

    python scripts/denoise_timeline.py --horizon 50 --prefix 712

The kernels overlap (programmatic dependent launch), so that times of single kernels do not say
what a layer waits for. This runs marked copies of the sources: thread 0 of every block notes the
GPU's clock when the kernel begins, when the kernel before it is complete, when the last copy that
it waits for has arrived, and at its end. The times of the last layer of a run are printed: first,
median and last block, in microseconds since the first block of the first kernel began. The marks
cost time themselves: compare shapes, not sums.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_denoise import make_stage, raise_clocks, random_state

from pi05_ros.engine import hopper_chain
from pi05_ros.engine.denoise_tuner import time_run_us
from pi05_ros.engine.hopper_chain import HopperChain
from pi05_ros.engine.kernels.nvrtc import compile_module, included_files
from pi05_ros.model.config import Pi05Config

# In the order of a layer; what a launch is called and the name of its kernel are the same.
KERNELS = ('qkv', 'attend', 'attention_out', 'gate_up', 'down')
MARKS = ('begins', 'may go on', 'copies there', 'ends')
_MAX_BLOCKS = 256
_KERNEL = re.compile(
    r'^extern "C" __global__ void __launch_bounds__\([^()]*\) (?P<name>\w+)\('
    r'[^{;]*\) \{[^\n]*\n(?P<body>.*?)^\}\n',
    re.MULTILINE | re.DOTALL,
)
_CLOCK = f"""
__device__ u64 timeline[{len(KERNELS)}][{_MAX_BLOCKS}][{len(MARKS)}];
__device__ __forceinline__ u64 time_now() {{
  u64 ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
  return ns;
}}
struct Times {{ u64 waited, arrived; }};
__device__ __forceinline__ Times& times() {{
  __shared__ Times of_block;
  return of_block;
}}
"""
_WAITS = (
    ('wait_for_previous() {', 'waited'),
    ('barrier_wait(u64* barrier) {', 'arrived'),
)


def marked(text: str) -> str:
    """Return a source or header with the marks in its kernels."""

    def with_marks(match: re.Match[str]) -> str:
        name, body = match['name'], match['body']
        if name not in KERNELS:
            return match[0]
        at = f'timeline[{KERNELS.index(name)}][blockIdx.x]'
        begin = f'  if (threadIdx.x == 0) times() = {{0, 0}}, {at}[0] = time_now();\n'
        noted = f'{at}[1] = times().waited, {at}[2] = times().arrived, {at}[3] = time_now()'
        end = f'  if (threadIdx.x == 0) {noted};\n'
        head = match[0][: match.start('body') - match.start()]
        return f'{head}{begin}{body}{end}}}\n'

    return _KERNEL.sub(with_marks, text)


def marked_header(text: str) -> str:
    """Return hopper.cuh with a clock, read behind every wait."""
    for signature, field in _WAITS:
        start = text.index(signature)
        end = text.index('\n}', start)
        note = f'\n  if (threadIdx.x == 0) times().{field} = time_now();'
        text = text[:end] + note + text[end:]
    start = text.index('// Programmatic dependent launch')
    return text[:start] + _CLOCK + text[start:]


def write_marked_sources(folder: Path) -> Path:
    """Write marked copies of the kernels' sources; return the main one."""
    source, written = hopper_chain._SOURCE, ''
    for path in (source, *included_files(source)):
        text = path.read_text()
        text = marked_header(text) if path.name == 'hopper.cuh' else marked(text)
        (folder / path.name).write_text(text)
        written += text
    missing = [name for name in KERNELS if f'timeline[{KERNELS.index(name)}][b' not in written]
    if missing:
        raise SystemExit(f'no marks in the kernels {missing}: their form has changed')
    return folder / source.name


def read_timeline(chain: HopperChain, module: Any) -> torch.Tensor:
    """Return (kernels, blocks, marks) in nanoseconds; 0 where nothing ran."""
    from cuda.bindings import driver

    error, address, size = driver.cuModuleGetGlobal(module, b'timeline')
    assert int(error) == 0
    times = torch.zeros(len(KERNELS), _MAX_BLOCKS, len(MARKS), dtype=torch.int64)
    torch.cuda.synchronize()
    (error,) = driver.cuMemcpyDtoH(times.data_ptr(), address, size)
    assert int(error) == 0
    return times


def print_timeline(times: torch.Tensor, title: str) -> None:
    """Print for every kernel when its blocks pass the marks: first, median and last one."""
    table = Table('kernel', 'blocks', *(f'{mark} (us)' for mark in MARKS), title=title)
    origin = times[0, :, 0][times[0, :, 0] > 0].min()
    for index, name in enumerate(KERNELS):
        rows = times[index][(times[index, :, 3] > 0)]
        cells = []
        for mark in range(len(MARKS)):
            of_mark = rows[:, mark][rows[:, mark] > 0]
            if not len(of_mark):
                cells.append('')
                continue
            us = (of_mark - origin).double() / 1e3
            cells.append(f'{us.min():.2f} {us.median():.2f} {us.max():.2f}')
        table.add_row(name, str(len(rows)), *cells)
    Console(width=150).print(table)


def main() -> None:
    """Run the denoise with marked kernels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--horizon', type=int, default=50)
    parser.add_argument('--prefix', type=int, default=712, help='valid prefix tokens')
    options = parser.parse_args()
    config = Pi05Config.full()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        hopper_chain._SOURCE = write_marked_sources(Path(folder))
        state = random_state(config, 'cuda')
        stage = make_stage(config, state, horizon=options.horizon, prefix=options.prefix)
        chain = stage.chain
        if not isinstance(chain, HopperChain):
            raise SystemExit('the timeline is of the Hopper kernels; they do not run here')
        raise_clocks()
        step_us = time_run_us(stage, 10, 20) / 10
        macros = tuple(chain.defines().items())
        module = compile_module(hopper_chain._SOURCE, macros, stage.noise.device)
        times = read_timeline(chain, module)
    print_timeline(times, f'horizon {options.horizon}: {step_us:.1f} us per step, marks included')


if __name__ == '__main__':
    main()

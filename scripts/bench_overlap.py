#!/usr/bin/env python3
"""Time whole calls with both denoise kernel sets, and the first step beside the prefill.

    python scripts/bench_overlap.py --json overlap.json

Random weights of the released dimensions, 2 views, 200 tokens, horizon 50. Within a kernel set the
actions of every order have to be the same bits; between the sets their cosine is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pi05_ros.engine.cuda_pipeline import OVERLAPS, CudaPipeline
from pi05_ros.engine.pipeline import BackendError, PipelineShape
from pi05_ros.model.config import Pi05Config
from pi05_ros.tools.measure import Inputs, Timing, cosine, draw_inputs, time_calls
from pi05_ros.tools.random_weights import random_state

KERNEL_SETS = ('cuda-clusters', 'triton')
STEPS = (10, 1)
CAMERA_PX = (480, 640)


def make_inputs(config: Pi05Config, shape: PipelineShape) -> Inputs:
    """Draw one observation for a shape."""
    return draw_inputs(
        shape.view_sizes_px, config.vocab_size, shape.max_prompt_tokens,
        (shape.horizon, config.action_dim),
    )  # fmt: skip


def columns(timing: Timing) -> dict[str, float]:
    """Return median milliseconds per stage, and what lies outside of the stages' events."""
    stages = {name: timing.p50_ms(name) for name in timing.percentiles_ms}
    outside = 2 * stages['total'] - sum(stages.values())
    return {**stages, 'outside': outside, 'total p99': timing.percentiles_ms['total'][99]}


def measure(
    state: dict[str, torch.Tensor], config: Pi05Config, kernels: str, overlap: str, calls: int
) -> tuple[dict[int, dict[str, float]], dict[int, np.ndarray]]:
    """Build one pipeline; return its times and its actions by step count."""
    shape = PipelineShape((CAMERA_PX,) * 2, config.max_prompt_tokens, config.action_horizon)
    started = time.perf_counter()
    pipeline = CudaPipeline(
        dict(state), config, shape, denoise_kernels=kernels, overlap_first_step=overlap
    )
    built_s = time.perf_counter() - started
    inputs = make_inputs(config, shape)
    times, actions = {}, {}
    for steps in STEPS:
        times[steps] = columns(time_calls(pipeline, inputs, steps, calls))
        arguments = (inputs.images, inputs.tokens, inputs.noise, steps)
        actions[steps] = pipeline.infer(*arguments).actions
    pipeline.close()
    for steps, row in times.items():
        figures = '  '.join(f'{name} {value:.3f}' for name, value in row.items())
        print(f'{kernels:14s} {overlap:9s} {steps:2d} steps: {figures}', flush=True)
    print(f'{kernels:14s} {overlap:9s} built in {built_s:.1f} s', flush=True)
    return times, actions


def order(fastest: str) -> list[tuple[str, str]]:
    """Return what to build after both sets were timed alone: the faster set first."""
    sets = sorted(KERNEL_SETS, key=lambda name: name != fastest)
    return [(name, overlap) for name in sets for overlap in OVERLAPS if overlap != 'no']


def main() -> None:
    """Measure until the deadline; print lines and a verdict on the bits."""
    started = time.perf_counter()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--calls', type=int, default=60, help='measured calls of a case')
    parser.add_argument('--deadline', type=float, default=3600.0, help='seconds; no build after')
    parser.add_argument('--json', type=Path, help='write all figures here')
    options = parser.parse_args()
    config = Pi05Config.full()
    state = random_state(config, 'cuda')
    found: dict[tuple[str, str], tuple[dict, dict]] = {}
    for name in KERNEL_SETS:
        found[name, 'no'] = measure(state, config, name, 'no', options.calls)
    fastest = min(KERNEL_SETS, key=lambda name: found[name, 'no'][0][STEPS[0]]['total'])
    for name, overlap in order(fastest):
        if time.perf_counter() - started > options.deadline:
            print(f'no time left for {name} {overlap}')
            continue
        try:
            found[name, overlap] = measure(state, config, name, overlap, options.calls)
        except BackendError as refused:
            print(f'{name} {overlap}: {refused}')
    report = {'gpu': torch.cuda.get_device_name(), 'fastest': fastest, 'times_ms': {
        f'{name} {overlap}': times for (name, overlap), (times, _) in found.items()
    }}  # fmt: skip
    for (name, overlap), (_, actions) in found.items():
        if overlap == 'no':
            continue
        same = [np.array_equal(actions[n], found[name, 'no'][1][n]) for n in STEPS]
        print(f'{name} {overlap}: {"same" if all(same) else "OTHER"} bits as alone')
    first, second = (found[name, 'no'][1][STEPS[0]] for name in KERNEL_SETS)
    print(f'cosine between the sets {cosine(first, second):.6f}; faster alone: {fastest}')
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == '__main__':
    main()

#!/usr/bin/env python3
"""Check, time and tune the denoise stage on a GPU with random full-size weights.

    python scripts/bench_denoise.py --check             parity with the plain twin
    python scripts/bench_denoise.py --time              a step, and each kernel of a layer
    python scripts/bench_denoise.py --triton ...        the same of the Triton kernels
    python scripts/bench_denoise.py --retune            find and store their block sizes
    python scripts/bench_denoise.py --check --time --retune --brief --deadline 60

Options may be combined; candidates compile in processes of their own while the rest runs.
Weights of all layers are different tensors, so every step reads them from HBM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pi05_ros.engine.chips import file_name
from pi05_ros.engine.denoise import DenoiseStage
from pi05_ros.engine.denoise_layers import row_block
from pi05_ros.engine.denoise_tuner import (
    UNFIT,
    programs,
    time_graph_us,
    time_run_us,
    tune,
)
from pi05_ros.engine.denoise_tuning import load_denoise_tuning, save_denoise_tuning
from pi05_ros.engine.hopper_chain import HopperChain
from pi05_ros.engine.kernels.prefill_attention import KEY_ROWS_MULTIPLE
from pi05_ros.model.config import Pi05Config
from pi05_ros.tools.terminal import output_file

ALL_SHAPES = (
    (50, 968, 10), (50, 712, 10), (50, 552, 3), (50, 261, 1), (15, 712, 10), (10, 552, 10),
    (10, 901, 3),
)  # fmt: skip
FEW_SHAPES = ((50, 712, 10), (15, 552, 3))
# Without a pause between them. A race once showed in one of three hundred runs.
_REPLAYS = 1000
_TUNED_DIR = Path(__file__).parents[1] / 'pi05_ros' / 'engine' / 'tuned'


def random_state(config: Pi05Config, device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return expert tensors by openpi key name, scaled so that activations stay of order one."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    expert, actions = config.expert, config.action_dim
    width, heads = expert.width, expert.num_heads * expert.head_dim
    at = 'paligemma_with_expert.gemma_expert.model.'
    state = {}
    products = {
        'self_attn.q_proj': (heads, width), 'self_attn.k_proj': (expert.head_dim, width),
        'self_attn.v_proj': (expert.head_dim, width), 'self_attn.o_proj': (width, heads),
        'mlp.gate_proj': (expert.mlp_dim, width), 'mlp.up_proj': (expert.mlp_dim, width),
        'mlp.down_proj': (width, expert.mlp_dim),
    }  # fmt: skip
    norms = [f'{at}norm.dense']
    for layer in range(expert.depth):
        for name, (n, k) in products.items():
            state[f'{at}layers.{layer}.{name}.weight'] = normal(n, k, scale=k**-0.5).bfloat16()
        norms += [f'{at}layers.{layer}.{n}_layernorm.dense' for n in ('input', 'post_attention')]
    linears = {
        'time_mlp_in': (width, width), 'time_mlp_out': (width, width),
        'action_in_proj': (width, actions), 'action_out_proj': (actions, width),
    }  # fmt: skip
    linears |= {name: (3 * width, width) for name in norms}
    for name, (n, k) in linears.items():
        state[f'{name}.weight'] = normal(n, k, scale=k**-0.5)
        state[f'{name}.bias'] = normal(n, scale=0.3)
    return state


def make_stage(
    config: Pi05Config, state: dict[str, torch.Tensor], *, horizon: int, prefix: int,
    max_steps: int = 10,
) -> DenoiseStage:  # fmt: skip
    """Return a stage over a random prefix with room as the pipeline has it, with random noise."""
    generator = torch.Generator('cuda').manual_seed(1)
    room = -(-prefix // KEY_ROWS_MULTIPLE) * KEY_ROWS_MULTIPLE
    shape = (config.expert.depth, room, config.expert.head_dim)
    keys, values = (
        torch.randn(shape, generator=generator, device='cuda').bfloat16() for _ in range(2)
    )
    n_prefix = torch.tensor([prefix], dtype=torch.int32, device='cuda')
    noise = torch.randn(horizon, config.action_dim, generator=generator, device='cuda')
    return DenoiseStage(
        state, config, keys=keys, values=values, n_prefix=n_prefix, noise=noise,
        max_steps=max_steps,
    )  # fmt: skip


def check(
    config: Pi05Config, state: dict[str, torch.Tensor], shapes: tuple[tuple[int, int, int], ...],
    triton: bool,
) -> list[dict]:  # fmt: skip
    """Compare kernels with the plain twin, a graph with no graph, and a run with itself.

    Args:
        shapes: (horizon, prefix tokens, steps) of each comparison.
        triton: compare the Triton kernels, wherever it runs.
    """
    rows = []
    for horizon, prefix, num_steps in shapes:
        stage = make_stage(config, state, horizon=horizon, prefix=prefix)
        if triton:
            use_triton(stage)
        stage.launch(num_steps)
        actions = stage.actions.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stage.launch(num_steps)
        differing = torch.zeros((), dtype=torch.int64, device=actions.device)
        for _ in range(_REPLAYS):
            stage.actions.fill_(float('nan'))
            graph.replay()
            differing += (stage.actions != actions).any()
        bf16 = stage.eager(num_steps)
        exact = float32_twin(config, state, stage).eager(num_steps)
        row = {
            'horizon': horizon, 'prefix': prefix, 'num_steps': num_steps,
            'cos_bf16': cosine(actions, bf16), 'cos_fp32': cosine(actions, exact),
            'cos_bf16_fp32': cosine(bf16, exact),
            'max_error': (actions - bf16).abs().max().item(),
            'other_bits': f'{differing.item()} of {_REPLAYS} replays',
        }  # fmt: skip
        print(row)
        rows.append(row)
    return rows


def float32_twin(
    config: Pi05Config, state: dict[str, torch.Tensor], stage: DenoiseStage
) -> DenoiseStage:
    """Return a float32 stage over the same prefix and noise, for its plain twin."""
    return DenoiseStage(
        state, config, keys=stage.keys.float(), values=stage.values.float(),
        n_prefix=stage.n_prefix, noise=stage.noise, max_steps=stage.max_steps,
        dtype=torch.float32,
    )  # fmt: skip


def use_triton(stage: DenoiseStage) -> DenoiseStage:
    """Let a stage run the Triton kernels, with the block sizes of this GPU, and return it."""
    rows = row_block(stage.horizon)
    stage.use_tuning(load_denoise_tuning(stage.device, stage.config.expert, rows))
    return stage


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the cosine of two tensors taken as vectors."""
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def kernel_chains(stage: DenoiseStage) -> dict[str, Callable[[int], None]]:
    """Return one enqueue function per kernel of a layer, taking the layer."""
    kernels = stage.chain if isinstance(stage.chain, HopperChain) else stage.chain.layer
    names = ('qkv', 'attend', 'merge', 'attention_out', 'gate_up', 'down')
    launches = {
        name: getattr(kernels, f'launch_{name}')
        for name in names
        if hasattr(kernels, f'launch_{name}')  # the Hopper kernels merge in the attention
    }
    row = 0
    return {
        name: (lambda i, launch=launch: launch())
        if name == 'merge'
        else (lambda i, launch=launch: launch(row, i))
        for name, launch in launches.items()
    }


def time_kernels(stage: DenoiseStage) -> dict[str, float]:
    """Return microseconds per launch of each kernel, in a chain of itself over all layers."""
    depth = stage.config.expert.depth
    chains = kernel_chains(stage)

    def chain(names: list[str]) -> float:
        def enqueue() -> None:
            for _ in range(3):
                for layer in range(depth):
                    for name in names:
                        chains[name](layer)

        return time_graph_us(enqueue) / depth / 3

    times = {name: chain([name]) for name in chains}
    times['layer'] = chain(list(chains))
    times |= {f'layer without {n}': chain([m for m in chains if m != n]) for n in chains}

    def ends() -> None:
        for _ in range(20):
            stage.launch_step_end(2, 0)

    times['end of step'] = time_graph_us(ends) / 20
    return times


def time_steps(stage: DenoiseStage) -> dict[str, float]:
    """Return microseconds per step of short and of long runs."""
    return {f'step of {n}': time_run_us(stage, n, 50) / n for n in (1, 3, 10)}


def raise_clocks(seconds: float = 1.5) -> str:
    """Keep the GPU busy until its clocks are up; return what nvidia-smi reads meanwhile."""
    a, b = torch.randn(2, 8192, 8192, device='cuda').bfloat16()
    query = ['nvidia-smi', '--format=csv,noheader']
    query += ['--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,pstate']
    query[-1] += ',clocks_event_reasons.active'
    started = time.perf_counter()
    reading = ''
    while time.perf_counter() - started < seconds:
        for _ in range(100):
            torch.mm(a, b)
        if time.perf_counter() - started > seconds / 2 and not reading:
            reading = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        torch.cuda.synchronize()
    return reading


def copy_bandwidth_tb_s() -> float:
    """Return terabytes per second of a large device copy, read and written bytes together."""
    source = torch.empty(2**31, dtype=torch.uint8, device='cuda').random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / time_graph_us(lambda: target.copy_(source)) / 1e6


def precompile(config: Pi05Config, options: argparse.Namespace) -> None:
    """Compile every ``--parts``-th program into Triton's cache, with a one-layer model."""
    shallow = replace(
        config, expert=replace(config.expert, depth=1), vlm=replace(config.vlm, depth=1)
    )
    state = random_state(shallow, 'cuda')
    stage = make_stage(shallow, state, horizon=options.horizon, prefix=options.prefix, max_steps=2)
    for tuning in programs(use_triton(stage).tuning)[options.precompile :: options.parts]:
        try:
            stage.use_tuning(tuning)
            stage.launch(2)
        except UNFIT as unfit:
            print(tuning, type(unfit).__name__)
    torch.cuda.synchronize()


def start_precompiling(options: argparse.Namespace) -> list[subprocess.Popen]:
    """Start :func:`precompile` in ``--parts`` processes side by side."""
    command = [sys.executable, __file__]
    for name in ('horizon', 'prefix', 'parts'):
        command += [f'--{name}', str(getattr(options, name))]
    return [subprocess.Popen([*command, '--precompile', str(i)]) for i in range(options.parts)]


def wait_for(workers: list[subprocess.Popen], end: float) -> None:
    """Wait for the workers, or stop them at ``end``; what is not compiled is so when it is run."""
    for worker in workers:
        try:
            worker.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            worker.kill()


def main() -> None:
    """Run what the options ask for and print one JSON line last."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='parity with the plain twin')
    parser.add_argument('--time', action='store_true', help='time steps and single kernels')
    parser.add_argument('--retune', action='store_true', help='find and store block sizes')
    parser.add_argument('--triton', action='store_true', help='not the Hopper kernels')
    parser.add_argument('--brief', action='store_true', help='check two shapes only')
    for name, kind, default, text in (
        ('deadline', float, 3600.0, 'seconds after which no more candidates are tried'),
        ('output', Path, _TUNED_DIR, 'folder for the block sizes; default: in the package'),
    ):
        parser.add_argument(f'--{name}', type=kind, default=default, help=text)
    parser.add_argument('--horizon', type=int, default=50)
    parser.add_argument('--prefix', type=int, default=712, help='valid prefix tokens')
    parser.add_argument('--parts', type=int, default=14, help='processes that compile')
    parser.add_argument('--precompile', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--json', type=output_file, help='write all figures here')
    options = parser.parse_args()
    options.end = started + options.deadline
    config = Pi05Config.full()
    if options.precompile is not None:
        precompile(config, options)
        return
    result: dict = {'gpu': torch.cuda.get_device_name(), 'torch': torch.__version__}
    measure(config, options, result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k not in ('check', 'tried')}))


def measure(config: Pi05Config, options: argparse.Namespace, result: dict) -> None:
    """Do what the options ask for, while the candidates of a search compile."""
    workers = start_precompiling(options) if options.retune else []
    state = random_state(config, 'cuda')
    if options.check:
        shapes = FEW_SHAPES if options.brief else ALL_SHAPES
        result['check'] = check(config, state, shapes, options.triton or options.retune)
    stage = make_stage(config, state, horizon=options.horizon, prefix=options.prefix)
    if options.triton or options.retune:
        use_triton(stage)
    wait_for(workers, options.end - 12.0)
    result['clocks'] = raise_clocks(0.8)
    print(f'{options.end - time.perf_counter():.0f} s left, clocks {result["clocks"]}')
    columns = {}
    if options.time:
        result['copy_tb_s'] = copy_bandwidth_tb_s()
        columns['present'] = all_times(stage)
    if options.retune:
        retune(stage, options, result)
        stage.launch(10)
        result['tuned_cosine'] = cosine(stage.actions, stage.eager(10))
        print(f'tuned: cosine to the twin {result["tuned_cosine"]:.6f}')
        columns['tuned'] = all_times(stage)
    result |= columns
    print_table(columns)


def all_times(stage: DenoiseStage) -> dict[str, float]:
    """Return microseconds per step and per kernel."""
    return time_steps(stage) | time_kernels(stage)


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print microseconds, one column per tuning."""
    names = dict.fromkeys(name for times in columns.values() for name in times)
    print(f'{"us":28s}' + ''.join(f'{column:>15s}' for column in columns))
    for name in names:
        values = [times.get(name, float('nan')) for times in columns.values()]
        print(f'{name:28s}' + ''.join(f'{value:15.2f}' for value in values))


def retune(stage: DenoiseStage, options: argparse.Namespace, result: dict) -> None:
    """Search block sizes until the deadline, print every try, store the result."""
    started = time.perf_counter()
    tried: list = []

    def report(change: dict[str, Any], outcome: float | str) -> None:
        tried.append([str(change), outcome])
        brief = ' '.join(
            ' '.join(map(str, asdict(choice).values())) if is_dataclass(choice) else str(choice)
            for choice in change.values()
        )
        shown = outcome if isinstance(outcome, str) else f'{outcome:.1f}'
        print(f'{next(iter(change)):14s} {brief:20s} {shown}', flush=True)

    tuning = tune(stage, report, seconds=options.end - started - 4.0)
    print(f'tuned in {time.perf_counter() - started:.0f} s: {tuning}')
    result['tuning'], result['tried'] = asdict(tuning), tried
    path = options.output / file_name('denoise', result['gpu'])
    save_denoise_tuning(path, stage.config.expert, row_block(stage.horizon), tuning)
    print(f'stored in {path}')


if __name__ == '__main__':
    main()

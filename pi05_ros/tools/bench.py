"""``pi05-ros bench``: how fast a backend is here, and how far that is from what the GPU allows.

Everything that is compared is measured in the same run: the copy bandwidth and matmul rate of the
device, the oracle in plain PyTorch, and the backend, stage by stage.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pi05_ros import __version__
from pi05_ros.engine.build import BACKENDS, build_pipeline, choose_backend
from pi05_ros.engine.eager import EagerPipeline
from pi05_ros.engine.pipeline import Pipeline, PipelineShape
from pi05_ros.model.checkpoint import Checkpoint, load_model, open_checkpoint
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.names import model_name
from pi05_ros.model.pi05 import Pi05Model
from pi05_ros.model.precision import PRECISIONS

from . import bench_ros, measure
from .bench_rate import AtRate, GpuLoad, GpuProbe, measure_at
from .measure import Inputs, LinearModel, Timing
from .random_weights import random_state
from .roofline import Ceilings, stage_floors_ms
from .terminal import image_size, make_console, output_file, positive_count

SWEEP_STEPS = (1, 2, 3, 5, 10)
_ORACLE_CALLS = 10
_PROMPT_CHANGES = 40


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    views: int
    prompt_tokens: int
    horizon: int
    steps: int

    def __str__(self) -> str:
        views = f'{self.views} view' + 's' * (self.views > 1)
        steps = f'{self.steps} step' + 's' * (self.steps > 1)
        return f'{views}, {self.prompt_tokens} tokens, horizon {self.horizon}, {steps}'


STANDARD_CASES = (
    Case(2, 200, 50, 10),
    Case(3, 200, 50, 10),
    Case(2, 40, 50, 10),
    Case(2, 40, 50, 1),
)


@dataclass(frozen=True)
class CaseResult:
    """What was measured for a case; the oracle's part is None where it was left out.

    Args:
        timing: of calls back to back; ``gpu`` is how the GPU was under them, if it tells.
        at_rates: the same at control rates.
    """

    case: Case
    timing: Timing
    gpu: GpuLoad | None
    at_rates: list[AtRate]
    floors_ms: dict[str, float]
    prompt_change_ms: float
    oracle: Timing | None
    cosine: float | None


@dataclass(frozen=True)
class Sweep:
    """Median latency over Euler steps, and the line through it."""

    case: Case
    total_ms: dict[int, float]
    line: LinearModel


@dataclass(frozen=True)
class Build:
    """One pipeline: what building it took."""

    views: int
    start_up_s: float
    peak_memory_bytes: int
    stage_backends: dict[str, str]


@dataclass(frozen=True)
class Report:
    """A whole run."""

    subject: dict[str, str]
    ceilings: Ceilings
    builds: list[Build]
    cases: list[CaseResult]
    sweeps: list[Sweep]

    def as_json(self) -> dict[str, Any]:
        """Return plain data; times are in milliseconds unless the key says otherwise."""
        return asdict(self)


def add_parser(subparsers: Any) -> None:
    """Add ``bench`` to the command line."""
    parser = subparsers.add_parser(
        'bench',
        help='measure a backend stage by stage, against the oracle and the roofline; with --ros '
        'the running node from camera to action',
        description='Measure latency per stage with percentiles, the oracle beside it, the '
        'roofline floor of this device, start-up, memory and the cost of a prompt change. With '
        '--ros: publish camera images from one process, run the node in another, receive its '
        'actions here, and say where the time between went.',
    )
    parser.add_argument('--checkpoint', metavar='DIR', help='default: random weights')
    parser.add_argument('--size', choices=('full', 'tiny'), help='of random weights (full)')
    parser.add_argument('--cases', action='store_true', help='the four standard cases')
    for name, default, text in (
        ('views', 2, 'cameras'),
        ('prompt-tokens', 200, 'tokens of the prompt'),
        ('steps', 10, 'Euler steps'),
        ('iterations', 200, 'measured calls per case'),
    ):
        parser.add_argument(f'--{name}', type=positive_count, default=default, metavar='N',
                            help=f'{text} ({default})')  # fmt: skip
    parser.add_argument('--horizon', type=positive_count, metavar='N', help="default: the model's")
    parser.add_argument(
        '--image-size', type=image_size, default=(480, 640), metavar='WxH', help='640x480'
    )
    parser.add_argument('--backend', default='auto', choices=BACKENDS, help='default: auto')
    parser.add_argument('--precision', choices=PRECISIONS, help='bfloat16')
    parser.add_argument('--device', default='auto', help='default: auto')
    parser.add_argument('--no-oracle', action='store_true', help='leave the slow oracle out')
    parser.add_argument('--no-sweep', action='store_true', help='leave the sweep over steps out')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write every figure')
    parser.add_argument('--plot', type=output_file, metavar='FILE.png', help='write a bar chart')
    bench_ros.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; return the exit status.

    It is 1 where something could not be measured.
    """
    from .bench_report import print_report, save_plot

    bench_ros.check_options(args)
    if args.ros:
        return bench_ros.run(args)
    args.size, args.precision = args.size or 'full', args.precision or 'bfloat16'
    report = Bench(args).run()
    print_report(report, make_console())
    if args.json:
        args.json.write_text(json.dumps(report.as_json(), indent=1) + '\n', encoding='utf-8')
    if args.plot:
        save_plot(report, args.plot)
    return 1 if any(found.refused for case in report.cases for found in case.at_rates) else 0


class Bench:
    """One run: what to measure, and on what."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.checkpoint: Checkpoint | None = None
        if args.checkpoint:
            self.checkpoint = open_checkpoint(args.checkpoint)
            config = self.checkpoint.config
        else:
            config = Pi05Config.full() if args.size == 'full' else Pi05Config.tiny()
        self.config = config
        self.backend, self.device = choose_backend(args.backend, args.device)
        horizon = args.horizon or config.action_horizon
        asked = Case(args.views, args.prompt_tokens, horizon, args.steps)
        self.cases = list(STANDARD_CASES) if args.cases else [asked]
        self.probe = GpuProbe(self.device)

    def run(self) -> Report:
        """Measure everything that was asked for."""
        with closing(self.probe):
            return self._run()

    def _run(self) -> Report:
        ceilings = measure.measure_ceilings(self.device, self.args.precision)
        builds, results, sweeps = [], [], []
        for key in dict.fromkeys((case.views, case.horizon) for case in self.cases):
            group = [case for case in self.cases if (case.views, case.horizon) == key]
            build, found, sweep = self._run_group(group, ceilings)
            builds.append(build)
            results += found
            sweeps += sweep
        order = {case: index for index, case in enumerate(self.cases)}
        results.sort(key=lambda result: order[result.case])
        return Report(self._subject(), ceilings, builds, results, sweeps)

    def _run_group(
        self, group: list[Case], ceilings: Ceilings
    ) -> tuple[Build, list[CaseResult], list[Sweep]]:
        """Measure the cases that one pipeline serves."""
        longest = max(case.prompt_tokens for case in group)
        most = max(*(case.steps for case in group), *SWEEP_STEPS)
        sizes = (self.args.image_size,) * group[0].views
        shape = PipelineShape(sizes, longest, group[0].horizon, group[0].steps, most)
        drawn = measure.draw_inputs(
            sizes, self.config.vocab_size, longest, (shape.horizon, self.config.action_dim)
        )
        state = None if self.checkpoint else self._random_state()
        oracle = {}
        if not self.args.no_oracle:
            oracle = self._measure_oracle(state, shape, drawn, group)
        pipeline, build = self._build(state, shape)
        drawn, results = drawn.lent_by(pipeline), []
        for case in group:
            inputs = drawn.with_tokens(case.prompt_tokens)
            results.append(self._measure(pipeline, case, inputs, ceilings, oracle.get(case)))
        sweeps = [] if self.args.no_sweep else [self._sweep(pipeline, group, drawn)]
        pipeline.close()
        return build, results, sweeps

    def _measure(
        self,
        pipeline: Pipeline,
        case: Case,
        inputs: Inputs,
        ceilings: Ceilings,
        oracle: tuple[Timing, Any] | None,
    ) -> CaseResult:
        timing, gpu, at_rates = self._time(pipeline, case, inputs)
        agreement = None
        if oracle is not None:
            call = (inputs.images, inputs.tokens, inputs.noise, case.steps)
            agreement = measure.cosine(pipeline.infer(*call).actions, oracle[1])
        item_bytes = getattr(torch, self.args.precision).itemsize
        floors = stage_floors_ms(
            self.config, case.views, case.prompt_tokens, case.horizon, case.steps, item_bytes,
            ceilings,
        )  # fmt: skip
        changes = min(_PROMPT_CHANGES, self.args.iterations)
        change = measure.prompt_change_ms(pipeline, inputs, case.steps, changes)
        return CaseResult(
            case, timing, gpu, at_rates, floors, change, oracle and oracle[0], agreement
        )

    def _time(
        self, pipeline: Pipeline, case: Case, inputs: Inputs
    ) -> tuple[Timing, GpuLoad | None, list[AtRate]]:
        """Time a case back to back, then at every rate that was asked for."""
        calls = self.args.iterations

        def run(count: int) -> object:
            return measure.run_calls(pipeline, inputs, case.steps, count)

        timing = measure.time_calls(pipeline, inputs, case.steps, calls)
        gpu = self.probe.load(run, calls)
        at_rates = [
            measure_at(rate_hz, pipeline, inputs, case.steps, calls, timing, self.probe)
            for rate_hz in self.args.rate_hz
        ]
        return timing, gpu, at_rates

    def _measure_oracle(
        self,
        state: dict[str, torch.Tensor] | None,
        shape: PipelineShape,
        drawn: Inputs,
        group: list[Case],
    ) -> dict[Case, tuple[Timing, Any]]:
        """Time the oracle and keep its actions; its weights are gone afterwards."""
        if state is None:
            assert self.checkpoint is not None
            model = load_model(self.checkpoint, str(self.device), self.args.precision)
        else:
            model = _model_of(state, self.config)
        pipeline, found = EagerPipeline(model, shape), {}
        calls = min(_ORACLE_CALLS, self.args.iterations)
        for case in group:
            inputs = drawn.with_tokens(case.prompt_tokens)
            timing = measure.time_calls(pipeline, inputs, case.steps, calls)
            call = (inputs.images, inputs.tokens, inputs.noise, case.steps)
            found[case] = timing, pipeline.infer(*call).actions
        pipeline.close()
        return found

    def _build(
        self, state: dict[str, torch.Tensor] | None, shape: PipelineShape
    ) -> tuple[Pipeline, Build]:
        """Build the pipeline, timed: from the disk, or from random weights that are there."""
        on_gpu = self.device.type == 'cuda'
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        if state is None:
            assert self.checkpoint is not None
            pipeline = build_pipeline(
                self.checkpoint, shape, backend=self.backend, precision=self.args.precision,
                device=str(self.device),
            )  # fmt: skip
        elif self.backend == 'cuda':
            from pi05_ros.engine.cuda_pipeline import CudaPipeline

            pipeline = CudaPipeline(
                state, self.config, shape, self.args.precision, str(self.device)
            )
        else:
            pipeline = EagerPipeline(_model_of(state, self.config), shape)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 0
        backends = dict(pipeline.stage_backends)
        return pipeline, Build(len(shape.view_sizes_px), seconds, peak, backends)

    def _sweep(self, pipeline: Pipeline, group: list[Case], drawn: Inputs) -> Sweep:
        case = min(group, key=lambda case: case.prompt_tokens)
        inputs = drawn.with_tokens(case.prompt_tokens)
        calls = max(1, self.args.iterations // 4)
        total = {
            steps: measure.time_calls(pipeline, inputs, steps, calls).p50_ms('total')
            for steps in SWEEP_STEPS
        }
        return Sweep(replace(case, steps=max(SWEEP_STEPS)), total, measure.fit_steps(total))

    def _random_state(self) -> dict[str, torch.Tensor]:
        return random_state(self.config, str(self.device), self.args.precision)

    def _subject(self) -> dict[str, str]:
        on_gpu = self.device.type == 'cuda'
        weights = str(self.checkpoint.path) if self.checkpoint else f'random ({self.args.size})'
        width, height = self.args.image_size[::-1]
        return {
            'device': torch.cuda.get_device_name(self.device) if on_gpu else 'CPU',
            'backend': self.backend,
            'precision': self.args.precision,
            'weights': weights,
            'images': f'{width}x{height} px',
            'calls per case': str(self.args.iterations),
            'versions': f'pi05_ros {__version__}, PyTorch {torch.__version__}',
            'clock and power': f'not read: {self.probe.fault}' if self.probe.fault else 'by NVML',
        }


def _model_of(state: dict[str, torch.Tensor], config: Pi05Config) -> Pi05Model:
    """Return the oracle over these very tensors, without a copy."""
    with torch.device('meta'):
        model = Pi05Model(config)
    renamed = {model_name(name): tensor for name, tensor in state.items()}
    model.load_state_dict(renamed, strict=True, assign=True)
    return model.eval().requires_grad_(False)

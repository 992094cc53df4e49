"""Choose a backend and build its pipeline. What was asked for runs, or this raises."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from pi05_ros.model.checkpoint import Checkpoint, load_model
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.precision import PRECISIONS

from .eager import EagerPipeline
from .pipeline import BackendError, Pipeline, PipelineShape

BACKENDS = ('auto', 'eager', 'cuda', 'tensorrt')
_log = logging.getLogger(__name__)


def build_pipeline(
    checkpoint: Checkpoint,
    shape: PipelineShape,
    *,
    backend: str = 'auto',
    precision: str = 'bfloat16',
    device: str = 'auto',
) -> Pipeline:
    """Load a checkpoint into the pipeline of a backend.

    Args:
        checkpoint: from :func:`~pi05_ros.model.checkpoint.open_checkpoint`.
        shape: what the pipeline is built for.
        backend: one of :data:`BACKENDS`; 'auto' is the fastest that this machine can run.
        precision: 'bfloat16' or 'float32'.
        device: 'cpu', 'cuda', 'cuda:N', or 'auto' for a GPU where there is one.
    Raises:
        BackendError: backend, precision or device is unknown, is not here, or lacks memory.
        CheckpointError: the weights cannot be loaded.
    """
    if precision not in PRECISIONS:
        raise BackendError(f'unknown precision {precision!r}; known: {", ".join(PRECISIONS)}')
    _check_shape(shape)
    chosen_device = _resolve_device(device, backend)
    chosen, reason = _resolve_backend(backend, chosen_device)
    if backend == 'auto' and chosen == 'cuda':
        misfit = _cuda_misfit(checkpoint.config, shape, chosen_device)
        if misfit is not None:
            chosen, reason = 'eager', misfit
    fell_back = backend == 'auto' and chosen == 'eager' and chosen_device.type == 'cuda'
    _log.log(
        logging.WARNING if fell_back else logging.INFO,
        'backend %s asked for, %s runs on %s in %s (%s)',
        backend, chosen, chosen_device, precision, reason,
    )  # fmt: skip
    try:
        if chosen == 'cuda':
            from .cuda_pipeline import CudaPipeline

            return CudaPipeline.build(checkpoint, shape, precision, str(chosen_device))
        return EagerPipeline(load_model(checkpoint, str(chosen_device), precision), shape)
    except torch.OutOfMemoryError as cause:
        raise BackendError(
            f'{chosen_device} has too little free memory for {checkpoint.path} in {precision}: '
            f'{cause}'
        ) from cause


def choose_backend(backend: str, device: str) -> tuple[str, torch.device]:
    """Return the backend and the device that :func:`build_pipeline` would take.

    Raises:
        BackendError: as there.
    """
    chosen_device = _resolve_device(device, backend)
    return _resolve_backend(backend, chosen_device)[0], chosen_device


def _resolve_device(device: str, backend: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if device == 'auto':
        if backend in ('cuda', 'tensorrt') and not has_gpu:
            raise BackendError(
                f"backend '{backend}' needs an NVIDIA GPU, and PyTorch {torch.__version__} finds "
                "none; use backend 'eager' on the CPU"
            )
        return (
            torch.device('cuda', torch.cuda.current_device()) if has_gpu else torch.device('cpu')
        )
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device('meta')
    if chosen.type not in ('cpu', 'cuda'):
        raise BackendError(f"unknown device {device!r}; known: 'auto', 'cpu', 'cuda', 'cuda:N'")
    if chosen.type == 'cpu':
        return torch.device('cpu')
    if not has_gpu:
        raise BackendError(
            f'device {device!r} asked for, but PyTorch {torch.__version__} finds no NVIDIA GPU; '
            "check nvidia-smi, or use device 'cpu'"
        )
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise BackendError(f'device {device!r} asked for; GPUs here: {torch.cuda.device_count()}')
    return torch.device('cuda', index)


def _resolve_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """Return the backend that will run, and why it is this one."""
    if backend not in BACKENDS:
        raise BackendError(f'unknown backend {backend!r}; known: {", ".join(BACKENDS)}')
    if backend == 'tensorrt':
        raise BackendError(
            f"backend 'tensorrt' is not available in this version; use {_others('tensorrt')}"
        )
    if backend == 'eager':
        return 'eager', 'as asked'
    if backend == 'auto' and device.type == 'cpu':
        return 'eager', 'no other backend runs on a CPU'
    if device.type == 'cpu':
        raise BackendError("backend 'cuda' needs an NVIDIA GPU, device is 'cpu'; use 'eager'")
    if find_spec('triton') is not None:
        return 'cuda', 'as asked' if backend == 'cuda' else 'the fastest on a GPU'
    if backend == 'cuda':
        raise BackendError(
            f"backend 'cuda' needs Triton, which is not installed; pip install triton, or use "
            f'{_others("cuda")}'
        )
    return 'eager', 'Triton, which the faster backend needs, is not installed'


def _cuda_misfit(config: Pi05Config, shape: PipelineShape, device: torch.device) -> str | None:
    """Return why the CUDA backend cannot take this GPU, model or shape; None where it can."""
    from .limits import check_device, check_limits

    try:
        check_device(device)
        check_limits(config, shape)
    except BackendError as misfit:
        return str(misfit)
    return None


def _others(backend: str) -> str:
    return ', '.join(repr(name) for name in BACKENDS if name not in (backend, 'tensorrt'))


def _check_shape(shape: PipelineShape) -> None:
    """Refuse a shape that no call could fit."""
    sizes = [side for size in shape.view_sizes_px for side in size]
    counts = {
        'camera sizes': min(sizes, default=1),
        'max_prompt_tokens': shape.max_prompt_tokens,
        'horizon': shape.horizon,
        'num_steps': shape.num_steps,
    }
    for name, count in counts.items():
        if count < 1:
            raise BackendError(f'{name} must be at least 1, got {count}')
    if shape.num_steps > shape.max_steps:
        raise BackendError(f'num_steps {shape.num_steps} exceeds max_steps {shape.max_steps}')

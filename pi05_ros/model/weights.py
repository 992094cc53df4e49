"""Read ``model.safetensors``: every tensor checked before the first weight is used."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import Pi05Config
from .errors import CheckpointError
from .names import (
    EMBEDDING,
    EMBEDDING_ALIAS,
    UNUSED_HEAD,
    UNUSED_NORM,
    canonical_name,
    expected_shapes,
)
from .precision import parameter_dtype
from .safetensors_header import HeaderError, read_checked_header

_READABLE_DTYPES = ('F32', 'BF16', 'F16')
_LFS_POINTER = b'version https://git-lfs'


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return stored name -> (shape, dtype such as 'BF16') without reading any weight.

    Raises:
        CheckpointError: the file is not a complete safetensors file.
    """
    try:
        with path.open('rb') as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise CheckpointError(
                f'{path} is a Git LFS pointer, not the weights; run "git lfs pull" beside it'
            )
        return read_checked_header(path)
    except (HeaderError, OSError) as cause:
        raise CheckpointError(
            f'{path} is not a complete safetensors file ({cause}); copy or download it again'
        ) from cause


def read_state(
    path: Path, config: Pi05Config, layout: str, device: str, precision: str | None
) -> dict[str, Tensor]:
    """Read the tensors that inference uses, under openpi's names.

    The token embedding is under :data:`~pi05_ros.model.names.EMBEDDING`, whichever name it was
    stored with.

    Args:
        path: the safetensors file.
        config: what the shapes must be.
        layout: see :func:`~pi05_ros.model.names.canonical_name`.
        device: where the tensors go.
        precision: dtypes to cast to, see :mod:`pi05_ros.model.precision`; None: as stored.
    Raises:
        CheckpointError: lists every tensor that is missing, unexpected, of another shape or of a
            dtype that is not readable; or names the tensors that hold NaN or infinity.
    """
    stored_names = check_names(path, read_header(path), config, layout)
    state: dict[str, Tensor] = {}
    broken = []
    try:
        with safe_open(path, framework='pt') as file:
            for name, stored in stored_names.items():
                # A copy: what safe_open gives on the CPU is a window into the file.
                tensor = file.get_tensor(stored).to(device, copy=True)
                if not _is_finite(tensor):
                    broken.append(name)
                dtype = tensor.dtype if precision is None else parameter_dtype(name, precision)
                state[name] = tensor.to(dtype)
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f'{path} cannot be read: {cause}') from cause
    if broken:
        raise CheckpointError(f'{path} holds NaN or infinity in:' + _as_lines(broken))
    return state


def check_names(
    path: Path,
    header: dict[str, tuple[tuple[int, ...], str]],
    config: Pi05Config,
    layout: str,
) -> dict[str, str]:
    """Return openpi name -> stored name of the tensors that inference uses.

    Raises:
        CheckpointError: lists every tensor that does not fit.
    """
    expected = expected_shapes(config)
    expected[EMBEDDING_ALIAS] = expected[EMBEDDING]
    found: dict[str, str] = {}
    faults = []
    for stored, (shape, dtype) in header.items():
        name = canonical_name(stored, layout)
        if name is None:
            continue
        if name in found:
            faults.append(f'twice: {name} (as {found[name]} and {stored})')
        elif name not in expected:
            faults.append(f'unexpected: {stored} {list(shape)}')
        elif shape != expected[name]:
            faults.append(f'shape: {stored} is {list(shape)}, expected {list(expected[name])}')
        elif dtype not in _READABLE_DTYPES:
            faults.append(f'dtype: {stored} is {dtype}, readable are {_READABLE_DTYPES}')
        found[name] = stored
    optional = {EMBEDDING, EMBEDDING_ALIAS, UNUSED_HEAD}
    missing = [name for name in expected if name not in found and name not in optional]
    faults += [f'missing: {name} {list(expected[name])}' for name in missing]
    if EMBEDDING not in found and EMBEDDING_ALIAS not in found:
        faults.append(f'missing: {EMBEDDING} or {EMBEDDING_ALIAS} {list(expected[EMBEDDING])}')
    if faults:
        raise CheckpointError(_describe(path, faults, found))
    embedding = found.pop(EMBEDDING_ALIAS, None)
    if embedding is not None:
        found[EMBEDDING] = embedding
    return {name: found[name] for name in found if name not in (UNUSED_NORM, UNUSED_HEAD)}


def _describe(path: Path, faults: list[str], found: dict[str, str]) -> str:
    advice = 'check that config.json belongs to this file'
    if any(name.startswith('state_proj.') for name in found):
        advice = 'this looks like a π0 checkpoint; pi05_ros runs π0.5'
    return f'{path} does not fit its dimensions ({advice}):' + _as_lines(sorted(faults))


def _as_lines(items: list[str]) -> str:
    return ''.join(f'\n  {item}' for item in items)


def _is_finite(tensor: Tensor) -> bool:
    # The extremes show NaN and infinity alike, and need no mask of the tensor's size.
    if tensor.numel() == 0:
        return True
    extremes = torch.stack(torch.aminmax(tensor))
    return bool(torch.isfinite(extremes).all())

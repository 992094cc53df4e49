"""Golden files: inputs and outputs of openpi's own PyTorch model, one ``.npz`` per case."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi05_ros.model.config import Pi05Config
from pi05_ros.model.errors import Pi05Error

from .npz import NpzError, read_arrays

_INPUTS = ('images_u8', 'view_mask', 'tokens', 'token_mask', 'noise')
_PREFIX_OUTPUTS = ('prefix_embs', 'prefix_keys', 'prefix_values')
_STEPS = re.compile(r'(v|actions)_([1-9]\d{0,3})')
# The full model with three views and 200 tokens takes 50 MB.
MAX_GOLDEN_BYTES = 256 * 1024 * 1024


class GoldenError(Pi05Error):
    """A golden file is damaged, incomplete, or of other dimensions than the checkpoint."""


@dataclass(frozen=True)
class Golden:
    """One case.

    Args:
        views: (V, px, px, 3) uint8, the views that are present.
        tokens: (T,) int64, without padding.
        noise: (H, A) float32.
        outputs: name -> expected array, float32: ``prefix_embs`` (P, W), ``prefix_keys`` and
            ``prefix_values`` (L, P, num_kv_heads * D), ``v_N`` (N, H, A), ``actions_N`` (H, A).
        ignored: names in the file that are none of these.
    """

    views: np.ndarray
    tokens: np.ndarray
    noise: np.ndarray
    outputs: dict[str, np.ndarray]
    ignored: tuple[str, ...]

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The N of every ``v_N`` and ``actions_N``, ascending."""
        found = (_STEPS.fullmatch(name) for name in self.outputs)
        return tuple(sorted({int(match[2]) for match in found if match}))


def read_golden(path: str | Path, config: Pi05Config) -> Golden:
    """Read a golden file and check it against the dimensions of a checkpoint.

    Raises:
        GoldenError: names the array that is missing or does not fit.
    """
    arrays = _read_arrays(Path(path))
    missing = [name for name in _INPUTS if name not in arrays]
    if missing:
        raise GoldenError(f'{path}: missing {", ".join(missing)}; found: {sorted(arrays)}')
    check = _Checker(str(path), arrays)
    px = config.vision.image_px
    images = check.array('images_u8', (None, px, px, 3), np.uint8)
    view_mask = check.array('view_mask', (images.shape[0],), np.bool_)
    tokens = check.array('tokens', (None,), np.integer)
    token_mask = check.array('token_mask', tokens.shape, np.bool_)
    noise = check.array('noise', (None, config.action_dim), np.floating)
    if not noise.shape[0]:
        raise GoldenError(f'{path}: noise has no rows')
    views, tokens = images[view_mask], tokens[token_mask].astype(np.int64)
    if not views.shape[0] + tokens.shape[0]:
        raise GoldenError(f'{path}: every view and every token is masked; there is no prefix')
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise GoldenError(f'{path}: tokens exceed the vocabulary of {config.vocab_size}')
    expected = _output_shapes(
        arrays, config, config.prefix_tokens(views.shape[0], tokens.shape[0]), noise.shape
    )
    outputs = {name: check.output(name, shape) for name, shape in expected.items()}
    if not any(_STEPS.fullmatch(name) for name in outputs):
        raise GoldenError(f'{path}: no v_N or actions_N to compare with; found: {sorted(arrays)}')
    ignored = tuple(sorted(set(arrays) - set(_INPUTS) - set(outputs)))
    return Golden(views, tokens, noise.astype(np.float32), outputs, ignored)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_arrays(path, MAX_GOLDEN_BYTES)
    except FileNotFoundError:
        raise GoldenError(f'golden file {path} does not exist') from None
    except NpzError as cause:
        raise GoldenError(f'{path} cannot be read as .npz: {cause}') from cause


def _output_shapes(
    arrays: dict[str, np.ndarray],
    config: Pi05Config,
    prefix_tokens: int,
    noise_shape: tuple[int, ...],
) -> dict[str, tuple[int, ...]]:
    """Return the shape that each output in the file must have."""
    kv_dim = config.vlm.num_kv_heads * config.vlm.head_dim
    cache = (config.vlm.depth, prefix_tokens, kv_dim)
    shapes: dict[str, tuple[int, ...]] = {
        'prefix_embs': (prefix_tokens, config.vlm.width),
        'prefix_keys': cache,
        'prefix_values': cache,
    }
    shapes = {name: shape for name, shape in shapes.items() if name in arrays}
    for name in arrays:
        if match := _STEPS.fullmatch(name):
            steps = (int(match[2]),) if match[1] == 'v' else ()
            shapes[name] = (*steps, *noise_shape)
    return shapes


class _Checker:
    """Access to the arrays of one file, with errors that name file and array."""

    def __init__(self, where: str, arrays: dict[str, np.ndarray]) -> None:
        self._where = where
        self._arrays = arrays

    def array(self, name: str, shape: tuple[int | None, ...], kind: type) -> np.ndarray:
        array = self._arrays[name]
        fits = array.ndim == len(shape) and all(
            want in (None, have) for want, have in zip(shape, array.shape, strict=True)
        )
        if not fits or not np.issubdtype(array.dtype, kind):
            raise GoldenError(
                f'{self._where}: {name} is {array.shape} {array.dtype}, expected '
                f'({", ".join("any" if want is None else str(want) for want in shape)}) '
                f'{kind.__name__}'
            )
        if kind is np.floating and not np.isfinite(array).all():
            raise GoldenError(f'{self._where}: {name} holds NaN or infinity')
        return array

    def output(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return an expected output; K/V may also come with an axis of K/V heads."""
        array = self._arrays[name]
        if array.ndim == 4 and name in _PREFIX_OUTPUTS:
            array = _join_heads(array, shape)
            self._arrays[name] = array
        return self.array(name, shape, np.floating).astype(np.float32)


def _join_heads(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bring (L, heads, P, D) or (L, P, heads, D) to (L, P, heads * D) where the sizes fit."""
    layers, tokens, width = shape
    if array.size != layers * tokens * width:
        return array
    if array.shape[2] == tokens:
        array = array.transpose(0, 2, 1, 3)
    return array.reshape(shape) if array.shape[1] == tokens else array

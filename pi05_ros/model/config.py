"""Dimensions of a π0.5 model: the only home of these numbers.

Everything that needs a shape (buffers, kernels, checks, benchmarks) reads it from a
:class:`Pi05Config`, which comes from the checkpoint.

Shape letters used across the project: V views, P prefix tokens, T prompt tokens, H action horizon,
A action dimension, L layers, D head dimension, W width, N Euler steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import ConfigError

# Far above any π0.5. What comes from a file stays below, so that no file makes the loader loop
# over a billion layers, or allocate for a billion tokens.
_MAX_SIZE = 2**20
_MAX_COUNTS = {
    'depth': 64,
    'action_dim': 1024,
    'action_horizon': 1000,
    'max_prompt_tokens': 8192,
    'max_views': 16,
}


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower: ``depth`` pre-norm transformer layers over square patches of one image."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    image_px: int = 224
    patch_px: int = 14
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def tokens_per_view(self) -> int:
        """Number of patches, which is the number of image tokens, of one view."""
        return (self.image_px // self.patch_px) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma stack (the language model, or the action expert)."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class Pi05Config:
    """A whole π0.5 model.

    ``max_prompt_tokens`` and ``max_views`` bound what a checkpoint was trained with;
    ``action_horizon`` is the default of a call, which may ask for another.
    """

    vision: VisionConfig
    vlm: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    action_dim: int = 32
    action_horizon: int = 50
    max_prompt_tokens: int = 200
    max_views: int = 3

    def __post_init__(self) -> None:
        self._check()

    def prefix_tokens(self, num_views: int, prompt_tokens: int) -> int:
        """Number of prefix positions for ``num_views`` real views and ``prompt_tokens`` tokens."""
        return num_views * self.vision.tokens_per_view + prompt_tokens

    def with_horizon(self, action_horizon: int) -> Pi05Config:
        """Return the same model with another default horizon."""
        return replace(self, action_horizon=action_horizon)

    def to_dims(self) -> dict[str, Any]:
        """Return the ``dims.json`` form; :meth:`from_dims` reads it back."""
        dims = asdict(self)
        dims['vocab'] = dims.pop('vocab_size')
        return dims

    @classmethod
    def from_dims(cls, dims: Mapping[str, Any], where: str = 'dims') -> Pi05Config:
        """Read the ``dims.json`` form: ``vocab``, ``vision``, ``vlm``, ``expert``, ``action_*``.

        Args:
            dims: the parsed file. Keys that are not dimensions (such as ``source``) are ignored.
            where: named in errors, normally the path of the file.
        Raises:
            ConfigError: a key is missing, is not a positive number, or the sizes do not fit.
        """
        if not isinstance(dims, Mapping):
            raise ConfigError(f'{where} must be an object with dimensions, got {dims!r}')
        try:
            parts = {
                'vision': _section(VisionConfig, dims['vision'], f'{where}: vision'),
                'vlm': _section(GemmaConfig, dims['vlm'], f'{where}: vlm'),
                'expert': _section(GemmaConfig, dims['expert'], f'{where}: expert'),
                'vocab_size': _positive_int(dims['vocab'], f'{where}: vocab'),
            }
        except KeyError as missing:
            raise ConfigError(f'{where}: dimension {missing} is missing') from None
        scalars = ('action_dim', 'action_horizon', 'max_prompt_tokens', 'max_views')
        for name in scalars:
            if name in dims:
                parts[name] = _positive_int(dims[name], f'{where}: {name}')
        return cls(**parts)

    @classmethod
    def full(cls) -> Pi05Config:
        """Return the released model's dimensions (openpi gemma.py, siglip.py)."""
        return cls(
            vision=VisionConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16),
            vlm=GEMMA_VARIANTS['gemma_2b'],
            expert=GEMMA_VARIANTS['gemma_300m'],
            vocab_size=257_152,
        )

    @classmethod
    def tiny(cls) -> Pi05Config:
        """Return a model of the same shape family that runs in milliseconds on a CPU.

        The weights mean nothing; tests, demos and kernel checks use it.
        """
        return cls(
            vision=VisionConfig(width=96, depth=3, mlp_dim=200, num_heads=4),
            vlm=GemmaConfig(128, 3, 256, num_heads=4, num_kv_heads=1, head_dim=32),
            expert=GemmaConfig(64, 3, 128, num_heads=4, num_kv_heads=1, head_dim=32),
            vocab_size=512,
            action_horizon=10,
        )

    def _check(self) -> None:
        vision, vlm, expert = self.vision, self.vlm, self.expert
        for part in (self, vision, vlm, expert):
            _check_limits(part)
        if vision.width % vision.num_heads:
            raise ConfigError(
                f'vision width {vision.width} is not a multiple of its {vision.num_heads} heads'
            )
        if vision.image_px % vision.patch_px:
            raise ConfigError(f'image_px {vision.image_px} is no multiple of {vision.patch_px}')
        for name in ('depth', 'num_kv_heads', 'head_dim'):
            if getattr(vlm, name) != getattr(expert, name):
                raise ConfigError(
                    f'the expert attends to the language model, so {name} must be equal; '
                    f'got vlm {getattr(vlm, name)} and expert {getattr(expert, name)}'
                )
        for name, gemma in (('vlm', vlm), ('expert', expert)):
            if gemma.num_heads % gemma.num_kv_heads or gemma.head_dim % 2:
                raise ConfigError(
                    f'{name}: {gemma.num_heads} heads, {gemma.num_kv_heads} kv heads, head_dim '
                    f'{gemma.head_dim}: heads must share kv heads evenly, head_dim must be even'
                )


# The names that openpi's config.json and lerobot's config.json use (openpi gemma.py:60-110).
GEMMA_VARIANTS: dict[str, GemmaConfig] = {
    'gemma_300m': GemmaConfig(1024, 18, 4096, num_heads=8, num_kv_heads=1, head_dim=256),
    'gemma_2b': GemmaConfig(2048, 18, 16_384, num_heads=8, num_kv_heads=1, head_dim=256),
}


def _section(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Build one dataclass from a mapping, checking that every needed number is there."""
    if not isinstance(values, Mapping):
        raise ConfigError(f'{where} must be an object with dimensions, got {values!r}')
    known = {field.name: field for field in fields(kind)}
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f'{where}: unknown dimension {name!r}; known: {sorted(known)}')
        check = _positive_float if known[name].type == 'float' else _positive_int
        chosen[name] = check(value, f'{where}.{name}')
    try:
        return kind(**chosen)
    except TypeError as missing:
        raise ConfigError(f'{where}: {missing}') from None


def _check_limits(part: Any) -> None:
    """Refuse a size of a dataclass that no model has."""
    for field in fields(part):
        value = getattr(part, field.name)
        limit = _MAX_COUNTS.get(field.name, _MAX_SIZE)
        if field.type == 'int' and value > limit:
            raise ConfigError(f'{field.name} is {value!r:.40}, at most {limit}')


def _positive_float(value: Any, where: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (0 < value <= sys.float_info.max)
    ):
        raise ConfigError(f'{where} must be a positive number, got {value!r:.80}')
    return float(value)


def _positive_int(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f'{where} must be a positive integer, got {value!r:.80}')
    return value

"""How far two action logs are apart: per dimension in robot units, and where they part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from .action_log import ActionLog, ActionLogError
from .parity import cosine_similarity


@dataclass(frozen=True)
class DimensionDifference:
    """One action dimension over all common ticks and rows, in its ``unit``.

    Args:
        cosine: of the two series as vectors; an absolute joint position far from zero makes it
            near 1 whatever the model does, so look at the errors, too.
        mean_abs_error: mean of ``|other - reference|``.
        max_abs_error: largest of them.
        first_action_error: mean of ``|other - reference|`` over the first row of each chunk, which
            is the one that a robot executes first.
        reference_std: how much the reference moves, to judge the errors by.
    """

    name: str
    unit: str
    cosine: float
    mean_abs_error: float
    max_abs_error: float
    first_action_error: float
    reference_std: float


@dataclass(frozen=True)
class FirstDifference:
    """The first number that differs: tick, row of the chunk, dimension, both values."""

    tick: int
    row: int
    name: str
    reference: float
    other: float

    def __str__(self) -> str:
        return (
            f'tick {self.tick}, row {self.row}, {self.name}: '
            f'{self.reference:.9g} became {self.other:.9g}'
        )


@dataclass(frozen=True)
class Comparison:
    """Two logs against each other, on the ticks at which both acted.

    Args:
        ticks: how many those are.
        only_reference, only_other: ticks at which only one of them acted.
        cosine: over everything.
        first_difference: None where all common ticks are equal bit for bit.
    """

    ticks: int
    only_reference: tuple[int, ...]
    only_other: tuple[int, ...]
    cosine: float
    dimensions: tuple[DimensionDifference, ...]
    first_difference: FirstDifference | None

    @property
    def is_identical(self) -> bool:
        """Whether the same ticks acted, and every bit of their actions is the same."""
        return self.first_difference is None and not (self.only_reference or self.only_other)

    @property
    def max_abs_error(self) -> float:
        """Largest difference of any dimension, in its unit."""
        return max((d.max_abs_error for d in self.dimensions), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self) | {'identical': self.is_identical}


def compare(reference: ActionLog, other: ActionLog) -> Comparison:
    """Compare two logs tick by tick.

    Raises:
        ActionLogError: other dimensions or another horizon, or no tick in common.
    """
    if reference.names != other.names or reference.units != other.units:
        raise ActionLogError(
            f'the action dimensions differ: {_named(reference)} against {_named(other)}'
        )
    _, at_reference, at_other = np.intersect1d(
        reference.ticks, other.ticks, assume_unique=True, return_indices=True
    )
    if not at_reference.size:
        raise ActionLogError(
            f'no tick acted in both: {len(reference.ticks)} against {len(other.ticks)} actions'
        )
    if reference.actions.shape[1] != other.actions.shape[1]:
        raise ActionLogError(
            f'the chunks have {reference.actions.shape[1]} and {other.actions.shape[1]} rows '
            '(reference and other); replay both with the same horizon'
        )
    a, b = reference.actions[at_reference], other.actions[at_other]
    columns = range(len(reference.names))
    return Comparison(
        ticks=len(a),
        only_reference=_rest(reference.ticks, at_reference),
        only_other=_rest(other.ticks, at_other),
        cosine=cosine_similarity(a, b),
        dimensions=tuple(_dimension(reference, i, a[..., i], b[..., i]) for i in columns),
        first_difference=_first(reference, reference.ticks[at_reference], a, b),
    )


def summary(comparison: Comparison) -> list[str]:
    """Return the comparison in a line or two, without the dimensions."""
    lines = []
    for who, ticks in (('reference', comparison.only_reference), ('other', comparison.only_other)):
        if ticks:
            lines.append(f'{len(ticks)} ticks acted in the {who} only, first tick {ticks[0]}')
    if comparison.first_difference is None:
        lines.append(f'identical bit for bit on {comparison.ticks} common ticks')
    else:
        lines.append(
            f'cosine {comparison.cosine:.9f} over {comparison.ticks} common ticks; '
            f'first difference: {comparison.first_difference}'
        )
    return lines


def dimension_table(comparison: Comparison, title: str) -> Table:
    """Return cosine and errors of each dimension as a table."""
    table = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD)
    table.add_column('dimension')
    table.add_column('unit')
    for heading in ('cosine', 'MAE', 'max error', 'first action', 'std'):
        table.add_column(heading, justify='right', no_wrap=True)
    for d in comparison.dimensions:
        errors = (d.mean_abs_error, d.max_abs_error, d.first_action_error, d.reference_std)
        table.add_row(d.name, d.unit, f'{d.cosine:.8f}', *(f'{e:.3g}' for e in errors))
    return table


def _dimension(log: ActionLog, index: int, a: np.ndarray, b: np.ndarray) -> DimensionDifference:
    """Compare (N, H) of one dimension."""
    error = np.abs(b.astype(np.float64) - a)
    return DimensionDifference(
        name=log.names[index],
        unit=log.units[index],
        cosine=cosine_similarity(a, b),
        mean_abs_error=float(error.mean()),
        max_abs_error=float(error.max()),
        first_action_error=float(error[:, 0].mean()),
        reference_std=float(a.std(dtype=np.float64)),
    )


def _first(
    log: ActionLog, ticks: np.ndarray, a: np.ndarray, b: np.ndarray
) -> FirstDifference | None:
    # As bits: 0.0 and -0.0 have different digests, too.
    differing = np.argwhere(a.view('<u4') != b.view('<u4'))
    if not differing.size:
        return None
    index = tuple(int(place) for place in differing[0])
    chunk, row, column = index
    return FirstDifference(
        int(ticks[chunk]), row, log.names[column], float(a[index]), float(b[index])
    )


def _rest(ticks: np.ndarray, common: np.ndarray) -> tuple[int, ...]:
    return tuple(int(tick) for tick in np.delete(ticks, common))


def _named(log: ActionLog) -> str:
    return ', '.join(f'{name} [{unit}]' for name, unit in zip(log.names, log.units, strict=True))

"""How the errors of kernels grow as less of them is kept: of each layer, and of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.choices import ChoiceTable
from keras_alds.methods import get_method
from keras_alds.models.inventory import Inventory
from keras_alds.models.resources import Params
from keras_alds.models.selection import Selection, candidates_of
from keras_alds.options import LEAST_CR, Options
from keras_alds.reporting.layers import LayerRow
from keras_alds.resources import removed_fraction

Point = tuple[float, float]
# Points of a curve: more cannot be told apart in a picture.
_MOST = 48


@dataclasses.dataclass(frozen=True)
class Curve:
    """The least error for each size.

    Attributes:
        name: The path of the layer; empty for the whole model.
        points: `(fraction, error)`, sizes ascending. Of a layer, the fraction of its kernel's
            weights that is kept; of the model, the fraction of its parameters that is removed.
        chosen: Where the compressed model is, or None if it has no point.
    """

    name: str
    points: tuple[Point, ...]
    chosen: Point | None


def error_curves(
    before: Inventory, rows: Sequence[LayerRow], after: int
) -> tuple[list[Curve], Curve]:
    """The curve of each layer that can be factorized, and that of the model.

    The error is that of the method `"alds"`: the largest singular value that any slice drops,
    relative to the largest of the whole kernel. Spectra are cached with the layers, so that a model
    for which a plan was made needs no new decomposition.

    Args:
        before: The original model.
        rows: What became of its layers.
        after: The parameters of the compressed model.

    Raises:
        ValueError: If the model is factorized already, holds no layer that can be, or holds NaN.
    """
    forms = {row.path: (row.scheme, row.slices, row.rank) for row in rows if row.rank is not None}
    schemes = tuple(sorted({0, *(scheme for scheme, _, _ in forms.values() if scheme)}))
    options = Options.checked(
        LEAST_CR, {"method": "alds", "schemes": schemes}, has_data=False, caller="report"
    )
    inventory = candidates_of(before, options, stacklevel=4)
    params = Params(inventory, get_method(options.method))
    tables = Selection.of(inventory, [params], options).tables()
    paths = [record.path for record in inventory.candidates]
    curves, fronts, errors = [], [], []
    for path, table in zip(paths, tables, strict=True):
        front, dense = table.front(), int(table.weights.max())
        row = _row_of(table, forms.get(path))
        chosen = None if row is None else (table.weights[row] / dense, table.error[row])
        errors.append(0.0 if row is None else float(table.error[row]))
        points = zip(front.weights / dense, front.error, strict=True)
        curves.append(Curve(path, _thinned(tuple(points)), chosen))
        fronts.append(front)
    chosen = removed_fraction(before.params, after), max(errors)
    return curves, Curve("", _points_of_model(before, fronts), chosen)


def _row_of(
    table: ChoiceTable, form: tuple[int | None, int | None, int | None] | None
) -> int | None:
    """The row of a table for a scheme, slices and a rank."""
    if form is None:
        return None
    scheme, slices, rank = form
    found = np.flatnonzero(
        (table.scheme == scheme) & (table.slices == slices) & (table.rank == rank)
    )
    return int(found[0]) if found.size else None


def _points_of_model(before: Inventory, fronts: Sequence[ChoiceTable]) -> tuple[Point, ...]:
    """What can be removed of a model if no layer may have a larger error."""
    limits = np.unique(np.concatenate([front.error for front in fronts]))[::-1]
    limits = limits[np.unique(np.linspace(0, limits.size - 1, _MOST).astype(int))]
    saved = sum(front.weights.max() - _least(front, limits) for front in fronts)
    return tuple(zip((saved / before.params).tolist(), limits.tolist(), strict=True))


def _least(front: ChoiceTable, limits: NDArray[np.float64]) -> NDArray[np.int64]:
    """The fewest weights with an error of at most each limit. Errors of a front descend."""
    at = np.searchsorted(-front.error, -limits, side="left")
    return front.weights[np.minimum(at, len(front) - 1)]


def _thinned(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """At most so many of the points, with both ends."""
    keep = np.unique(np.linspace(0, len(points) - 1, _MOST).astype(int))
    return tuple((float(points[i][0]), float(points[i][1])) for i in keep)

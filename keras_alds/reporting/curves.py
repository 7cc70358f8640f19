"""How the errors of kernels grow as less of them is kept: of each layer, and of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_alds.core.chains import is_chain
from keras_alds.core.choices import ChoiceTable
from keras_alds.core.solvers import lower_hull
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
        points: `(fraction, error)`, errors descending. Of a layer, the fraction of its kernel's
            weights that is kept; of the model, the fraction of its parameters that is removed.
        chosen: Where the compressed model is, or None if the layer is dense there.
    """

    name: str
    points: tuple[Point, ...]
    chosen: Point | None


def error_curves(
    before: Inventory, rows: Sequence[LayerRow], after: int
) -> tuple[list[Curve], Curve]:
    """The curve of each layer that can be factorized, and that of the model.

    The error of a layer is ‖W − E D‖ / ‖W‖ (Frobenius norm), that of the model the root of the
    mean square over the layers. A curve has the least errors for the original weights, with at most
    as many slices as the compressed model has.

    Args:
        before: The original model.
        rows: What became of its layers.
        after: The parameters of the compressed model.

    Raises:
        ValueError: If the model is factorized already, holds no layer that can be, or holds NaN.
    """
    rows_by_path = {row.path: row for row in rows}
    found = {row.scheme for row in rows if row.scheme and not is_chain(row.scheme)}
    schemes = tuple(sorted({0, *found}))
    given = {
        "method": "energy",
        "schemes": schemes,
        "target": "size",
        "max_slices": max((row.slices or 1 for row in rows), default=1),
    }
    options = Options.checked(LEAST_CR, given, has_data=False, caller="report")
    inventory = candidates_of(before, options, stacklevel=4)
    params = Params(inventory, get_method(options.method))
    tables = Selection.of(inventory, [params], options).tables()
    curves = [
        _of_layer(record.path, table, rows_by_path[record.path])
        for record, table in zip(inventory.candidates, tables, strict=True)
    ]
    reached = [curve.chosen[1] if curve.chosen else 0.0 for curve in curves]
    chosen = removed_fraction(before.params, after), _mean(np.square(reached).sum(), len(curves))
    fronts = [table.front() for table in tables]
    return curves, Curve("", _of_model(fronts, before.params), chosen)


def _of_layer(path: str, table: ChoiceTable, row: LayerRow) -> Curve:
    front, dense = table.front(), int(table.weights.max())
    points = list(zip((front.weights / dense).tolist(), np.sqrt(front.error).tolist(), strict=True))
    if is_chain(row.scheme):  # not in the table
        saved = (row.params[0] or 0) - (row.params[1] or 0)
        return Curve(path, _thinned(points), (1 - saved / dense, row.measured or 0.0))
    form = (table.scheme == row.scheme) & (table.slices == row.slices) & (table.rank == row.rank)
    at = np.flatnonzero(form)
    if row.rank is None or not at.size:
        return Curve(path, _thinned(points), None)
    error = float(np.sqrt(table.error[at[0]])) if row.measured is None else row.measured
    return Curve(path, _thinned(points), (float(table.weights[at[0]] / dense), error))


def _of_model(fronts: Sequence[ChoiceTable], params: int) -> tuple[Point, ...]:
    """The least mean square of the errors for each size, on the convex hull of all choices.

    There, the layers give up weights in the order of what a weight costs.
    """
    steps = np.concatenate([_steps(front) for front in fronts])
    steps = steps[np.argsort(steps[:, 1] / steps[:, 0], kind="stable")]
    saved, squares = np.cumsum(steps, axis=0).T
    points = [(0.0, 0.0)]
    points += zip((saved / params).tolist(), _mean(squares, len(fronts)).tolist(), strict=True)
    return _thinned(points)


def _steps(front: ChoiceTable) -> np.ndarray:
    """The steps `(weights saved, error added)` along the convex hull of a front, cheapest first."""
    hull = lower_hull(front.weights, front.error)
    steps = np.diff(front.weights[hull]), -np.diff(front.error[hull])
    return np.stack(steps, axis=1)[::-1]


def _mean(squares: Any, count: int) -> Any:
    return np.sqrt(squares / count)


def _thinned(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most so many of the points, with both ends."""
    keep = np.unique(np.linspace(0, len(points) - 1, _MOST).astype(int))
    return tuple(points[index] for index in keep.tolist())

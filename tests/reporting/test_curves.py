"""Error curves: those of single layers by their singular values, that of the model by all."""

from __future__ import annotations

import numpy as np
import pytest

import keras_alds
from keras_alds.models.inventory import Inventory
from keras_alds.reporting.curves import error_curves
from keras_alds.reporting.layers import layer_rows


def curves_of(model, compressed):
    before, after = Inventory.of(model), Inventory.of(compressed)
    rows, _ = layer_rows(before, after, {})
    return rows, *error_curves(before, rows, after.params)


def test_curves_of_layers_and_of_the_model(small):
    given = {"method": "energy", "target": "size", "max_slices": 1, "schemes": 0}
    plan = keras_alds.select(small, 0.5, **given)
    rows, curves, whole = curves_of(small, keras_alds.compress(small, plan=plan))
    assert [curve.name for curve in curves] == ["stem", "down", "hidden", "head"]
    kernel = small.get_layer("hidden").get_weights()[0].astype(np.float64)
    squares = np.linalg.svd(kernel, compute_uv=False) ** 2
    ranks = np.arange(1, kernel.size // sum(kernel.shape) + 1)
    tails = [np.sqrt(squares[rank:].sum() / squares.sum()) for rank in ranks]
    expected = [*zip(ranks * sum(kernel.shape) / kernel.size, tails, strict=True), (1.0, 0.0)]
    np.testing.assert_allclose(curves[2].points, expected, atol=1e-6)

    by_path = {row.path: row for row in rows}
    for curve, choice in zip(curves, [c for c in plan.choices if c.has_kernel], strict=True):
        assert (curve.chosen is not None) == choice.factorized
        if choice.factorized:
            assert curve.chosen[1] == by_path[curve.name].measured
            near = min(curve.points, key=lambda point: abs(point[0] - curve.chosen[0]))
            assert near == pytest.approx(curve.chosen, rel=1e-3)

    errors = [curve.chosen[1] if curve.chosen else 0.0 for curve in curves]
    assert whole.chosen == pytest.approx((plan.cr, np.sqrt(np.mean(np.square(errors)))))
    saved, error = np.array(whole.points).T
    assert (saved[0], error[0]) == (0, 0)
    assert (np.diff(saved) > 0).all()
    slopes = np.diff(error**2) / np.diff(saved)
    assert (np.diff(slopes) > -1e-9).all(), "not convex"
    # The plan of this method is the best one, so that it lies between the hull and a step above.
    assert np.interp(plan.cr, saved, error**2) <= whole.chosen[1] ** 2 + 1e-9
    assert whole.chosen[1] < error[np.searchsorted(saved, plan.cr) + 1]


def test_many_points_are_thinned(keras_module):
    K = keras_module
    model = K.Sequential([K.Input((400,)), K.layers.Dense(400, name="wide")])
    _, (curve,), whole = curves_of(model, keras_alds.compress(model, 0.5, method="energy"))
    for points in (curve.points, whole.points):
        assert len(points) <= 48
        assert min(error for _, error in points) == 0
        assert max(error for _, error in points) > 0.9


def test_there_are_no_curves_of_a_compressed_model(small):
    compressed = keras_alds.compress(small, 0.4)
    with pytest.raises(ValueError, match="Expected a model that is not compressed yet"):
        curves_of(compressed, compressed)

"""Pictures of models: the lines and bars are what the weights and the outputs say."""

from __future__ import annotations

import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds import plots
from keras_alds.models.inventory import walk

pytest.importorskip("matplotlib")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

LAYERS = ["stem", "down", "hidden", "head"]


def curves(ax):
    """The lines by their labels, and the points of the dots."""
    lines = {line.get_label(): line for line in ax.lines if len(line.get_xdata()) > 1}
    dots = [line for line in ax.lines if len(line.get_xdata()) == 1]
    return lines, [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots]


def assert_on_lines(dots, lines, plan):
    """Every dot is a point of the line of its layer."""
    for dot, choice in zip(dots, plan.factorized, strict=True):
        line = lines[choice.layer]
        points = np.stack([line.get_xdata(), line.get_ydata()], axis=1)
        assert np.abs(points - dot).max(axis=1).min() < 1e-6


def test_errors_and_singular_values(small):
    plan = keras_alds.select(small, {"params": 0.4}, method="alds", max_slices=1)
    given = Figure().subplots()
    ax = plots.size_error(small, plan, max_slices=1, ax=given)
    assert ax is given
    lines, dots = curves(ax)
    assert list(lines) == LAYERS
    for line in lines.values():
        assert (np.diff(line.get_xdata()) > 0).all()
        assert (np.diff(line.get_ydata()) < 0).all()
        assert (line.get_xdata()[-1], line.get_ydata()[-1]) == (1, 0)
    assert dots == [
        (pytest.approx(c.params_after / c.params_before), c.error) for c in plan.factorized
    ]
    assert_on_lines(dots, lines, plan)

    ax = plots.singular_values(small, plan, layers=["hidden", "d.*n"])
    lines, dots = curves(ax)
    assert list(lines) == ["down", "hidden"]
    for name, line in lines.items():
        kernel = np.asarray(small.get_layer(name).kernel)
        values = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)
        np.testing.assert_allclose(line.get_ydata(), values / values[0], rtol=1e-3)
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, len(values) + 1) / len(values))
    ranks = {c.layer: c.rank for c in plan.factorized if c.layer in lines}
    assert dots == [
        (lines[name].get_xdata()[rank], lines[name].get_ydata()[rank])
        for name, rank in ranks.items()
    ]
    assert plt.get_fignums() == []


def test_output_errors_are_those_of_the_layers_outputs(small, keras_module):
    x, _ = zoo.images(64)
    plan = keras_alds.select(small, 0.4, calibration_data=x, max_slices=1)
    compressed = keras_alds.compress(small, plan=plan, calibration_data=x)
    ax = plots.output_errors(small, compressed, x[:40], plan=plan)
    (bars,) = ax.containers
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [choice.layer for choice in plan.factorized]
    for name, bar in zip(names, bars, strict=True):
        wanted, found = (
            zoo.outputs(keras_module.Model(m.input, m.get_layer(name).output), x[:40])
            for m in (small, compressed)
        )
        error = np.square(found - wanted).sum() / np.square(wanted).sum()
        assert bar.get_width() == pytest.approx(error, rel=1e-3)
    (alone,) = ax.lines
    assert list(alone.get_xdata()) == [choice.error for choice in plan.factorized]
    assert list(alone.get_ydata()) == list(range(len(names)))
    # The chosen points lie on the curves of the calibration data too.
    lines, dots = curves(plots.size_error(small, plan, calibration_data=x, max_slices=1))
    assert_on_lines(dots, lines, plan)

    with pytest.raises(ValueError, match="Received: one with 0 factorized"):
        plots.output_errors(small, small, x)
    other = zoo.sequential(keras_module)
    with pytest.raises(ValueError, match="which are of another model"):
        plots.output_errors(other, compressed, x)
    with pytest.raises(ValueError, match="Expected `calibration_data` for the method 'activation'"):
        plots.size_error(small, plan)
    with pytest.raises(ValueError, match="Received: 'heads', which names none"):
        plots.singular_values(small, layers="heads")
    with pytest.raises(TypeError, match=r"size_error\(\) got an unexpected .* 'layer'"):
        plots.size_error(small, layer="head")


def test_layers_whose_names_keras_numbers_match_by_order(keras_module):
    model, again = zoo.subclassed(keras_module), zoo.subclassed(keras_module)
    plan = keras_alds.select(model, 0.4, method="energy", max_slices=1)
    assert plan.factorized[0].layer not in dict(walk(again))
    compressed = keras_alds.compress(again, plan=plan)
    ax = plots.output_errors(model, compressed, zoo.images(16)[0])
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [choice.layer for choice in plan.factorized]
    _, dots = curves(plots.size_error(again, plan, max_slices=1))
    assert [error for _, error in dots] == [choice.error for choice in plan.factorized]

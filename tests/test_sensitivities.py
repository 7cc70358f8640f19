"""`sensitivity`: the choices of single layers, and what they do to the outputs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import zoo

import keras_alds

X, _ = zoo.images(64)


def test_rows_are_the_choices_of_select_for_one_layer(small):
    stats = keras_alds.CalibrationStats.collect(small, X, verbose=0)
    result = keras_alds.sensitivity(small, stats, fraction=0.4, max_slices=2, verbose=0)
    names = [row.layer for row in result.layers]
    assert names == ["stem", "down", "hidden", "head"]
    for row in result.layers:
        plan = keras_alds.select(
            small, 1e-6, method="activation", bounds={row.layer: (0.4, None)}, max_slices=2,
            exclude=[name for name in names if name != row.layer], calibration_data=stats,
        )  # fmt: skip
        (choice,) = plan.factorized
        assert (row.layer, row.kind, row.params) == (
            choice.layer,
            choice.kind,
            choice.params_before,
        )
        assert (row.slices, row.rank, row.scheme) == (choice.slices, choice.rank, choice.scheme)
        assert row.error == pytest.approx(choice.error)
        assert row.divergence == pytest.approx(choice.divergence)
        assert row.removed == pytest.approx(1 - choice.params_after / choice.params_before)
        assert row.removed >= 0.4


@pytest.fixture
def net():
    """Two layers that matter to the outputs, and one that hardly does."""
    L = keras.layers
    inputs = keras.Input((8,))
    x = L.Dense(24, "relu", name="first")(inputs)
    y = L.Dense(24, name="branch", kernel_initializer=keras.initializers.Orthogonal(0.01))(x)
    x = L.Add(name="add")([x, y])
    return keras.Model(inputs, L.Dense(10, name="head")(x), name="net")


@pytest.fixture
def digits():
    return np.random.default_rng(0).standard_normal((64, 8)).astype("float32")


def test_what_it_predicts_is_what_happens(net, digits):
    """The squared error of the outputs, relative to their variance, if one layer is cut."""
    net.compile(loss="mse")
    result = keras_alds.sensitivity(net, digits, verbose=0)
    wanted = zoo.outputs(net, digits)
    for row in result.layers:
        others = [other.layer for other in result.layers if other is not row]
        small = keras_alds.compress(
            net, 1e-6, method="activation", bounds={row.layer: (0.5, None)}, exclude=others,
            calibration_data=digits,
        )  # fmt: skip
        found = zoo.outputs(small, digits)
        measured = np.square(found - wanted).mean() / wanted.var()
        assert measured / 3 < row.divergence < 3 * measured
    assert result.sorted_by("divergence", ascending=True).layers[0].layer == "branch"


def test_macs_of_layers_count_with_that_objective(net, digits):
    by_params, by_macs = (
        {row.layer: row for row in keras_alds.sensitivity(
            net, digits, objective=objective, fraction=0.3, verbose=0
        ).layers}
        for objective in ("params", "macs")
    )  # fmt: skip
    for name in by_params:  # biases take no multiply–accumulates
        assert by_macs[name].removed > 0.3
        row = by_macs[name]
        dense = net.get_layer(name).kernel.shape
        factors = row.rank * (dense[0] + row.slices * dense[1])
        assert row.removed == pytest.approx(1 - factors / np.prod(dense))
        assert by_params[name].removed != by_macs[name].removed


def test_layers_that_cannot_lose_so_much_have_no_figures(net, digits):
    result = keras_alds.sensitivity(net, digits, fraction=0.8, verbose=0)
    none = [row for row in result.layers if row.error is None]
    assert [row.layer for row in none] == ["first"]  # rank 1: 32 weights and 24 biases of 216
    assert none[0].removed is none[0].divergence is None
    assert result.sorted_by("error").layers[-1] is none[0]
    assert result.sorted_by("error", ascending=True).layers[-1] is none[0]
    lines: list[str] = []
    result.summary(print_fn=lines.append)
    assert "each layer alone, without 80% of the parameters of its own" in lines[0]
    assert "no allowed choice removes so much" in lines[0]
    rows = result.to_rows()
    assert [row["layer"] for row in rows] == ["first", "branch", "head"]
    assert rows[1]["divergence"] == result.layers[1].divergence
    pytest.importorskip("matplotlib")
    bars = result.plot().patches
    assert [bar.get_width() for bar in bars] == [row["divergence"] for row in rows[1:]]


def test_compressed_models_are_looked_at_in_their_dense_form(net, digits):
    small = keras_alds.compress(net, 0.3, calibration_data=digits)
    before = zoo.outputs(small, digits)
    result = keras_alds.sensitivity(small, digits, verbose=0)
    assert [row.layer for row in result.layers] == ["first", "branch", "head"]
    np.testing.assert_array_equal(zoo.outputs(small, digits), before)


def test_what_is_refused(net, digits):
    cases = [
        (None, {}, ValueError, "Expected `calibration_data`"),
        (digits, {"fraction": 1}, ValueError, "Received: fraction=1"),
        (digits, {"fraction": "half"}, ValueError, "Received: fraction='half'"),
        (digits, {"method": "alds"}, TypeError, r"sensitivity\(\) got an unexpected .* 'method'"),
        (digits, {"max_slices": 0}, ValueError, "Received: max_slices=0"),
        (digits[:, :4], {}, ValueError, "Expected"),
    ]
    for data, options, kind, text in cases:
        with pytest.raises(kind, match=text):
            keras_alds.sensitivity(net, data, verbose=0, **options)
    result = keras_alds.sensitivity(net, digits, verbose=0)
    with pytest.raises(ValueError, match="Received: column='eror'"):
        result.sorted_by("eror")

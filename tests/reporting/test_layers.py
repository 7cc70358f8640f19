"""What became of each layer, with and without the plan."""

from __future__ import annotations

import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds.models.inventory import Inventory
from keras_alds.plan import Skip
from keras_alds.reporting.layers import choices_of, layer_rows

METHOD = {"method": "energy", "target": "size"}


def rows_of(model, compressed, plan=None):
    before, after = Inventory.of(model), Inventory.of(compressed)
    rows, strangers = layer_rows(before, after, choices_of(before, after, plan) if plan else {})
    assert strangers == []
    assert sum(row.params[1] for row in rows) == compressed.count_params()
    return {row.path: row for row in rows}


def test_rows_of_a_compressed_and_an_expanded_model(small):
    plan = keras_alds.select(small, 0.5, exclude="head", bounds={"hidden": (0.2, None)}, **METHOD)
    compressed = keras_alds.compress(small, plan=plan)
    known, derived = rows_of(small, compressed, plan), rows_of(small, compressed)
    assert [*known] == [*derived] == [choice.layer for choice in plan.choices]
    assert len(plan.factorized) > 1
    for choice in plan.choices:
        for row in (known[choice.layer], derived[choice.layer]):
            assert row.params == choice.costs["params"]
            assert (row.slices, row.rank, row.scheme) == (choice.slices, choice.rank, choice.scheme)
            assert row.kernel_shape == choice.kernel_shape
            # The method's error of fresh factors is the squared distance of the kernels.
            if choice.factorized:
                assert row.measured**2 == pytest.approx(choice.error, rel=1e-3)
        assert (known[choice.layer].skipped or [None])[0] == choice.reason_code
        assert known[choice.layer].predicted == (choice.error if choice.factorized else None)
    assert "exclude" in known["head"].skipped.detail
    assert "only the plan knows" in derived["head"].skipped.detail
    assert derived["bn"].skipped.code is Skip.NO_KERNEL
    total = sum(row.macs[1] for row in known.values())
    assert total == keras_alds.count_macs(compressed)

    dense = rows_of(small, small, plan)
    for choice in plan.factorized:
        assert dense[choice.layer].rank is None
        assert dense[choice.layer].predicted == choice.error
        assert "factorized in the plan" in dense[choice.layer].skipped.detail

    expanded = keras_alds.expand(compressed)
    for rows in (rows_of(small, expanded, plan), rows_of(small, expanded)):
        factorized = [path for path, row in rows.items() if row.expanded]
        assert factorized == [choice.layer for choice in plan.factorized]
        assert sum(row.macs[1] for row in rows.values()) == total
        assert all(
            row.skipped is None and row.measured is None for row in map(rows.get, factorized)
        )


def test_rows_of_wrapped_shared_and_renamed_layers(keras_module):
    model = zoo.wrapped(keras_module)
    compressed = keras_alds.compress(model, 0.4, **METHOD)
    assert rows_of(model, keras_alds.expand(compressed))["features/dense"].expanded
    # The same code makes other names the second time, and only the order tells.
    model, twin = (zoo.sequential_built_by_a_call(keras_module) for _ in range(2))
    plan = keras_alds.select(model, 0.4, **METHOD)
    rows = rows_of(model, keras_alds.compress(twin, plan=plan), plan)
    assert [row.params[1] for row in rows.values()] == [c.params_after for c in plan.choices]


def test_what_belongs_to_no_layer_is_named(keras_module):
    K = keras_module
    model = K.Sequential([K.Input((6,)), K.layers.Dense(4, name="a")])
    other = K.Sequential([K.Input((6,)), K.layers.Dense(4, name="a"), K.layers.Dense(2, name="b")])
    rows, strangers = layer_rows(Inventory.of(model), Inventory.of(other), {})
    assert strangers == ["b"]
    assert rows[0].params == (28, 28)


def test_training_moves_the_measured_error(small):
    compressed = keras_alds.compress(small, 0.4, **METHOD)
    fresh = rows_of(small, compressed)
    (path, *_) = [path for path, row in fresh.items() if row.rank]
    layer = compressed.get_layer(path)
    layer.decoder.assign(np.zeros(layer.decoder.shape))
    assert 0 < fresh[path].measured < 1
    assert rows_of(small, compressed)[path].measured == pytest.approx(1)

"""The singular values of every kind of kernel, dense and in two factors."""

from __future__ import annotations

import numpy as np
import pytest

import keras_alds
from keras_alds.models.inventory import Inventory
from keras_alds.models.ranks import kernel_spectra
from keras_alds.models.recompose import recomposed


def test_factors_have_the_ranks_of_their_product(keras_module):
    K, L = keras_module, keras_module.layers
    inputs = K.Input((8,), dtype="int32")
    x = L.Embedding(60, 16, name="table")(inputs)
    x = L.Conv1D(24, 3, name="conv")(x)
    x = L.LSTM(16, name="lstm")(x)
    model = K.Model(inputs, L.Dense(10, name="head")(x))
    dense = kernel_spectra(Inventory.of(model))
    matrix = np.asarray(model.get_layer("conv").kernel).reshape(48, 24)
    wanted = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(dense["conv"], wanted, rtol=1e-4)

    # Fold scheme 3 in the convolution: its factors unfold otherwise.
    plan = keras_alds.select(model, 0.5, method="energy", target="size", schemes=3)
    keras_alds.apply_plan(model, plan)
    inventory = Inventory.of(model)
    assert {"table", "conv"} < {record.path for record in inventory.factorized}
    assert inventory.model.get_layer("conv").scheme == 3
    factors = kernel_spectra(inventory)
    with recomposed(inventory, inventory.factorized) as again:
        products = kernel_spectra(again)
    assert factors.keys() == products.keys() == dense.keys()
    for path, values in products.items():
        np.testing.assert_allclose(factors[path], values, rtol=1e-3, atol=1e-5 * values[0])
    ranks = {choice.layer: choice.rank for choice in plan.factorized if choice.slices == 1}
    for path, rank in ranks.items():
        if path != "conv":
            assert (factors[path] > 1e-4 * factors[path][0]).sum() == rank
    only = kernel_spectra(Inventory.of(model, exclude=["lstm"]))
    assert only.keys() == {path for path in dense if not path.startswith("lstm")}


def test_a_kernel_with_nan_is_named(small):
    kernel = small.get_layer("down").kernel
    kernel.assign(np.full(tuple(kernel.shape), np.nan))
    with pytest.raises(ValueError, match="Received: NaN or infinity in the kernel of layer 'down'"):
        kernel_spectra(Inventory.of(small))

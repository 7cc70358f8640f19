"""What every kind of layer keeps: equal at full rank, trained, observed, counted, saved.

A kind's own file makes the tests of it: `class TestX(EveryKind)`, parametrized by `case`, which is
(kind, arguments, input shape without the batch).
"""

from __future__ import annotations

from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds import _backend, apply_plan, compress, count_macs, select
from keras_alds._backend.training import AVERAGE, LINEAR
from keras_alds.kinds import base as kinds
from keras_alds.kinds.base import is_factorized, known_kind
from keras_alds.models.optimizer import carried


def name(case):
    return f"{case[0]}-" + "-".join(f"{value}" for value in list(case[1].values())[1:])


def made(K, case, count=3):
    """A stock layer with random weights, and inputs."""
    kind, arguments, shape = case
    layer = getattr(K.layers, kind)(**arguments)
    rng = np.random.default_rng(0)
    if kind == "Embedding":
        x = rng.integers(0, arguments["input_dim"], (count, *shape))
    else:
        x = rng.standard_normal((count, *shape)).astype("float32")
    layer(x)
    layer.set_weights([0.3 * rng.standard_normal(w.shape) for w in layer.get_weights()])
    return layer, x


def choice_for(layer, slices, rank=None):
    *spatial, c, f = kinds.unfolded_shape(layer)
    full = min(int(np.prod(spatial)) * c // slices, f)
    return keras_alds.LayerChoice(
        layer.name,
        type(layer).__name__,
        (*spatial, c, f),
        slices,
        rank or full,
        *(0, {}, 0.0, None),
    )


def variables(layer):
    return [w if isinstance(w, tf.Variable) else w.value for w in layer.trainable_weights]


def value_and_gradients(layer, x):
    with tf.GradientTape() as tape:
        y = tf.convert_to_tensor(layer(x))
        loss = tf.reduce_sum(y**2 * tf.range(1.0, 2.0, 1.0 / y.shape[-1])[: y.shape[-1]])
    gradients = tape.gradient(loss, variables(layer))
    return y.numpy(), [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-6)


def slices_for(case):
    return [1] if case[0] == "Embedding" else [1, 2, 4]


class EveryKind:
    def test_equals_the_stock_layer_at_full_rank(self, keras_module, case):
        layer, x = made(keras_module, case)
        expected = tf.convert_to_tensor(layer(x)).numpy()
        for slices in slices_for(case):
            factorized = zoo.factorized_layer(layer, choice_for(layer, slices))
            assert type(factorized).__name__ == f"Factorized{case[0]}"
            for form in ("auto", "grouped", "split", "merged", "recomposed"):
                factorized.encoder_form = form
                assert_close(tf.convert_to_tensor(factorized(x)).numpy(), expected)
            stock = kinds.kind_of(layer)
            assert_close(
                factorized.kernel.numpy(),
                _backend.backend_of(layer).value(stock.variable(layer)),
            )
            shape = factorized.compute_output_shape((None, *case[2]))
            assert tuple(shape) == (None, *expected.shape[1:])

    def test_gradients_follow_the_chain_rule(self, keras_module, case):
        """The factors' gradients against the dense kernel's, and so what optimizers carry over."""
        layer, x = made(keras_module, case)
        backend, kind = _backend.backend_of(layer), kinds.kind_of(layer)
        slices = slices_for(case)[-1]
        factorized = zoo.factorized_layer(layer, choice_for(layer, slices, rank=1))
        kind.variable(layer).assign(factorized.kernel)
        expected, of_stock = value_and_gradients(layer, x)
        index = [id(v) for v in layer.trainable_weights].index(id(kind.variable(layer)))
        of_kernel = of_stock.pop(index)
        wanted = [*carried(backend, LINEAR, of_kernel, factorized), *of_stock]
        for form in ("grouped", "split", "recomposed"):
            factorized.encoder_form = form
            y, gradients = value_and_gradients(factorized, x)
            assert_close(y, expected)
            for actual, gradient in zip(gradients, wanted, strict=True):
                assert_close(actual, gradient)
        average = carried(backend, AVERAGE, of_kernel, factorized)
        assert_close(average[1], backend.value(factorized.decoder))

    def test_config_round_trip(self, keras_module, case):
        layer, x = made(keras_module, case)
        factorized = zoo.factorized_layer(layer, choice_for(layer, slices_for(case)[-1], rank=1))
        config = factorized.get_config()
        twin = type(factorized).from_config(config)
        assert twin.get_config() == config
        twin(x)
        twin.set_weights(factorized.get_weights())
        assert_close(
            tf.convert_to_tensor(twin(x)).numpy(), tf.convert_to_tensor(factorized(x)).numpy()
        )

    def test_observed_rows_times_the_kernel_are_the_outputs(self, keras_module, case):
        """What calibration takes for inputs is what the kernel, read as a matrix, multiplies."""
        layer, x = made(keras_module, case)
        if case[0] == "Embedding":
            assert not kinds.observable(layer)
            return
        rows = np.concatenate(
            list(known_kind(layer).patches(layer, known_kind(layer).batches(layer, x)))
        )
        rows = rows.transpose(0, 2, 1).reshape(len(rows), -1)  # channel-major, as `unfold` has it
        kernel = kinds.kernel_values(layer)
        f = kernel.shape[-1]
        matrix = np.moveaxis(kernel, -2, 0).reshape(-1, f)
        products = rows @ matrix
        if layer.activation is not None:
            layer.activation = keras_module.activations.linear
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(0 * layer.bias)
        outputs = tf.convert_to_tensor(layer(x)).numpy()
        if "Transpose" in case[0]:
            # Every input position adds its window of outputs: the sums over all of them agree,
            # unless padding cuts some away.
            if layer.padding == "valid":
                axis = 1 if layer.data_format == "channels_first" else -1
                products = products.reshape(-1, layer.filters).sum(0)
                outputs = np.moveaxis(outputs, axis, -1).reshape(-1, layer.filters).sum(0)
                assert_close(products, outputs, 1e-3)
            return
        if case[0] == "EinsumDense":
            # The products' columns are in the order of the kernel's axes, whatever the output's is.
            assert products.size == outputs.size
            np.testing.assert_allclose(
                np.sort(products.ravel()), np.sort(outputs.ravel()), 1e-4, 1e-4
            )
            return
        if getattr(layer, "data_format", None) == "channels_first":
            outputs = np.moveaxis(outputs, 1, -1)
        assert_close(products, outputs.reshape(-1, f))


def model_of(K, case):
    L = K.layers
    kind, arguments, shape = case
    inputs = K.Input(shape, dtype="int32") if kind == "Embedding" else K.Input(shape)
    x = getattr(L, kind)(**arguments, name="layer")(inputs)
    if kind == "Embedding":
        x = L.Dense(16, activation="relu", name="dense")(x)
    x = L.GlobalAveragePooling1D(name="pool")(L.Reshape((-1, x.shape[-1]), name="rows")(x))
    return K.Model(inputs, L.Dense(3, name="head")(x))


class InAModel:
    def test_compressed_trained_and_saved(self, keras_module, case, tmp_path):
        K = keras_module
        model = model_of(K, case)
        _, x = made(K, case, 16)
        y = np.random.default_rng(1).standard_normal((16, 3)).astype("float32")
        model.compile(K.optimizers.Adam(1e-3), "mse")
        model.fit(x, y, verbose=0)
        plan = select(model, 0.2, exclude="head|dense")
        (found,) = plan.factorized
        assert (found.layer, found.kind) == ("layer", case[0])
        small = compress(model, plan=plan)
        assert small.count_params() == plan.params_after
        layer = small.get_layer("layer")
        assert type(layer).__name__ == f"Factorized{case[0]}"

        # In place, in training: the same plan, optimizer state and all.
        apply_plan(model, plan)
        assert_close(zoo.outputs(model, x), zoo.outputs(small, x))
        before = [np.array(w) for w in model.get_layer("layer").get_weights()]
        iterations = int(model.optimizer.iterations)
        model.fit(x, y, verbose=0)
        assert int(model.optimizer.iterations) == iterations + 1
        for old, new in zip(before, model.get_layer("layer").get_weights(), strict=True):
            assert not np.array_equal(old, new)
        expected = zoo.outputs(model, x)
        files = ["model.keras", "model.h5"] if K is keras else ["model.keras", "model.h5", "saved"]
        for file in files:
            model.compile("sgd", K.losses.MeanSquaredError())
            model.save(tmp_path / file)
            loaded = K.models.load_model(tmp_path / file)
            assert type(loaded.get_layer("layer")).__name__ == f"Factorized{case[0]}"
            assert_close(zoo.outputs(loaded, x), expected)
        clone = K.models.clone_model(model)
        clone.set_weights(model.get_weights())
        assert_close(zoo.outputs(clone, x), expected)

    def test_macs_are_those_of_the_plan(self, keras_module, case):
        model = model_of(keras_module, case)
        if case[0] == "Embedding":
            plan = select(model, 0.2, objective="macs")
            (embedding,) = (choice for choice in plan.choices if choice.layer == "layer")
            assert "looks up rows of a table" in embedding.reason
            return
        plan = select(model, 0.2, objective="macs", exclude="head")
        assert plan.factorized
        assert count_macs(model) == plan.costs["macs"].before
        assert count_macs(compress(model, plan=plan)) == plan.costs["macs"].after

    def test_calibrated(self, keras_module, case):
        model = model_of(keras_module, case)
        _, x = made(keras_module, case, 32)
        exclude = "head|dense"
        stats = keras_alds.CalibrationStats.collect(model, x, verbose=0)
        plan = select(model, 0.25, calibration_data=stats, exclude=exclude)
        (found,) = plan.factorized
        assert found.kind == case[0]
        small = compress(model, plan=plan, calibration_data=stats)
        plain = compress(
            model, plan=keras_alds.CompressionPlan.from_dict({**plan.to_dict(), "method": "energy"})
        )
        inner = [
            keras_module.Model(m.inputs, m.get_layer("layer").output) for m in (model, small, plain)
        ]
        dense, aware, blind = (np.asarray(m.predict(x, verbose=0)) for m in inner)
        if case[0] == "Embedding":
            assert "not measured" in found.note
            assert_close(aware, blind)
        else:
            # White noise inputs: hardly better than without data, but never much worse.
            assert np.square(aware - dense).sum() <= 1.05 * np.square(blind - dense).sum()

    @pytest.mark.parametrize("slices", [1, 2])
    def test_expanded_to_stock_layers(self, keras_module, case, slices):
        if case[0] == "Embedding" and slices > 1:
            pytest.skip("always one slice")
        model = model_of(keras_module, case)
        _, x = made(keras_module, case)
        factorize_in_place(model.get_layer("layer"), slices)
        einsum = case[0] == "EinsumDense" and slices > 1
        with pytest.warns(UserWarning, match="stores its zeros") if einsum else nullcontext():
            stock = keras_alds.expand(model)
        names = [layer.name for layer in stock.layers]
        assert {"layer_encoder", "layer"} <= set(names)
        assert ("layer_depthwise" in names) == case[0].startswith("Separable")
        assert not any(is_factorized(layer) for layer in stock.layers)
        assert all(
            type(layer).__module__.startswith(keras_module.__name__) for layer in stock.layers
        )
        assert_close(zoo.outputs(stock, x), zoo.outputs(model, x), 1e-5)
        if not einsum:
            assert stock.count_params() == model.count_params()

    def test_rebuilt_in_tf_keras(self, case):
        model = model_of(keras, case)
        _, x = made(keras, case)
        factorize_in_place(model.get_layer("layer"), 1)
        if case[0] == "Embedding":  # tf_keras hands masks on by itself
            model.get_layer("layer").mask_zero = False
        other = keras_alds.to_tf_keras(model)
        assert is_factorized(other.get_layer("layer"))
        assert_close(zoo.outputs(other, x), zoo.outputs(model, x))


def factorize_in_place(layer, slices):
    factorized = zoo.factorized_layer(layer, choice_for(layer, slices, rank=2))
    backend, kind = _backend.backend_of(layer), kinds.kind_of(layer)
    backend.transplant(layer, factorized, kind.kept)

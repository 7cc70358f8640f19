"""Every kind of layer: equal at full rank, trained, observed, counted, saved, in both Kerases."""

from __future__ import annotations

from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds import _backend, apply_plan, compress, count_macs, select
from keras_alds.kinds import attention
from keras_alds.kinds import base as kinds
from keras_alds.rewrite.in_place import factorized_layer
from keras_alds.rewrite.inspect import is_factorized
from keras_alds.rewrite.observe import layer_inputs, layer_patches
from keras_alds.rewrite.optimizer import AVERAGE, LINEAR, carried

# (kind, arguments, input shape without the batch)
CASES = [
    ("Conv3D", {"filters": 6, "kernel_size": 2}, (4, 5, 3, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": (1, 2, 3), "strides": (1, 2, 1)}, (4, 5, 3, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": 2, "dilation_rate": 2}, (4, 5, 3, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": 3, "padding": "same", "strides": 2}, (4, 5, 3, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": 2, "data_format": "channels_first"}, (4, 4, 5, 3)),
    ("Conv1DTranspose", {"filters": 6, "kernel_size": 3, "strides": 2}, (5, 4)),
    ("Conv1DTranspose", {"filters": 6, "kernel_size": 3, "dilation_rate": 2}, (5, 4)),
    ("Conv2DTranspose", {"filters": 6, "kernel_size": 3}, (5, 4, 4)),
    ("Conv2DTranspose", {"filters": 6, "kernel_size": (2, 3), "strides": (3, 2)}, (5, 4, 4)),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 1},
        (5, 4, 4),
    ),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 4, "strides": 2, "padding": "same", "activation": "tanh"},
        (5, 4, 4),
    ),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 2, "strides": 3, "output_padding": (2, 1)},
        (5, 4, 4),
    ),
    ("Conv2DTranspose", {"filters": 6, "kernel_size": 3, "dilation_rate": 2}, (5, 4, 4)),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 2, "padding": "same", "dilation_rate": 2},
        (5, 4, 4),
    ),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 3, "strides": 2, "data_format": "channels_first"},
        (4, 5, 4),
    ),
    ("Conv3DTranspose", {"filters": 6, "kernel_size": 2, "strides": 2}, (3, 4, 2, 4)),
    ("Conv3DTranspose", {"filters": 6, "kernel_size": 2, "padding": "same"}, (3, 4, 2, 4)),
    ("SeparableConv1D", {"filters": 6, "kernel_size": 3, "strides": 2}, (9, 4)),
    ("SeparableConv1D", {"filters": 6, "kernel_size": 3, "dilation_rate": 2}, (9, 4)),
    ("SeparableConv2D", {"filters": 6, "kernel_size": 3, "depth_multiplier": 2}, (7, 6, 4)),
    ("SeparableConv2D", {"filters": 6, "kernel_size": 3, "dilation_rate": (1, 2)}, (7, 6, 4)),
    (
        "SeparableConv2D",
        {"filters": 6, "kernel_size": (3, 2), "strides": 2, "padding": "same", "use_bias": False},
        (7, 6, 4),
    ),
    ("EinsumDense", {"equation": "ab,bc->ac", "output_shape": 6, "bias_axes": "c"}, (4,)),
    ("EinsumDense", {"equation": "...x,xy->...y", "output_shape": 6, "bias_axes": "y"}, (5, 4)),
    (
        "EinsumDense",
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3), "bias_axes": "de"},
        (5, 4),
    ),
    (
        "EinsumDense",
        {"equation": "abcd,cde->abe", "output_shape": (None, 6), "activation": "tanh"},
        (5, 2, 4),
    ),
    ("EinsumDense", {"equation": "abc,dce->aebd", "output_shape": (3, None, 2)}, (5, 4)),
    ("EinsumDense", {"equation": "abc,cd->ad", "output_shape": 6, "bias_axes": "d"}, (5, 4)),
    ("EinsumDense", {"equation": "ab...,bc->ac...", "output_shape": 6, "bias_axes": "c"}, (4, 5)),
    ("Embedding", {"input_dim": 20, "output_dim": 6}, (7,)),
]
# One case of every kind, in a form that compresses well.
MODELS = [
    ("Conv3D", {"filters": 16, "kernel_size": 3}, (5, 5, 5, 8)),
    ("Conv1DTranspose", {"filters": 16, "kernel_size": 3, "strides": 2}, (5, 16)),
    ("Conv2DTranspose", {"filters": 16, "kernel_size": 3, "strides": 2}, (5, 4, 16)),
    ("Conv3DTranspose", {"filters": 8, "kernel_size": 2, "strides": 2}, (3, 2, 3, 16)),
    ("SeparableConv1D", {"filters": 24, "kernel_size": 3}, (9, 24)),
    ("SeparableConv2D", {"filters": 24, "kernel_size": 3, "padding": "same"}, (6, 6, 24)),
    (
        "EinsumDense",
        {"equation": "abc,cde->abde", "output_shape": (None, 4, 6), "bias_axes": "de"},
        (5, 24),
    ),
    ("Embedding", {"input_dim": 50, "output_dim": 24, "mask_zero": True}, (7,)),
]


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
        *(0, 0, 0, None, None, 0.0, None),
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


@pytest.mark.parametrize("case", CASES, ids=name)
class TestEveryKind:
    def test_equals_the_stock_layer_at_full_rank(self, keras_module, case):
        layer, x = made(keras_module, case)
        expected = tf.convert_to_tensor(layer(x)).numpy()
        for slices in slices_for(case):
            factorized = factorized_layer(layer, choice_for(layer, slices))
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
        factorized = factorized_layer(layer, choice_for(layer, slices, rank=1))
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
        factorized = factorized_layer(layer, choice_for(layer, slices_for(case)[-1], rank=1))
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
        rows = np.concatenate(list(layer_patches(layer, layer_inputs(layer, x))))
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
        if layer.data_format == "channels_first":
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


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case[0])
class TestInAModel:
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
        assert_close(
            np.asarray(model.predict(x, verbose=0)), np.asarray(small.predict(x, verbose=0))
        )
        before = [np.array(w) for w in model.get_layer("layer").get_weights()]
        iterations = int(model.optimizer.iterations)
        model.fit(x, y, verbose=0)
        assert int(model.optimizer.iterations) == iterations + 1
        for old, new in zip(before, model.get_layer("layer").get_weights(), strict=True):
            assert not np.array_equal(old, new)
        expected = np.asarray(model.predict(x, verbose=0))
        files = ["model.keras", "model.h5"] if K is keras else ["model.keras", "model.h5", "saved"]
        for file in files:
            model.compile("sgd", K.losses.MeanSquaredError())
            model.save(tmp_path / file)
            loaded = K.models.load_model(tmp_path / file)
            assert type(loaded.get_layer("layer")).__name__ == f"Factorized{case[0]}"
            assert_close(np.asarray(loaded.predict(x, verbose=0)), expected)
        clone = K.models.clone_model(model)
        clone.set_weights(model.get_weights())
        assert_close(np.asarray(clone.predict(x, verbose=0)), expected)

    def test_macs_are_those_of_the_plan(self, keras_module, case):
        model = model_of(keras_module, case)
        if case[0] == "Embedding":
            plan = select(model, 0.2, objective="macs")
            (embedding,) = (choice for choice in plan.choices if choice.layer == "layer")
            assert "looks rows of a table up" in embedding.reason
            return
        plan = select(model, 0.2, objective="macs", exclude="head")
        assert plan.factorized
        assert count_macs(model) == plan.macs_before
        assert count_macs(compress(model, plan=plan)) == plan.macs_after

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
        with pytest.warns(UserWarning, match="zeros included") if einsum else nullcontext():
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
    factorized = factorized_layer(layer, choice_for(layer, slices, rank=2))
    backend, kind = _backend.backend_of(layer), kinds.kind_of(layer)
    backend.transplant(layer, factorized, kind.kept)


def attention_model(K, name="MultiHeadAttention"):
    L = K.layers
    inputs = K.Input((6, 24))
    arguments = (4, 6) if name == "MultiHeadAttention" else (6, 4, 2)
    layer = getattr(L, name)(*arguments, dropout=0.1, name="attention")
    x = layer(inputs, inputs, use_causal_mask=True)
    x = L.GlobalAveragePooling1D(name="pool")(x)
    return K.Model(inputs, L.Dense(3, name="head")(x))


def attention_data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((16, 6, 24)).astype("f"), rng.standard_normal((16, 3)).astype("f")


class TestAttention:
    @pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupQueryAttention"])
    def test_projections_are_factorized_trained_and_saved(self, keras_module, name, tmp_path):
        K = keras_module
        if not hasattr(K.layers, name):
            pytest.skip(f"{K.__name__} has no {name}")
        model = attention_model(K, name)
        x, y = attention_data()
        model.compile(K.optimizers.Adam(1e-3), "mse")
        model.fit(x, y, verbose=0)
        layer = model.get_layer("attention")
        plan = select(model, 0.3, exclude="head")
        names = {choice.layer for choice in plan.factorized}
        assert names
        assert names <= {f"attention/{n}" for n in ("query", "key", "value", "attention_output")}
        small = compress(model, plan=plan)
        assert type(layer) is getattr(K.layers, name)
        assert small.count_params() == plan.params_after
        apply_plan(model, plan)
        assert model.get_layer("attention") is layer
        assert type(layer).__name__ == f"Factorized{name}"
        assert len(layer.projections) == len(names)
        assert_close(
            np.asarray(model.predict(x, verbose=0)), np.asarray(small.predict(x, verbose=0))
        )
        before = [np.array(w) for w in layer.get_weights()]
        model.fit(x, y, verbose=0)
        moved = [not np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True)]
        assert sum(moved) >= len(moved) - 1  # a key's bias has no effect
        expected = np.asarray(model.predict(x, verbose=0))
        files = ["model.keras", "model.weights.h5"] if K is keras else ["model.keras", "saved"]
        for file in files:
            if file.endswith(".weights.h5"):
                model.save_weights(tmp_path / file)
                loaded = K.models.clone_model(model)
                loaded.load_weights(tmp_path / file)
            else:
                model.save(tmp_path / file)
                loaded = K.models.load_model(tmp_path / file)
            assert type(loaded.get_layer("attention")).__name__ == f"Factorized{name}"
            assert loaded.get_layer("attention").projections == layer.projections
            assert_close(np.asarray(loaded.predict(x, verbose=0)), expected)

    def test_equals_the_stock_layer_at_full_rank(self, keras_module):
        model = attention_model(keras_module)
        x, _ = attention_data()
        layer = model.get_layer("attention")
        expected = zoo.outputs(model, x)
        scores = layer(x, x, return_attention_scores=True)[1]
        for dense in attention.projections(layer).values():
            factorized = factorized_layer(dense, choice_for(dense, 2))
            _backend.backend_of(layer).transplant(dense, factorized, {"bias": "bias"})
        assert_close(zoo.outputs(model, x), expected)
        again = layer(x, x, return_attention_scores=True)[1]
        assert_close(np.asarray(again), np.asarray(scores))

    def test_counted_and_calibrated(self, keras_module):
        model = attention_model(keras_module)
        x, _ = attention_data()
        plan = select(model, 0.2, objective="macs", exclude="head")
        assert count_macs(compress(model, plan=plan)) == plan.macs_after
        small = compress(model, 0.3, calibration_data=x, exclude="head")
        assert type(small.get_layer("attention")).__name__ == "FactorizedMultiHeadAttention"

    def test_a_failure_puts_the_class_back(self, keras_module, monkeypatch):
        model = attention_model(keras_module)
        model.compile("adam", "mse")
        x, y = attention_data()
        model.fit(x, y, verbose=0)
        layer, config = model.get_layer("attention"), model.get_layer("attention").get_config()
        plan = select(model, 0.3, exclude="head")
        expected = zoo.outputs(model, x)
        with monkeypatch.context() as patch:
            patch.setattr(
                "keras_alds.rewrite.in_place.carry_optimizers",
                lambda *_: (_ for _ in ()).throw(RuntimeError("stop")),
            )
            with pytest.raises(RuntimeError, match="stop"):
                apply_plan(model, plan)
        assert type(layer) is keras_module.layers.MultiHeadAttention
        assert layer.get_config() == config
        np.testing.assert_array_equal(zoo.outputs(model, x), expected)

    def test_rebuilt_in_tf_keras_and_refused_by_expand(self):
        model = attention_model(keras)
        x, _ = attention_data()
        small = compress(model, 0.3, exclude="head")
        other = keras_alds.to_tf_keras(small)
        assert type(other.get_layer("attention")).__name__ == "FactorizedMultiHeadAttention"
        assert_close(zoo.outputs(other, x), zoo.outputs(small, x))
        with pytest.raises(ValueError, match="'attention' of type FactorizedMultiHeadAttention"):
            keras_alds.expand(small)

    def test_a_layer_with_code_of_its_own_is_left_alone(self, keras_module):
        K = keras_module

        class Attention(K.layers.MultiHeadAttention):
            def call(self, query, value, key=None, training=None):
                return super().call(query, value, key, training=training)

        inputs = K.Input((6, 24))
        x = Attention(4, 6, name="attention")(inputs, inputs)
        model = K.Model(inputs, K.layers.Dense(24)(x))
        plan = select(model, 0.05)
        reasons = {c.layer: c.reason for c in plan.choices}
        assert "Attention makes it in code of its own" in reasons["attention/query"]

    def test_bad_projections(self, keras_module):
        side = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
        cls = side.FactorizedMultiHeadAttention
        for bad in ("query", {"queries": {"slices": 1, "rank": 1}}, {"query": {"rank": 1}}):
            with pytest.raises(ValueError, match="`projections` to be a dict"):
                cls(2, 4, projections=bad)
        layer = cls(2, 4, projections={"gate": {"slices": 1, "rank": 1}})
        with pytest.raises(ValueError, match="it has no 'gate'"):
            layer(np.ones((1, 3, 8), "f"), np.ones((1, 3, 8), "f"))


class TestReasons:
    def test_einsum_kernels_that_are_no_matrix(self, keras_module):
        L, K = keras_module.layers, keras_module
        inputs = K.Input((8, 16))
        x = L.EinsumDense("abc,bcd->abd", (8, 16), name="per_row")(inputs)
        x = L.EinsumDense("abc,c->abc", (8, 16), name="scale")(x)
        model = K.Model(inputs, L.Dense(16, name="dense")(x))
        reasons = {choice.layer: choice.reason for choice in select(model, 0.05).choices}
        assert "axis 'b' of its kernel is in inputs and outputs" in reasons["per_row"]
        assert "axis 'c' of its kernel is in inputs and outputs" in reasons["scale"]

    def test_tables_that_are_tied(self):
        L = keras.layers
        inputs = keras.Input((8,), dtype="int32")
        table = L.ReversibleEmbedding(50, 16, name="table")
        x = L.Dense(16, name="dense")(table(inputs))
        model = keras.Model(inputs, table(x, reverse=True))
        reasons = {choice.layer: choice.reason for choice in select(model, 0.02).choices}
        assert "reads its table in both directions" in reasons["table"]

    def test_pca_needs_a_bias_for_every_column(self, keras_module):
        K = keras_module
        model = model_of(K, MODELS[2])
        x = np.random.default_rng(0).standard_normal((32, 5, 4, 16)).astype("f")
        with pytest.raises(ValueError, match="not reachable"):
            select(model, 0.3, method="pca", calibration_data=x)
        model = K.Sequential([model, K.layers.Dense(64), K.layers.Dense(64)])
        model.build((None, 5, 4, 16))
        plan = select(model, 0.2, method="pca", calibration_data=x)
        (reason,) = {c.reason for c in plan.choices if c.kind == "Conv2DTranspose"}
        assert "needs a bias for every column" in reason

    def test_bad_equations_and_paddings(self, keras_module):
        side = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
        with pytest.raises(ValueError, match="holds many matrices, not one"):
            side.FactorizedEinsumDense("abc,bcd->abd", (8, 16), 1, 2)
        with pytest.raises(ValueError, match="one entry for every axis of 'bd'"):
            side.FactorizedEinsumDense("abc,cd->abd", 16, 1, 2).build((None, 3, 4))
        with pytest.raises(ValueError, match="to have the axes of its equation"):
            side.FactorizedEinsumDense("abc,cd->abd", (None, 16), 1, 2).build((None, 4))
        with pytest.raises(ValueError, match=r"Received: output_padding=2, strides=\(2, 2\)"):
            side.FactorizedConv2DTranspose(4, 3, 1, 2, strides=2, output_padding=2)
        with pytest.raises(ValueError, match=r"equal `strides`.*Received: strides=\(1, 2\)"):
            side.FactorizedSeparableConv2D(4, 3, 1, 2, strides=(1, 2))

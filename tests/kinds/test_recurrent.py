"""LSTM, GRU and SimpleRNN layers whose kernels are factorized."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import keras_alds
from keras_alds import _backend, apply_plan, compress, count_macs, select
from keras_alds._backend.training import LINEAR
from keras_alds.kinds import base as kinds
from keras_alds.kinds import recurrent
from keras_alds.kinds.base import is_factorized
from keras_alds.litert.runs import Runner
from keras_alds.models.inventory import Inventory, walk
from keras_alds.models.optimizer import carried

KERNELS = ("kernel", "recurrent_kernel")
BATCH, STEPS, CHANNELS, UNITS = 3, 3, 8, 6
# (layer, its arguments)
SETTINGS = [
    ("LSTM", {}),
    ("LSTM", {"use_bias": False, "return_sequences": True, "return_state": True}),
    ("LSTM", {"go_backwards": True, "return_sequences": True, "activation": "relu"}),
    ("LSTM", {"unroll": True, "unit_forget_bias": False}),
    ("GRU", {"return_sequences": True, "return_state": True}),
    ("GRU", {"use_bias": False, "go_backwards": True}),
    ("GRU", {"reset_after": False, "unroll": True}),
    ("SimpleRNN", {"activation": None, "return_sequences": True}),
]


def name(case):
    return case[0] + "".join(f"-{key}={value}" for key, value in case[1].items())


def data(count=BATCH, steps=STEPS, channels=CHANNELS):
    return np.random.default_rng(0).standard_normal((count, steps, channels)).astype("float32")


def made(K, case, units=UNITS, x=None, **more):
    """A stock layer with random weights."""
    kind, arguments = case
    layer = getattr(K.layers, kind)(units, **{**arguments, **more})
    layer(data() if x is None else x)
    randomize(layer)
    return layer


def randomize(layer):
    rng = np.random.default_rng(1)
    layer.set_weights([0.4 * rng.standard_normal(w.shape) for w in layer.get_weights()])


def choice_for(kernel, slices, rank=None):
    c, f = kinds.unfolded_shape(kernel)
    rank = rank or min(c // slices, f)
    return keras_alds.LayerChoice(
        kernel.name, type(kernel).__name__, (c, f), slices, rank, *(0, {}, 0.0, None)
    )


def factorize(layer, slices, rank=None, names=KERNELS):
    """Factorizes kernels of the cells of a layer in place, those that can be; returns undo."""
    backend = _backend.backend_of(layer)
    undo = []
    for cell in recurrent.cells(layer):
        for part, kernel in recurrent.cell_kernels(cell).items():
            if part in names and kinds.known_kind(kernel).refusal(kernel) is None:
                factorized = zoo.factorized_layer(kernel, choice_for(kernel, slices, rank))
                undo.append(backend.transplant(kernel, factorized))
    for inner in [*reversed(list(layer._flatten_layers(include_self=False))), layer]:
        step = kinds.stock_kind(inner).adopt(backend, inner)
        undo += [step] if step else []

    def undo_all():
        for step in reversed(undo):
            step()

    return undo_all


def results(layer, *args, **kwargs):
    return [np.asarray(tf.convert_to_tensor(y)) for y in tf.nest.flatten(layer(*args, **kwargs))]


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)


def assert_all_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, tolerance)


def predict(model, x):
    return np.asarray(tf.convert_to_tensor(model(x, training=False)))  # without a graph: quicker


def variables(layer):
    return [w if isinstance(w, tf.Variable) else w.value for w in layer.trainable_weights]


@pytest.mark.parametrize("case", SETTINGS, ids=name)
class TestEverySetting:
    def test_equals_the_stock_layer_at_full_rank(self, keras_module, case):
        x = data()
        mask = tf.constant([[True, False, True], [False, True, True], [True, True, True]])
        layer = made(keras_module, case)
        count = 2 if case[0] == "LSTM" else 1
        states = [tf.fill((BATCH, UNITS), 0.1 * (n + 1)) for n in range(count)]
        calls = [{}, {"mask": mask, "initial_state": states}]
        expected = [results(layer, x, **call) for call in calls]
        for slices, names in ((2, KERNELS), (2, KERNELS[:1]), (1, KERNELS[1:])):
            undo = factorize(layer, slices, names=names)
            whole = case[1].get("reset_after") is False and names == KERNELS[1:]
            assert type(layer).__name__ == ("" if whole else "Factorized") + case[0]
            for call, wanted in zip(calls, expected, strict=True):
                assert_all_close(results(layer, x, **call), wanted)
            undo()
            assert type(layer) is getattr(keras_module.layers, case[0])
            np.testing.assert_array_equal(results(layer, x)[0], expected[0][0])

    def test_truncated_equals_the_stock_layer_with_the_product(self, keras_module, case):
        """Outputs, and gradients by the chain rule: what optimizers carry over."""
        x = data()
        layer = made(keras_module, case)
        backend = _backend.backend_of(layer)

        def value_and_gradients():
            with tf.GradientTape() as tape:
                y = tf.convert_to_tensor(tf.nest.flatten(layer(x))[0])
                loss = tf.reduce_sum(y**2 * tf.range(1.0, UNITS + 1.0))
            found = tape.gradient(loss, variables(layer))
            return y.numpy(), [tf.convert_to_tensor(g).numpy() for g in found]

        undo = factorize(layer, 2, rank=1)
        factors = {
            part: kernel
            for part, kernel in recurrent.all_kernels(layer.cell).items()
            if is_factorized(kernel)
        }
        dense = {part: np.asarray(kernel.kernel) for part, kernel in factors.items()}
        actual, gradients = value_and_gradients()
        config = layer.get_config()
        twin = type(layer).from_config(config)
        assert twin.get_config() == config
        twin(x)
        twin.set_weights(layer.get_weights())
        assert_close(results(twin, x)[0], actual)
        states = {part: (kernel.encoder, kernel.decoder) for part, kernel in factors.items()}
        order = [id(v) for v in layer.trainable_weights]
        undo()
        for part, kernel in dense.items():
            getattr(layer.cell, part).assign(kernel)
        expected, of_stock = value_and_gradients()
        assert_close(actual, expected)
        stock = [id(v) for v in layer.trainable_weights]
        for part, pair in states.items():
            g = of_stock[stock.index(id(getattr(layer.cell, part)))]
            kernel = recurrent.cell_kernels(layer.cell)[part]
            factorized = zoo.factorized_layer(kernel, choice_for(kernel, 2, rank=1))
            for own, variable in zip((factorized.encoder, factorized.decoder), pair, strict=True):
                own.assign(variable)
            for variable, wanted in zip(pair, carried(backend, LINEAR, g, factorized), strict=True):
                assert_close(gradients[order.index(id(variable))], wanted, 1e-4)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_a_step_multiplies_by_the_factors(keras_module, kind):
    layer = made(keras_module, (kind, {}))
    factorize(layer, 1, rank=1)
    function = tf.function(lambda x: tf.nest.flatten(layer(x))[0])
    graph = function.get_concrete_function(tf.TensorSpec((BATCH, STEPS, CHANNELS))).graph
    graphs = [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]
    shapes = [
        tuple(operation.inputs[1].shape)
        for found in graphs
        for operation in found.get_operations()
        if operation.type in ("MatMul", "BatchMatMulV2")
    ]
    gates = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}[kind]
    assert {(CHANNELS, 1), (1, gates * UNITS)} <= set(shapes)
    assert (CHANNELS, gates * UNITS) not in shapes


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
@pytest.mark.parametrize("recurrent_dropout", [0.0, 0.3])
def test_dropout_is_that_of_the_stock_layer(keras_module, kind, recurrent_dropout):
    K, x = keras_module, data()
    rates = {"dropout": 0.4, "recurrent_dropout": recurrent_dropout, "unroll": True}

    def run():
        tf.random.set_seed(3)
        if hasattr(layer.cell, "seed_generator"):
            layer.cell.seed_generator.state.assign([1, 0])
        elif hasattr(layer.cell._random_generator, "_generator"):
            layer.cell._random_generator._built = False
        return results(layer, x, training=True)[0]

    layer = made(K, (kind, rates), **({"seed": 1} if K is keras else {}))
    expected, calm = run(), results(layer, x)[0]
    assert np.abs(expected - calm).max() > 1e-3
    factorize(layer, 2)
    assert_close(results(layer, x)[0], calm)
    assert_close(run(), expected)


# -- In models -------------------------------------------------------------------------------------


def model_of(K, kind="LSTM", where="layer", steps=STEPS, channels=16, units=16, **arguments):
    """A model with one recurrent layer: by itself, in `Bidirectional`, or as a cell in `RNN`."""
    L = K.layers
    inputs = K.Input((steps, channels))
    if where == "cell":
        layer = L.RNN(getattr(L, f"{kind}Cell")(units, name="cell", **arguments), name="rec")
    else:
        layer = getattr(L, kind)(units, name="rec", **arguments)
        if where == "both":
            layer = L.Bidirectional(layer, name="both")
    model = K.Model(inputs, L.Dense(3, name="head")(layer(inputs)))
    randomize(model)
    return model


def task(count=16, steps=STEPS, channels=16):
    x = data(count, steps, channels)
    return x, np.random.default_rng(2).standard_normal((count, 3)).astype("float32")


def numpy_lstm(layer, x, mask=None):
    """Hidden states before every step, `[batch, steps, units]`, by the textbook."""
    kernel, recurrent_kernel, bias = map(np.asarray, layer.get_weights())
    h = c = np.zeros((len(x), layer.units))
    seen = []
    for t in range(x.shape[1]):
        seen.append(h)
        z = x[:, t] @ kernel + h @ recurrent_kernel + bias
        i, f, g, o = np.split(z, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c_new = f * c + i * np.tanh(g)
        h_new = o * np.tanh(c_new)
        keep = np.ones((len(x), 1)) if mask is None else mask[:, t, None]
        h, c = np.where(keep, h_new, h), np.where(keep, c_new, c)
    return np.stack(seen, axis=1)


PLACES = [("LSTM", "layer"), ("GRU", "cell"), ("LSTM", "both")]


@pytest.mark.parametrize("place", PLACES, ids="-".join)
class TestInAModel:
    def test_compressed_trained_and_saved(self, keras_module, place, tmp_path):
        K = keras_module
        model = model_of(K, *place)
        x, y = task()
        model.compile(K.optimizers.Adam(1e-3), K.losses.MeanSquaredError())
        model.fit(x, y, verbose=0)
        plan = select(model, 0.3, exclude="head")
        assert plan.factorized
        assert {choice.kind for choice in plan.factorized} == {f"{place[0]}Cell"}
        assert {choice.layer.rpartition("/")[2] for choice in plan.factorized} <= set(KERNELS)
        small = compress(model, plan=plan)
        assert small.count_params() == plan.params_after
        held = {path: layer for path, layer in walked(model)}
        before = slots(model)

        # In place, in training: the same plan, the same objects, the state of other weights.
        apply_plan(model, plan)
        assert {path: layer for path, layer in walked(model) if path in held} == held
        assert_close(predict(model, x), predict(small, x))
        after = slots(model)
        kept = [key for key in after if key in before]
        assert len(kept) == len(model.trainable_weights) - 2 * len(plan.factorized)
        for key in kept:
            np.testing.assert_array_equal(after[key], before[key])
        assert all(np.abs(value).max() > 0 for value in after.values())
        weights = [np.array(w) for w in model.get_weights()]
        model.fit(x, y, verbose=0)
        for old, new in zip(weights, model.get_weights(), strict=True):
            assert not np.array_equal(old, new)

        expected = predict(model, x)
        model.save_weights(tmp_path / "model.weights.h5")
        again = K.models.clone_model(model)
        again.load_weights(tmp_path / "model.weights.h5")
        assert_close(predict(again, x), expected)
        others = ["model.h5"] if K is keras else ["model.h5", "saved"]
        for file in ["model.keras", *(others if place[1] == "both" else [])]:
            model.save(tmp_path / file)
            loaded = K.models.load_model(tmp_path / file)
            assert_close(predict(loaded, x), expected)
            if file == "model.keras" and place[1] == "both":
                loaded.fit(x, y, verbose=0)  # its optimizer's state has the order of its weights

    def test_expanded_and_rebuilt_in_tf_keras(self, keras_module, place):
        model = model_of(keras_module, *place)
        x, _ = task()
        small = compress(model, 0.3, exclude=["head", ".*/recurrent_kernel"], max_slices=1)
        plain = place[1] == "layer"
        with nullcontext() if plain else pytest.warns(UserWarning, match="gets dense kernels"):
            stock = keras_alds.expand(small)
        assert not any(is_factorized(layer) for _, layer in walked(stock))
        assert all(
            type(layer).__module__.startswith(keras_module.__name__) for _, layer in walked(stock)
        )
        assert_close(predict(stock, x), predict(small, x))
        assert ("rec_encoder" in [layer.name for layer in stock.layers]) == plain
        assert stock.count_params() == (small if plain else model).count_params()
        with pytest.warns(UserWarning, match="gets dense kernels .*recurrent_kernel: "):
            stock = keras_alds.expand(compress(model, 0.3, exclude=["head", ".*/kernel"]))
        assert stock.count_params() == model.count_params()
        if keras_module is keras:
            other = keras_alds.to_tf_keras(small)
            assert_close(predict(other, x), predict(small, x))


def walked(model):
    return list(walk(model))


def slots(model):
    """The optimizer's momenta by the id of their weight."""
    backend = _backend.backend_of(model)
    targets = backend.optimizer_targets(model.optimizer, model.trainable_variables)
    momenta = next(iter(backend.slots(model.optimizer, targets).values()))
    return {id(v): np.array(backend.value(m)) for v, m in zip(targets, momenta, strict=True)}


def test_one_kernel_only(keras_module):
    """What names the layer names both kernels; a pattern or a path names one."""
    model = model_of(keras_module)
    left = "rec/lstm_cell/recurrent_kernel"
    plan = select(model, 0.2, exclude=["head", left])
    assert [choice.layer for choice in plan.factorized] == ["rec/lstm_cell/kernel"]
    small = compress(model, plan=plan)
    cell = small.get_layer("rec").cell
    assert type(cell.kernel).__name__ == "FactorizedDense"
    assert tuple(cell.recurrent_kernel.shape) == (16, 64)
    reasons = {
        spec.path: spec.skipped and spec.skipped.detail for spec in Inventory.of(small).records
    }
    assert reasons[left] == "its cell is factorized already"
    for everything in ("rec", keras_module.layers.LSTM, keras_module.layers.LSTMCell):
        with pytest.raises(ValueError, match="that can be factorized"):
            select(model, 0.2, exclude=["head", everything])
    plan = select(model, 0.2, exclude="head", bounds={"rec": (0.1, 0.4)})
    assert len(plan.factorized) == 2
    assert all(0.6 <= c.params_after / c.params_before <= 0.9 for c in plan.factorized)


def test_macs_are_counted_at_every_step(keras_module):
    L, K = keras_module.layers, keras_module
    inputs = K.Input((7, 16))
    x = L.Bidirectional(L.GRU(12, return_sequences=True, name="rec"))(inputs)
    x = L.RNN(L.SimpleRNNCell(10), go_backwards=True)(x)
    model = K.Model(inputs, L.Dense(3)(x))
    dense = 7 * (2 * (16 + 12) * 36 + (24 + 10) * 10) + 10 * 3
    assert count_macs(model) == dense
    plan = select(model, 0.3, objective="macs")
    assert plan.costs["macs"].before == dense
    small = compress(model, plan=plan)
    assert count_macs(small) == plan.costs["macs"].after
    plan = select(model, {"params": 0.3, "macs": 0.2}, exclude=".*/kernel")  # one kernel whole
    assert count_macs(compress(model, plan=plan)) == plan.costs["macs"].after
    unknown = K.Sequential([K.Input((None, 16)), L.LSTM(12)])
    with pytest.raises(ValueError, match="Expected a known input size"):
        count_macs(unknown)


class TestCalibration:
    def test_moments_are_those_of_inputs_and_hidden_states(self, keras_module):
        L, K = keras_module.layers, keras_module
        x = data(40, 5, 8)
        x[::3, 3:] = 0.0
        inputs = K.Input((5, 8))
        layer = L.LSTM(12, name="rec", go_backwards=False)
        masked = L.Masking(name="mask")(inputs)
        model = K.Model(inputs, L.Dense(3, name="head")(layer(masked)))
        randomize(model)
        mask = (x != 0).any(-1)
        stats = keras_alds.CalibrationStats.collect(model, x, verbose=0)
        seen = {"kernel": x, "recurrent_kernel": numpy_lstm(layer, x, mask)}
        for part, values in seen.items():
            moment = stats.moments[f"rec/lstm_cell/{part}"]
            rows = values[mask].astype(np.float64)
            assert moment.count == len(rows)
            np.testing.assert_allclose(moment.blocks[0], rows.T @ rows / len(rows), 1e-3, 1e-5)

    def test_backward_and_given_states(self, keras_module):
        """Also where the first steps are masked, whose outputs are not the state."""
        L, K = keras_module.layers, keras_module
        x, state = data(40, 5, 8), np.random.default_rng(3).standard_normal((40, 12)).astype("f")
        mask = np.ones((40, 5), bool)
        mask[::2, 3:] = mask[1::4, 2] = False
        ends = [K.Input((5, 8)), K.Input((12,)), K.Input((5,), dtype="bool")]
        rec = L.SimpleRNN(12, activation=None, use_bias=False, go_backwards=True, name="rec")
        y = rec(ends[0], initial_state=ends[1], mask=ends[2])
        model = K.Model(ends, L.Dense(3, name="head")(y))
        randomize(model)
        stats = keras_alds.CalibrationStats.collect(model, [x, state, mask], verbose=0)
        kernel, recurrent_kernel = (np.asarray(w, np.float64) for w in rec.get_weights())
        h, rows = state.astype(np.float64), []
        for t in reversed(range(5)):
            made = mask[:, t, None]
            rows.append(h[mask[:, t]])
            h = np.where(made, x[:, t] @ kernel + h @ recurrent_kernel, h)
        rows = np.concatenate(rows)
        moment = stats.moments["rec/simple_rnn_cell/recurrent_kernel"]
        assert moment.count == len(rows)
        np.testing.assert_allclose(moment.blocks[0], rows.T @ rows / len(rows), 1e-3, 1e-5)

    @pytest.mark.parametrize("sequential", [True, False])
    def test_closer_than_without_data(self, keras_module, sequential):
        K = keras_module
        model = model_of(K, where="both")
        x = data(64, STEPS, 4) @ np.random.default_rng(4).standard_normal((4, 16)).astype("f")
        plan = select(model, 0.4, exclude="head", calibration_data=x)
        aware = compress(model, plan=plan, calibration_data=x, sequential=sequential)
        blind = compress(
            model, plan=keras_alds.CompressionPlan.from_dict({**plan.to_dict(), "method": "energy"})
        )
        dense = predict(model, x)
        errors = [np.square(predict(small, x) - dense).sum() for small in (aware, blind)]
        assert errors[0] < 0.5 * errors[1]

    def test_stateful_layers_have_their_states_back(self, keras_module):
        L, K = keras_module.layers, keras_module
        inputs = K.Input(batch_shape=(32, 5, 8))
        rec = L.GRU(12, stateful=True, name="rec")
        model = K.Model(inputs, L.Dense(3, name="head")(rec(inputs)))
        x = data(32, 5, 8)
        model(x)
        before = [np.array(tf.convert_to_tensor(s)) for s in tf.nest.flatten(rec.states)]
        assert np.abs(before[0]).max() > 0
        stats = keras_alds.CalibrationStats.collect(model, x, verbose=0)
        assert stats.moments["rec/gru_cell/recurrent_kernel"].count == 32 * 5
        after = [np.array(tf.convert_to_tensor(s)) for s in tf.nest.flatten(rec.states)]
        np.testing.assert_array_equal(after[0], before[0])
        expected = predict_from(model, rec, before, x)
        factorize(rec, 1)
        assert_close(predict_from(model, rec, before, x), expected)


def predict_from(model, layer, states, x):
    for state, value in zip(tf.nest.flatten(layer.states), states, strict=True):
        state.assign(value)
    return np.asarray(tf.convert_to_tensor(model(x)))


def test_compressed_in_fit(keras_module):
    K = keras_module
    model = model_of(K)
    x, y = task(32)
    model.compile(K.optimizers.Adam(1e-3), "mse")
    callback = keras_alds.ALDSCompress(0.3, at_epoch=1, exclude="head", verbose=0)
    history = model.fit(x, y, epochs=3, callbacks=[callback], verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert model.count_params() == callback.plan.params_after
    assert type(model.get_layer("rec")).__name__ == "FactorizedLSTM"
    assert int(model.optimizer.iterations) == 3


def test_a_failure_puts_everything_back(keras_module, monkeypatch):
    model = model_of(keras_module, where="both")
    x, y = task()
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    config, weights = model.get_config(), [id(w) for w in model.weights]
    plan = select(model, 0.3, exclude="head")
    expected = predict(model, x)
    with monkeypatch.context() as patch:
        patch.setattr(
            "keras_alds.models.in_place.carry_optimizers",
            lambda *_: (_ for _ in ()).throw(RuntimeError("stop")),
        )
        with pytest.raises(RuntimeError, match="stop"):
            apply_plan(model, plan)
    assert json.dumps(model.get_config(), default=str) == json.dumps(config, default=str)
    assert [id(w) for w in model.weights] == weights
    np.testing.assert_array_equal(predict(model, x), expected)
    apply_plan(model, plan)
    assert model.count_params() == plan.params_after


def test_frozen_layers_stay_frozen_and_regularizers_follow(keras_module):
    """In tf_keras layers hold losses of weights, also of those that are gone."""
    K = keras_module
    rates = {"kernel": 0.2, "recurrent_kernel": 0.1, "hidden": 0.3}
    inputs = K.Input((STEPS, 16))
    x = K.layers.LSTM(
        16,
        name="rec",
        kernel_regularizer=K.regularizers.L2(rates["kernel"]),
        recurrent_regularizer=K.regularizers.L2(rates["recurrent_kernel"]),
    )(inputs)
    l2 = K.regularizers.L2(rates["hidden"])
    x = K.layers.Dense(24, name="hidden", kernel_regularizer=l2)(x)
    model = K.Model(inputs, K.layers.Dense(3, name="head")(x))
    plan = select(model, 0.3, exclude="head", bounds={"rec|hidden": (0.2, 0.6)})
    assert len(plan.factorized) == 3
    small = compress(model, plan=plan)
    cell = small.get_layer("rec").cell
    factorized = {
        "kernel": cell.kernel,
        "recurrent_kernel": cell.recurrent_kernel,
        "hidden": small.get_layer("hidden"),
    }
    wanted = sum(
        rates[name] * float(np.square(np.asarray(tf.convert_to_tensor(factor))).sum())
        for name, layer in factorized.items()
        for factor in (layer.encoder, layer.decoder)
    )
    assert float(sum(small.losses)) == pytest.approx(wanted, rel=1e-5)
    model.get_layer("rec").trainable = model.get_layer("hidden").trainable = False
    small = compress(model, plan=plan)
    assert [tuple(w.shape) for w in small.trainable_weights] == [(24, 3), (3,)]


def test_shared_and_wrapped_layers(keras_module):
    L, K = keras_module.layers, keras_module
    a, b = K.Input((4, 16)), K.Input((3, 4, 16))
    rec = L.LSTM(16, name="rec")
    x = L.Concatenate()([rec(a), rec(a), L.Flatten()(L.TimeDistributed(L.GRU(12, name="in"))(b))])
    model = K.Model([a, b], L.Dense(3, name="head")(x))
    plan = select(model, 0.3, exclude="head", max_slices=1)
    names = {choice.layer for choice in plan.choices}
    assert {"rec/lstm_cell/kernel", "time_distributed/in/gru_cell/recurrent_kernel"} <= {
        name.replace("time_distributed_1", "time_distributed") for name in names
    }
    small = compress(model, plan=plan)
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((2, *shape)).astype("f") for shape in ((4, 16), (3, 4, 16))]
    with pytest.warns(UserWarning, match="gets dense kernels"):
        stock = keras_alds.expand(small)
    assert_close(predict(stock, x), predict(small, x))


def test_padded_texts(tmp_path):
    """`Bidirectional` gives zeros at padded steps; the layers after it do not make them."""
    L = keras.layers
    inputs = keras.Input((5,), dtype="int32")
    x = L.Embedding(20, 12, mask_zero=True, name="words")(inputs)
    x = L.Bidirectional(L.LSTM(12, return_sequences=True, name="rec"), name="both")(x)
    model = keras.Model(inputs, L.Dense(3, name="head")(L.GRU(12, name="last")(x)))
    randomize(model)
    x = np.random.default_rng(0).integers(1, 20, (8, 5)).astype("int32")
    x[1::2, 3:] = x[2::4, :2] = x[3] = 0  # padded behind, in front, nothing but padding
    small = compress(model, 0.4, exclude=["head", "words"])
    assert kinds.stock_kind(small.get_layer("both")).is_written_out(small.get_layer("both"))
    assert kinds.stock_kind(small.get_layer("last")).is_written_out(small.get_layer("last"))
    expected = predict(small, x)
    small.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(predict(loaded, x), expected)
    assert_close(predict(keras_alds.to_tf_keras(loaded), x), expected)
    with pytest.warns(UserWarning, match="gets dense kernels") as record:
        stock = keras_alds.expand(small)
    assert {warning.filename for warning in record} == {__file__}
    assert_close(predict(stock, x), expected)


def test_states_that_are_given_stay_with_the_expanded_layer(keras_module):
    L, K = keras_module.layers, keras_module
    inputs = K.Input((4, 16))
    state = L.Dense(12, name="state")(L.Flatten(name="flat")(inputs))
    x = L.GRU(12, name="rec")(inputs, initial_state=state)
    model = K.Model(inputs, L.Dense(3, name="head")(x))
    small = compress(model, 0.1, exclude=["head", "state", ".*/recurrent_kernel"], max_slices=1)
    stock = keras_alds.expand(small)
    assert "rec_encoder" in [layer.name for layer in stock.layers]
    assert_close(predict(stock, data(4, 4, 16)), predict(small, data(4, 4, 16)))


def test_mixed_precision_and_xla(keras_module):
    K = keras_module
    model = model_of(K)
    x, _ = task()
    small = compress(model, 0.3, exclude="head")
    compiled = tf.function(lambda x: small(x, training=False), jit_compile=True)
    assert_close(compiled(tf.constant(x)).numpy(), predict(small, x))
    half = model_of(K, dtype="mixed_float16")
    half.set_weights(model.get_weights())
    half = compress(half, 0.3, exclude="head")
    assert half.get_layer("rec")(x).dtype == tf.float16
    assert_close(predict(half, x).astype("f"), predict(small, x), 0.02)


def test_reasons(keras_module):
    L, K = keras_module.layers, keras_module

    class Own(L.LSTM):
        pass

    inputs = K.Input((5, 16))
    x = L.GRU(16, reset_after=False, return_sequences=True, name="before")(inputs)
    x = L.RNN([L.LSTMCell(16), L.LSTMCell(16)], return_sequences=True, name="stack")(x)
    x = L.LSTM(16, kernel_constraint="non_neg", return_sequences=True, name="bounded")(x)
    x = Own(16, name="own")(x)
    model = K.Model(inputs, L.Dense(64)(L.Dense(64)(x)))
    reasons = {choice.layer: choice.reason or "" for choice in select(model, 0.05).choices}
    assert "reset_after=False" in reasons["before/gru_cell/recurrent_kernel"]
    assert "reset_after" not in reasons["before/gru_cell/kernel"]
    (stacked,) = {r for n, r in reasons.items() if n.startswith("stack/") and "kernel" in n}
    assert "is run by StackedRNNCells" in stacked
    assert "kernel_constraint" in reasons["bounded/lstm_cell/kernel"]
    assert "kernel_constraint" not in reasons["bounded/lstm_cell/recurrent_kernel"]
    assert "is run by Own" in reasons["own/lstm_cell/kernel"]
    assert reasons["own/lstm_cell"] == "its kernels are listed separately"
    images = K.Sequential([K.Input((3, 8, 8, 4)), L.ConvLSTM2D(4, 3), L.Flatten(), L.Dense(9)])
    reasons = {choice.kind: choice.reason or "" for choice in select(images, 0.05).choices}
    (convolved,) = (reason for kind, reason in reasons.items() if "ConvLSTM" in kind)
    assert "convolve between its time steps" in convolved


@pytest.mark.both
def test_bad_kernels(keras_module):
    side = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
    for bad in ("kernel", {"kernels": {"slices": 1, "rank": 1}}, {"kernel": {"rank": 1}}):
        with pytest.raises(ValueError, match="`kernels` to be a dict"):
            side.FactorizedLSTM(4, kernels=bad)
    with pytest.raises(ValueError, match="`rank` to be a positive integer"):
        side.FactorizedGRUCell(4, kernels={"kernel": {"slices": 1, "rank": 0}})
    for cls in (side.FactorizedGRU, side.FactorizedGRUCell):
        with pytest.raises(ValueError, match="Expected `reset_after=True`"):
            cls(4, reset_after=False, kernels={"recurrent_kernel": {"slices": 1, "rank": 1}})
    with pytest.raises(ValueError, match="divisible by `slices`"):
        side.FactorizedLSTM(4, kernels={"kernel": {"slices": 3, "rank": 1}})(data())


def test_pruned_by_tfmot():
    """Factors and whole kernels follow the schedule; what is pruned already is left alone."""
    K = pytest.importorskip("tf_keras")
    sparsity = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
    schedule = sparsity.ConstantSparsity(0.5, 0, frequency=1)
    model = model_of(K)
    small = compress(model, 0.2, exclude=["head", ".*/recurrent_kernel"])
    pruned = keras_alds.tfmot.prune_low_magnitude(small, schedule)
    pruned.compile("sgd", "mse")
    pruned.fit(*task(), callbacks=[sparsity.UpdatePruningStep()], verbose=0)
    cell = sparsity.strip_pruning(pruned).get_layer("rec").cell
    for weight in (cell.kernel.encoder, cell.kernel.decoder, cell.recurrent_kernel):
        assert np.mean(np.asarray(weight) == 0) == pytest.approx(0.5, abs=0.02)
    wide = K.Sequential([K.Input((STEPS, 16)), K.layers.LSTM(8, name="rec"), K.layers.Dense(64)])
    plan = select(keras_alds.tfmot.prune_low_magnitude(wide, schedule), 0.05)
    (reason,) = {c.reason for c in plan.choices if c.layer.endswith("kernel")}
    assert reason == "TF-MOT prunes its cell; `strip_pruning` first, or compress before pruning"


@pytest.mark.both
def test_in_a_litert_file(keras_module):
    """As it is, with the loop of both factors; and expanded, in tf_keras with one LSTM operator."""
    model = model_of(keras_module)
    x, _ = task(1)
    small = compress(model, 0.3, exclude="head", max_slices=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = keras_alds.expand(small)
    for candidate in (small, stock):
        content = keras_alds.litert.convert(candidate, verbose=0)
        operators = {operator.name for operator in keras_alds.litert.read_file(content).operators}
        fused = candidate is stock and keras_module is not keras
        assert ("UNIDIRECTIONAL_SEQUENCE_LSTM" if fused else "WHILE") in operators
        y = Runner(content).predict(x)
        assert_close(np.asarray(y), predict(small, x), 1e-4)


# -- In another process ----------------------------------------------------------------------------

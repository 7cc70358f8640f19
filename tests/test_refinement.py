"""`refine`, and `refine=` of `compress` and `ALDSCompress`."""

from __future__ import annotations

import importlib
import warnings

import keras
import numpy as np
import pytest

import keras_alds
from keras_alds import refinement
from keras_alds._backend import refining
from keras_alds.kinds.base import is_factorized
from keras_alds.models.blocks import blocks_of
from keras_alds.models.inventory import walk
from keras_alds.models.outputs import OutputKind

IMAGE = (12, 12, 3)


def images(count=64, shape=IMAGE, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype("float32")


def residual(K, activation=None, name="scores", outputs=10):
    L = K.layers
    inputs = K.Input(IMAGE)
    x = L.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = L.ReLU(name="relu")(L.BatchNormalization(name="bn")(x))
    y = L.Conv2D(16, 3, padding="same", name="conv")(x)
    x = L.Activation("relu", name="block")(L.Add(name="sum")([x, y]))
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return K.Model(inputs, L.Dense(outputs, activation=activation, name=name)(x))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Small networks learn in a few large steps."""
    monkeypatch.setattr(refinement, "_RATE", 3e-3)
    monkeypatch.setattr(refinement, "_LOOK_EVERY", 5)


def weights_of(model):
    return [np.array(w) for w in model.get_weights()]


def equal(before, after):
    return all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def no_progress(monkeypatch):
    """Steps so large that nothing gets better."""
    monkeypatch.setattr(refinement, "_RATE", 1e3)


@pytest.mark.both
def test_it_comes_nearer_and_changes_only_what_it_should(keras_module):
    K = keras_module
    model = residual(K)
    model.get_layer("bn").moving_variance.assign(np.linspace(0.5, 2, 16))
    model.compile("adam", K.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images(16), np.zeros(16, int), verbose=0)
    small = keras_alds.compress(model, 0.6, exclude="scores", method="energy")
    small.get_layer("bn").trainable = False
    original, before = weights_of(model), weights_of(small)
    optimizer = small.optimizer
    state = [np.asarray(v) for v in optimizer.variables]
    x = images()
    result = keras_alds.refine(small, model, x, steps=30, verbose=0)
    assert result.after < 0.9 * result.before
    assert 0 < result.best_step <= result.steps == 30
    assert result.trained_on == 48
    assert equal(original, weights_of(model))
    changed = {
        w.name if K is not keras else w.path
        for w, b, a in zip(small.weights, before, weights_of(small), strict=True)
        if not np.array_equal(b, a)
    }
    parts = {"/".join(name.split(":")[0].split("/")[-2:]) for name in changed}
    # Not the other kernels, which are dense, nor the frozen normalization.
    assert parts == {"conv/encoder", "conv/decoder", "conv/bias", "scores/bias"}
    assert small.optimizer is optimizer
    assert equal(state, [np.asarray(v) for v in optimizer.variables])
    assert str(result).startswith("distance to the original's outputs ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.fit(x, np.zeros(64, int), verbose=0)  # it trains on as before


def test_it_never_gets_worse(small, monkeypatch):
    no_progress(monkeypatch)
    model = keras_alds.compress(small, 0.5)
    before = weights_of(model)
    result = keras_alds.refine(model, small, images(), steps=100, verbose=0)
    assert equal(before, weights_of(model))
    # It ends early, after four looks that showed no gain.
    assert (result.best_step, result.steps) == (0, 20)
    assert result.after == result.before
    assert str(result) == "no gain on examples held out in 20 steps"


def test_it_goes_back_and_takes_smaller_steps(small, monkeypatch):
    """At once where it got much worse, and after two looks without a gain."""
    model = keras_alds.compress(small, 0.5)
    found = iter([1.0, 0.9, 2.0, 0.8, 0.81, 0.85, 0.85, 0.85, 0.85])
    seen, rates = [], []
    step = refining.Refiner.step

    def recorded(self, rate):
        seen.append(weights_of(model))
        rates.append(rate / refinement._rate(len(rates), 1000))
        step(self, rate)

    monkeypatch.setattr(refining.Refiner, "step", recorded)
    monkeypatch.setattr(refinement._Judge, "look", lambda self: next(found))
    result = keras_alds.refine(model, small, images(), steps=1000, verbose=0)
    assert (result.best_step, result.steps) == (20, 40)  # the later of two about as good
    assert (result.before, result.after) == (1.0, 0.81)
    expected = np.repeat([1, 1, 0.3, 0.3, 0.3, 0.3, 0.09, 0.09], 5)
    np.testing.assert_allclose(rates, expected)
    assert equal(seen[5], seen[10])  # the weights after the first look
    assert equal(seen[20], seen[30])
    assert equal(seen[20], weights_of(model))


def test_the_best_weights_are_kept_after_an_interrupt(small, monkeypatch):
    model = keras_alds.compress(small, 0.5)
    before = weights_of(model)
    taken = []
    step = refining.Refiner.step

    def interrupted(self, rate):
        taken.append(rate)
        if len(taken) == 3:
            raise KeyboardInterrupt
        step(self, rate)

    monkeypatch.setattr(refining.Refiner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        keras_alds.refine(model, small, images(), verbose=0)
    assert equal(before, weights_of(model))
    assert taken[0] == refinement._RATE > taken[1] > taken[2]


def examples_for(model):
    random = np.random.default_rng(0)
    shapes = [tuple(x.shape)[1:] for x in getattr(model, "inputs", None) or []] or [IMAGE]
    found = [random.normal(size=(128, *shape)).astype("float32") for shape in shapes]
    return found[0] if len(found) == 1 else found


@pytest.mark.parametrize("kind", ["nested", "shared", "wrapped", "subclassed"])
def test_models_of_every_kind(keras_module, kind):
    """Nested and subclassed models, shared layers, several inputs, wrappers, recurrent layers."""
    model = importlib.import_module("zoo").MODELS[kind](keras_module)
    small = keras_alds.compress(model, 0.4, target="size")
    result = keras_alds.refine(small, model, examples_for(model), steps=10, verbose=0)
    assert result.after < result.before


def test_texts_of_several_lengths(keras_module):
    L = keras_module.layers
    inputs = keras_module.Input((None,), dtype="int32")
    x = L.Embedding(50, 16, name="embedding")(inputs)
    x = L.Dense(32, activation="relu", name="dense")(x)
    y = L.Dense(10, activation="softmax", name="head")(L.GlobalAveragePooling1D()(x))
    model = keras_module.Model(inputs, y)
    small = keras_alds.compress(model, 0.5)
    random = np.random.default_rng(0)
    batches = [random.integers(0, 50, (8, length)) for length in (5, 9, 7, 5, 9, 7)]
    result = keras_alds.refine(small, model, lambda: batches, steps=10, verbose=0)
    assert result.after < result.before
    assert result.augmented == ()


def test_a_fixed_batch_size(keras_module):
    L = keras_module.layers
    inputs = keras_module.Input(batch_shape=(4, 6))
    x = L.Dense(32, activation="relu", name="hidden")(inputs)
    model = keras_module.Model(inputs, L.Dense(10, name="head")(x))
    small = keras_alds.compress(model, 0.3)
    result = keras_alds.refine(small, model, images(32, (6,)), steps=10, verbose=0)
    assert result.after < result.before
    assert result.trained_on == 24
    with pytest.raises(ValueError, match="at least two batches"):
        keras_alds.refine(
            keras_alds.compress(one := fixed(keras_module, 16), 0.3), one, images(16, (6,))
        )


def fixed(K, size):
    inputs = K.Input(batch_shape=(size, 6))
    x = K.layers.Dense(32, activation="relu", name="hidden")(inputs)
    return K.Model(inputs, K.layers.Dense(10, name="head")(x))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "tanh"])
def test_outputs_of_every_kind(keras_module, activation):
    model = residual(keras_module, activation)
    small = keras_alds.compress(model, 0.6)
    result = keras_alds.refine(small, model, images(), steps=10, verbose=0)
    assert result.after < result.before


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision(keras_module, policy):
    keras_module.mixed_precision.set_global_policy(policy)
    try:
        model = residual(keras_module)
    finally:
        keras_module.mixed_precision.set_global_policy("float32")
    small = keras_alds.compress(model, 0.6)
    result = keras_alds.refine(small, model, images(32), steps=10, verbose=0)
    assert result.after < result.before
    assert all(np.isfinite(w).all() for w in weights_of(small))


def test_steps_are_those_of_adam():
    """Two steps of the loss in the docstring, by Keras's own optimizer."""
    import tensorflow as tf

    inputs = keras.Input((6,))
    x = keras.layers.Dense(12, activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(10, name="head")(x))
    small = keras_alds.compress(model, 0.4, method="alds")
    other = keras_alds.compress(model, 0.4, method="alds")
    assert equal(weights_of(small), weights_of(other))
    x = images(16, (6,))
    refiner = refining.Refiner(
        small, model, small.trainable_variables, masks={},
        blocks={"hidden": (small.get_layer("hidden"), model.get_layer("hidden"))},
        factorized=[layer for _, layer in walk(small) if is_factorized(layer)],
        scores=[refining.as_is],
    )  # fmt: skip
    inside = [
        keras.Model(m.input, [m.get_layer("hidden").output, m.output]) for m in (model, other)
    ]
    adam = keras.optimizers.Adam(1e-2)
    for _ in range(2):
        for part in (x[:4], x[4:]):  # gradients of parts add up to their mean
            refiner.add(tf.constant(part), len(part) / len(x))
        refiner.step(1e-2)
        gradients = []
        for part in (x[:4], x[4:]):
            with tf.GradientTape() as tape:
                loss = sum(
                    tf.reduce_sum((a - b) ** 2) / tf.reduce_sum(a**2)
                    for a, b in zip(inside[0](part), inside[1](part), strict=True)
                ) * len(part) / len(x)  # fmt: skip
            gradients.append(tape.gradient(loss, [v.value for v in other.trainable_variables]))
        adam.apply([a + b for a, b in zip(*gradients, strict=True)], other.trainable_variables)
    for a, b in zip(weights_of(small), weights_of(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-4)  # of steps of 1e-2


def test_scores_of_probabilities():
    import tensorflow as tf

    scores = np.random.default_rng(0).normal(size=(5, 7)).astype("float32")
    np.testing.assert_allclose(
        refining.centred_logarithms(tf.nn.softmax(scores)),
        scores - scores.mean(axis=1, keepdims=True),
        atol=1e-5,
    )
    np.testing.assert_allclose(refining.log_odds(tf.nn.sigmoid(scores)), scores, atol=1e-5)
    assert set(refinement._SCORES) == set(OutputKind)


# -- Images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [True, False])
def test_images_are_flipped_only_where_the_model_does_not_mind(keras_module, mirrored):
    L = keras_module.layers
    inputs = keras_module.Input((16, 16, 1))
    x = L.Conv2D(16, 1, activation="relu", name="conv")(inputs)
    x = L.GlobalAveragePooling2D()(x) if mirrored else L.Flatten()(L.AveragePooling2D(4)(x))
    model = keras_module.Model(inputs, L.Dense(10, name="head")(x))
    ramp = np.linspace(-3, 3, 16)[:, None] * np.ones((1, 16, 16, 1))
    x = (ramp + images(32, (16, 16, 1))).astype("float32")
    x = x * np.linspace(0.5, 2, 32)[:, None, None, None].astype("float32")
    small = keras_alds.compress(model, 0.1)
    result = keras_alds.refine(small, model, x.astype("float32"), steps=1, verbose=0)
    assert result.augmented == (("shift", "flip") if mirrored else ("shift",))


# -- Arguments -------------------------------------------------------------------------------------


@pytest.mark.both
def test_what_cannot_be_refined_is_refused(keras_module, monkeypatch):
    K = keras_module
    model = residual(K)
    small = keras_alds.compress(model, 0.5)
    before = weights_of(small)
    x = images(32)
    refine = keras_alds.refine
    for steps in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match=r"Expected `steps` to be an integer >= 1\."):
            refine(small, model, x, steps=steps)
    stats = keras_alds.CalibrationStats.collect(model, x, verbose=0)
    for data in (None, stats):
        with pytest.raises(ValueError, match="Expected examples as `data`"):
            refine(small, model, data)
    with pytest.raises(ValueError, match=r"Expected batches in `data` of shape"):
        refine(small, model, x[:, :5])
    with pytest.raises(ValueError, match="weights of its own"):
        refine(small, small, x)
    with pytest.raises(ValueError, match="outputs of the same shapes"):
        refine(small, residual(K, outputs=9), x)
    other = importlib.import_module("keras" if K.__name__ == "tf_keras" else "tf_keras")
    with pytest.raises(ValueError, match="both of tf_keras"):
        refine(small, residual(other), x)
    frozen = keras_alds.compress(model, 0.5)
    frozen.trainable = False
    with pytest.raises(ValueError, match="not frozen"):
        refine(frozen, model, x)
    model.get_layer("scores").bias.assign(np.full(10, np.nan))
    with pytest.raises(ValueError, match="Expected finite outputs"):
        refine(small, model, x)
    assert equal(before, weights_of(small))


def with_labels(K, both):
    model = residual(K)
    labels = K.layers.Lambda(lambda x: _argmax(x), output_shape=(), name="labels")(model.output)
    return K.Model(model.input, [model.output, labels] if both else labels)


def _argmax(x):
    import tensorflow as tf

    return tf.argmax(x, axis=-1)


def test_outputs_without_gradients(keras_module):
    model = with_labels(keras_module, both=False)
    with pytest.raises(ValueError, match="an output of floating point"):
        keras_alds.refine(keras_alds.compress(model, 0.5), model, images(32))
    model = with_labels(keras_module, both=True)  # the other output counts
    small = keras_alds.compress(model, 0.5)
    result = keras_alds.refine(small, model, images(32), steps=10, verbose=0)
    assert result.after < result.before


# -- In `compress` and `fit` -----------------------------------------------------------------------


def test_compress_refines(keras_module):
    model, x = residual(keras_module), images(256)
    plan = keras_alds.select(model, 0.6, calibration_data=x)
    options = {"plan": plan, "calibration_data": x, "sequential": False}
    plain = keras_alds.compress(model, **options)
    small = keras_alds.compress(model, **options, refine=10)
    by_hand = keras_alds.compress(model, **options)
    result = keras_alds.refine(by_hand, model, x, steps=10, verbose=0)
    assert result.best_step
    assert equal(weights_of(small), weights_of(by_hand))
    test = images(seed=1)
    errors = [
        np.square(m.predict(test, verbose=0) - model.predict(test, verbose=0)).mean()
        for m in (plain, small)
    ]
    assert errors[1] < errors[0]


def test_compress_says_if_it_brought_nothing(small, monkeypatch):
    no_progress(monkeypatch)
    with pytest.warns(UserWarning, match="refinement was undone: no gain on examples") as caught:
        keras_alds.compress(small, 0.5, calibration_data=images(), refine=10)
    assert caught[-1].filename == __file__


def test_refine_needs_examples(small):
    x = images(32)
    stats = keras_alds.CalibrationStats.collect(small, x, verbose=0)
    for data in (None, stats):
        with pytest.raises(ValueError, match="Expected examples as `calibration_data`"):
            keras_alds.compress(small, 0.5, calibration_data=data, refine=True)
    for refine in (0, -1, "yes", 1.5, None):
        with pytest.raises(ValueError, match="Expected `refine` to be True, False"):
            keras_alds.compress(small, 0.5, calibration_data=x, refine=refine)
    with pytest.raises(ValueError, match="Expected examples as `calibration_data`"):
        keras_alds.ALDSCompress(0.5, at_epoch=0, refine=True)


def test_refined_in_fit(keras_module, capsys):
    small = residual(keras_module)
    small.compile(
        keras_module.optimizers.SGD(0.0),
        keras_module.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x = images(256)
    dense = keras_module.models.clone_model(small)
    dense.set_weights(small.get_weights())
    options = {"calibration_data": x, "sequential": False}
    callback = keras_alds.ALDSCompress(0.6, at_epoch=0, **options, refine=10, verbose=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No factor has changed")
        small.fit(x, np.zeros(256, int), verbose=0, callbacks=[callback])
    plain = keras_alds.compress(dense, plan=callback.plan, **options)
    assert "ALDSCompress: refinement: distance to the original's outputs" in capsys.readouterr().out
    result = keras_alds.refine(plain, dense, x, steps=10, verbose=0)
    assert result.best_step
    for a, b in zip(small.trainable_weights, plain.trainable_weights, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def test_pruned_weights_stay_zero():
    tfmot = pytest.importorskip("tensorflow_model_optimization")
    K = pytest.importorskip("tf_keras")
    model = residual(K)
    small = keras_alds.compress(model, 0.3)
    schedule = tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=0, frequency=1)
    pruned = tfmot.sparsity.keras.prune_low_magnitude(small, pruning_schedule=schedule)
    pruned.compile("sgd", "mse")
    pruned.fit(
        images(32), np.zeros((32, 10)), verbose=0,
        callbacks=[tfmot.sparsity.keras.UpdatePruningStep()],
    )  # fmt: skip
    zeros = [np.asarray(w) == 0 for w in pruned.trainable_weights if len(w.shape) > 1]
    assert sum(z.sum() for z in zeros) > 100
    result = keras_alds.refine(pruned, model, images(), steps=10, verbose=0)
    assert result.best_step
    after = [np.asarray(w) for w in pruned.trainable_weights if len(w.shape) > 1]
    assert all((w[z] == 0).all() for w, z in zip(after, zeros, strict=True))


# -- Blocks ----------------------------------------------------------------------------------------


def test_blocks_end_with_adds_and_activations(keras_module):
    model = residual(keras_module)
    assert [layer.name for layer in blocks_of(model).values()] == ["block"]
    L = keras_module.layers
    inputs = keras_module.Input((8,))
    x = inputs + L.Dense(8)(inputs)  # an add that is no layer, without activation
    x = x + 1.0  # adds no tensors of one shape
    y = L.ReLU(name="relu")(L.Dense(8)(x) + x)
    model = keras_module.Model(inputs, L.Dense(3)(y))
    names = list(blocks_of(model))
    assert names == ["add 0", "add 1"]
    assert blocks_of(model)["add 1"].name == "relu"
    small = keras_alds.compress(model, 0.2)
    result = keras_alds.refine(small, model, images(32, (8,)), steps=10, verbose=0)
    assert result.after < result.before


def test_blocks_without_adds(small):
    found = {name: layer.name for name, layer in blocks_of(small).items()}
    # The last layer is the output itself.
    assert found == {"stem": "relu", "down": "down", "hidden": "hidden"}


def test_blocks_of_code(keras_module):
    zoo = importlib.import_module("zoo")
    model = zoo.subclassed(keras_module)
    small = keras_alds.compress(model, 0.4)
    names = list(blocks_of(model))
    assert names == list(blocks_of(small))
    assert len(names) == 4

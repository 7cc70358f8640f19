"""Sequential calibration against a reference that runs the whole network for every layer."""

from __future__ import annotations

import dataclasses
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import ALDSCompress, CalibrationStats, apply_plan, compress, select
from keras_alds.core.calibration.moments import SecondMoment, default_ridge
from keras_alds.core.calibration.refit import factorize_outputs
from keras_alds.core.slicing import full_rank, recompose, unfold
from keras_alds.kinds.base import is_factorized, kernel_values
from keras_alds.models.data import KeptExamples
from keras_alds.models.inventory import Inventory, walk
from keras_alds.models.matching import match
from keras_alds.models.sequential import Walk, most_reruns
from keras_alds.models.storage import Store


def branches(K):
    """A residual block, two branches of different length, and operations that are no layers."""
    L = K.layers
    inputs = K.Input((8, 8, 6))
    x = L.Conv2D(12, 3, padding="same", name="stem")(inputs)
    y = L.Conv2D(12, 3, padding="same", use_bias=False, name="main")(L.ReLU(name="relu")(x))
    y = L.BatchNormalization(name="bn")(y)
    x = L.Add(name="add")([x, y]) * 0.5
    long = L.Conv2D(8, 3, padding="same", name="long_b")(
        L.Conv2D(10, 3, padding="same", activation="relu", name="long_a")(x)
    )
    short = L.Conv2D(8, 3, strides=1, padding="same", name="short")(x)
    x = L.Concatenate(name="both")([long, short])
    x = L.Dropout(0.5, name="drop")(L.GlobalAveragePooling2D(name="pool")(x))
    return K.Model(inputs, L.Dense(12, name="head")(x))


def coded(K):
    """A layer of one's own that calls two others."""

    class Pair(K.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.a, self.b = K.layers.Dense(14, name="a"), K.layers.Dense(12, name="b")

        def build(self, shape):
            self.a.build(shape)
            self.b.build((None, 14))
            super().build(shape)

        def call(self, x):
            return self.b(tf.nn.relu(self.a(x)))

    inputs = K.Input((10,))
    x = K.layers.Dense(16, name="first")(inputs)
    x = Pair(name="pair")(x)
    return K.Model(inputs, K.layers.Dense(8, name="head")(x))


MODELS = {
    "branches": branches,
    "shared": zoo.shared,
    "nested": zoo.nested,
    "coded": coded,
    "subclassed": zoo.subclassed,
}


@pytest.fixture(params=list(MODELS))
def model(request, keras_module):
    keras_module.utils.set_random_seed(0)
    return MODELS[request.param](keras_module)


@pytest.fixture
def net(keras_module):
    keras_module.utils.set_random_seed(0)
    return branches(keras_module)


def watched(model):
    """Whether a layer with a kernel still runs something else in place of its own `call`."""
    return any("call" in vars(layer) for _, layer in walk(model) if hasattr(layer, "kernel"))


def factorizing_all(model, x, cr=0.3):
    """A plan that factorizes every layer that can be, in two slices where there are two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = select(model, cr)
    choices = []
    for record, choice in match(Inventory.of(model), plan):
        if record.skipped is None:
            k = 2 if record.kernel_shape[-2] % 2 == 0 else 1
            rank = max(1, full_rank(record.kernel_shape, k) // 2)
            choice = dataclasses.replace(choice, slices=k, rank=rank, scheme=0, reason=None)
        choices.append(choice)
    return dataclasses.replace(plan, choices=tuple(choices))


def reference(model, plan, x):
    """The outputs of the compressed network, by running all of it anew for every layer.

    48 examples are two batches. Both are split in four, and the fourth parts are held out.
    """
    ridges = {
        path: moment.relative_ridge
        for path, moment in CalibrationStats.collect(model, x, verbose=0).moments.items()
    }
    held_out = [*range(24, 32), *range(44, 48)]
    fitted = [n for n in range(48) if n not in held_out]
    layers = {path: layer for path, layer in walk(model)}
    original = model.get_weights()
    choices = {choice.layer: choice for choice in plan.factorized}

    def rows():
        parts = [tf.nest.map_structure(lambda a, s=s: a[s], x) for s in (fitted, held_out)]
        return [
            {path: r.astype("float64") for path, r in zoo.recorded_rows(model, part).items()}
            for part in parts
        ]

    before = rows()
    try:
        for path in before[0]:  # in the order of the first calls
            if path not in choices:
                continue
            kernel = np.array(kernel_values(layers[path]))
            W = unfold(kernel, 1)[0].astype("float64")
            now = rows()
            pairs = [(a[path], b[path] @ W) for a, b in zip(now, before, strict=True)]

            def fit(X, Y, ridge, W=W):
                S = X.T @ X / len(X)
                if ridge == np.inf:
                    return S, W
                ridge = ridge * np.trace(S) / len(S) * np.eye(len(S))
                return S, np.linalg.solve(S + ridge, X.T @ Y / len(X) + ridge @ W)

            (X_held, Y_held) = pairs[1]
            errors = {
                ridge: np.square(Y_held - X_held @ fit(*pairs[0], ridge)[1]).sum()
                for ridge in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf)
            }
            X, Y = (np.concatenate(values) for values in zip(*pairs, strict=True))
            least = default_ridge(len(W), len(X))
            S, target = fit(X, Y, max(min(errors, key=errors.get), least))
            c, f = kernel.shape[-2:]
            target = np.moveaxis(target.reshape(c, *kernel.shape[:-2], f), 0, -2)
            k, j = choices[path].slices, choices[path].rank
            moment = SecondMoment(S[None], len(X)).with_ridge(ridges[path])
            factors = factorize_outputs(target, moment, k, j)
            layers[path].kernel.assign(recompose(*factors, k).astype(kernel.dtype))
        return zoo.outputs(model, x)
    finally:
        model.set_weights(original)


class TestAgainstReference:
    def test_is_what_running_the_network_for_every_layer_gives(self, model):
        x = zoo.examples(model, 48)
        plan = factorizing_all(model, x)
        weights = model.get_weights()
        expected = reference(model, plan, x)
        small = compress(model, plan=plan, calibration_data=x, sequential=True)
        at_once = compress(model, plan=plan, calibration_data=x, sequential=False)
        distance = np.linalg.norm(zoo.outputs(small, x) - expected)
        assert distance < 5e-3 * np.linalg.norm(expected)
        assert distance < 0.05 * np.linalg.norm(zoo.outputs(at_once, x) - expected)
        for old, new in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        assert not watched(model)

    def test_full_rank_loses_nothing(self, net):
        x = zoo.examples(net, 40)
        plan = factorizing_all(net, x)
        choices = [
            dataclasses.replace(choice, rank=full_rank(choice.kernel_shape, choice.slices))
            if choice.factorized
            else choice
            for choice in plan.choices
        ]
        whole = dataclasses.replace(plan, choices=tuple(choices))
        small = compress(net, plan=whole, calibration_data=x, sequential=True)
        expected = zoo.outputs(net, x)
        np.testing.assert_allclose(
            zoo.outputs(small, x), expected, atol=1e-3 * np.abs(expected).max()
        )

    def test_each_layer_comes_after_those_it_depends_on(self, net):
        examples = KeptExamples(net, zoo.examples(net, 8))
        layers = [layer for _, layer in walk(net) if hasattr(layer, "kernel")]
        order = [layer.name for layer in Walk(net, layers, examples).order]
        assert sorted(order) == sorted(layer.name for layer in layers)
        for before, after in (
            ("stem", "main"),
            ("main", "long_a"),
            ("long_a", "long_b"),
            ("main", "short"),
            ("long_b", "head"),
            ("short", "head"),
        ):
            assert order.index(before) < order.index(after)

    def test_the_same_data_give_the_same_bits(self, net):
        x = zoo.examples(net, 40)
        batches = (x[i : i + 7] for i in range(0, 40, 7))
        a, b = (compress(net, 0.4, calibration_data=data) for data in (x, batches))
        for one, other in zip(a.get_weights(), b.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


class TestMemory:
    def deep(self, depth):
        L = keras.layers
        layers = [L.Conv2D(8, 3, padding="same", name=f"conv{n}") for n in range(depth)]
        return keras.Sequential([keras.Input((8, 8, 8)), *layers, L.Flatten(), L.Dense(4)])

    def run(self, model, examples, store):
        layers = [layer for _, layer in walk(model) if hasattr(layer, "kernel")]
        targets = []
        Walk(model, layers, examples, store).run(
            lambda layer, moment, target: targets.append((moment.blocks, target))
        )
        return targets

    def test_does_not_grow_with_depth_and_everything_is_freed(self):
        peaks = []
        for depth in (3, 12):
            model, store = self.deep(depth), Store()
            self.run(model, KeptExamples(model, zoo.examples(model, 64)), store)
            peaks.append(store.peak)
            assert store.bytes == 0
        assert peaks[0] == peaks[1]
        # What goes into a layer and what comes out, both versions of all examples.
        assert peaks[0] <= 4 * 64 * 8**3 * 4

    def test_does_not_grow_with_the_examples_beyond_a_limit(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        model = self.deep(3)
        x = zoo.examples(model, 64)
        stores = [Store(), Store(limit=80_000), Store(limit=0)]
        results = [self.run(model, KeptExamples(model, x), store) for store in stores]
        assert stores[0].peak > 80_000 >= stores[1].peak > stores[2].peak == 0
        assert list(tmp_path.iterdir())
        for result in results[1:]:
            for pair, other in zip(results[0], result, strict=True):
                for a, b in zip(pair, other, strict=True):
                    np.testing.assert_array_equal(a, b)
        del stores
        assert not [file for folder in tmp_path.iterdir() for file in folder.iterdir()]

    def test_tensors_of_every_kind_come_back(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        store = Store(limit=0)
        masked = tf.ones((2, 3))
        masked._keras_mask = tf.constant([True, False])
        for value in (tf.cast(tf.range(6), tf.bfloat16), tf.constant([[1, 2]]), masked):
            kept = store.keep(value)
            again = store.load(kept)
            assert again.dtype == value.dtype
            np.testing.assert_array_equal(again, value)
            assert getattr(again, "_keras_mask", None) is getattr(value, "_keras_mask", None)
            store.drop(kept)
        assert store.load(store.keep(tf.constant("a"))) == tf.constant("a")
        assert store.load(store.keep(None)) is None


class TestOptions:
    X = np.random.default_rng(0).standard_normal((16, 8, 8, 6)).astype("float32")

    @pytest.mark.parametrize(
        ("sequential", "data", "message"),
        [
            (True, None, "Expected examples as `calibration_data`.*of type NoneType"),
            (True, "stats", "Expected examples as `calibration_data`.*of type CalibrationStats"),
            ("yes", X, "Expected `sequential` to be True, False or None. Received: .*'yes'"),
            (1, X, "Expected `sequential` to be True, False or None. Received: sequential=1"),
        ],
        ids=["no data", "statistics", "text", "number"],
    )
    def test_are_checked_first(self, net, sequential, data, message):
        if isinstance(data, str):
            data = CalibrationStats.collect(net, self.X, verbose=0)
        plan = select(net, 0.4)
        for call in (
            lambda: compress(net, 0.4, calibration_data=data, sequential=sequential),
            lambda: apply_plan(net, plan, calibration_data=data, sequential=sequential),
            lambda: ALDSCompress(0.4, calibration_data=data, sequential=sequential, at_epoch=0),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        assert not any(is_factorized(layer) for _, layer in walk(net))

    def test_statistics_alone_are_used_as_they_are(self, net):
        stats = CalibrationStats.collect(net, self.X, verbose=0)
        plan = select(net, 0.4, calibration_data=stats)
        a = compress(net, plan=plan, calibration_data=stats)
        b = compress(net, plan=plan, calibration_data=self.X, sequential=False)
        for one, other in zip(a.get_weights(), b.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_long_python_code_is_run_anew_only_if_asked_for(self, keras_module, monkeypatch):
        model = zoo.subclassed(keras_module)
        x = zoo.examples(model, 16)
        layers = [layer for _, layer in walk(model) if hasattr(layer, "kernel")]
        assert most_reruns(model, layers) == 5
        monkeypatch.setattr("keras_alds.models.fit.MOST_RERUNS", 0)
        with pytest.warns(UserWarning, match="Sequential compression would run the Python code"):
            at_once = compress(model, 0.4, max_slices=1, calibration_data=x)
        expected = compress(model, 0.4, max_slices=1, calibration_data=x, sequential=False)
        for one, other in zip(at_once.get_weights(), expected.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Without retraining")
            compress(model, 0.4, max_slices=1, calibration_data=x, sequential=True)

    def test_in_place_and_in_fit_it_is_the_same(self, net, keras_module):
        expected = compress(net, 0.4, calibration_data=self.X).get_weights()
        plan = select(net, 0.4, calibration_data=self.X)
        net.compile(keras_module.optimizers.SGD(0.0), "mse")
        callback = ALDSCompress(0.4, calibration_data=self.X, verbose=0, at_epoch=0)
        found = []

        class Spy(keras_module.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                found.extend(self.model.get_weights())

        net.fit(self.X, np.zeros((16, 12)), verbose=0, callbacks=[callback, Spy()])
        assert callback.plan == plan
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_mixed_precision(self, keras_module):
        keras_module.mixed_precision.set_global_policy("mixed_float16")
        try:
            model = branches(keras_module)
        finally:
            keras_module.mixed_precision.set_global_policy("float32")
        small = compress(model, 0.3, calibration_data=self.X)
        expected = zoo.outputs(model, self.X).astype("float32")
        lost = zoo.outputs(small, self.X).astype("float32") - expected
        assert np.linalg.norm(lost) < 0.7 * np.linalg.norm(expected)


class TestBadData:
    X = TestOptions.X

    def test_a_generator_is_read_once(self, net):
        batches = iter([self.X])
        assert compress(net, 0.4, calibration_data=batches).count_params() < net.count_params()
        with pytest.raises(ValueError, match="was a generator used up before"):
            compress(net, 0.4, calibration_data=batches)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (X[:5], "at least 8 examples"),
            (np.where(X > 2, np.nan, X), "finite `calibration_data`"),
            (X[..., :3], r"shape \(batch, 8, 8, 6\)"),
        ],
        ids=["few", "nan", "shape"],
    )
    def test_is_refused_and_nothing_changed(self, net, data, message):
        before = net.get_weights()
        plan = select(net, 0.4)
        for call in (compress, apply_plan):
            options = {"plan": plan} if call is compress else {}
            args = (net,) if call is compress else (net, plan)
            with pytest.raises(ValueError, match=message):
                call(*args, calibration_data=data, sequential=True, **options)
        for old, new in zip(before, net.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        assert not watched(net)

    def test_overflow_inside_names_the_layer(self, net):
        plan = select(net, 0.4)
        net.get_layer("bn").gamma.assign(np.full(12, np.inf))
        with pytest.raises(ValueError, match="NaN or infinity in the input of layer"):
            apply_plan(net, plan, calibration_data=self.X)
        assert not any(is_factorized(layer) for _, layer in walk(net))
        assert not watched(net)

    @pytest.mark.parametrize("value", [0.0, 2.5])
    def test_constant_inputs_and_dead_channels(self, net, value):
        net.get_layer("bn").gamma.assign(np.arange(12) % 2)
        x = np.full_like(self.X, value)
        with pytest.raises(ValueError, match="8 different examples"):
            compress(net, 0.4, calibration_data=x)
        x *= 1 + 1e-6 * np.arange(len(x), dtype="float32").reshape(-1, 1, 1, 1)
        x[:, 0, 0, 0] = np.arange(len(x)) * 1e-6
        small = compress(net, 0.4, calibration_data=x)
        assert all(np.isfinite(weight).all() for weight in small.get_weights())

    def test_few_examples_before_a_wide_layer(self, keras_module):
        model = keras_module.Sequential(
            [
                keras_module.Input((200,)),
                keras_module.layers.Dense(300, "relu", name="a"),
                keras_module.layers.Dense(60, name="b"),
            ]
        )
        x, others = np.split(zoo.examples(model, 16 + 400), [16])
        small = compress(model, 0.4, calibration_data=x)
        blind = compress(model, 0.4, method="energy")

        def lost(compressed, x):
            return np.linalg.norm(zoo.outputs(compressed, x) - zoo.outputs(model, x))

        assert lost(small, x) < 0.5 * lost(blind, x)
        # White noise: of directions that 16 examples do not show nothing is to be learnt.
        assert lost(small, others) < 1.1 * lost(blind, others)

    def test_calls_that_depend_on_the_data(self):
        class Moody(keras.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.dense, self.calls = keras.layers.Dense(16), 0

            def build(self, shape):
                self.dense.build(shape)

            def call(self, x):
                self.calls += 1
                return self.dense(x) if self.calls % 2 else self.dense(self.dense(x))

        inputs = keras.Input((16,))
        model = keras.Model(inputs, Moody()(keras.layers.Dense(16)(inputs)))
        first, layer = (layer for _, layer in walk(model) if hasattr(layer, "kernel"))
        examples = KeptExamples(model, np.ones((16, 16), "float32"))
        walking = Walk(model, [first, layer], examples)
        other = keras.layers.Dense(16)
        other.build((None, 16))
        with pytest.raises(ValueError, match="called as often in the compressed network"):
            walking.run(lambda layer, *_: other if layer is first else None)
        assert "call" not in vars(layer)

"""Layers and models of the user's own that hold Keras layers: how they are saved and loaded."""

from __future__ import annotations

import copy
import functools
import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import own_layers
import pytest
import tensorflow as tf
import zoo
from own_layers import WIDTH, alone, model_of, names_for, own_classes

from keras_alds import ALDSCompress, CompressionPlan, apply_plan, compress, expand, select
from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import walk

TEXT = r"A saved file will not load: Keras cannot make {} again"
SUFFIXES = (".keras", ".h5", "")  # "" is a SavedModel of tf_keras


@functools.cache
def data():
    return np.random.default_rng(0).normal(size=(8, WIDTH)).astype("float32")


@functools.cache
def compressed(K, *names):
    """A compressed model of some layers and models; do not change it."""
    return compress(model_of(K, *names), 0.3)


def factorized(model):
    return sum(is_factorized(layer) for _, layer in walk(model))


def assert_same(loaded, model, exact=True):
    """Asserts that two models have the same outputs, after each of their layers."""
    assert factorized(loaded) == factorized(model) > 0
    found, wanted = loaded(data()), model(data())
    names = [layer.name for layer in model.layers][-len(wanted) :]
    for name, one, other in zip(names, found, wanted, strict=True):
        same = np.array_equal if exact else np.allclose
        assert same(np.asarray(one), np.asarray(other)), name


def silently(make):
    """What `make` returns; a warning that it will not load is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "A saved file will not load")
        return make()


class TestEveryContainerLoads:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_after_compress(self, keras_module, suffix, tmp_path):
        K = keras_module
        if not suffix and K.__name__ == "keras":
            pytest.skip("Keras 3 saves no SavedModel that it can load")
        small = silently(lambda: compressed(K, *names_for(K, suffix)))
        small.save(tmp_path / f"small{suffix}")
        loaded = K.models.load_model(tmp_path / f"small{suffix}", compile=False)
        assert_same(loaded, small)
        if suffix == ".keras":  # and once more
            loaded.save(tmp_path / "again.keras")
            assert_same(K.models.load_model(tmp_path / "again.keras"), small)

    def test_after_the_callback(self, keras_module, tmp_path):
        K, x = keras_module, data()
        model = model_of(K, "InInit", "InOwn")
        callback = ALDSCompress(0.3, at_epoch=1, verbose=0)
        save = K.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
        silently(lambda: model.fit(x, [x, x], epochs=2, verbose=0, callbacks=[callback, save]))
        loaded = K.models.load_model(tmp_path / "2.keras")
        assert_same(loaded, model)
        loaded.fit(x, [x, x], verbose=0)

    @pytest.mark.parametrize("name", ["Subclassed", "OwnFunctional"])
    def test_a_model_of_ones_own(self, keras_module, name, tmp_path):
        K = keras_module
        small = silently(lambda: compress(alone(K, name), 0.3))
        small.fit(data(), data(), verbose=0)
        small.save(tmp_path / "small.keras")
        loaded = K.models.load_model(tmp_path / "small.keras")
        assert isinstance(loaded, own_classes(K)[name])
        assert factorized(loaded) == factorized(small) > 0
        np.testing.assert_array_equal(zoo.outputs(loaded, data()), zoo.outputs(small, data()))
        loaded.fit(data(), data(), verbose=0)  # it is compiled
        assert isinstance(loaded.optimizer, K.optimizers.SGD)

    def test_weights_load_where_the_plan_was_applied(self, keras_module, tmp_path):
        model = model_of(keras_module, "InInit", "InOwn")
        plan = select(model, 0.3)
        small = compress(model, plan=plan)
        small.save_weights(tmp_path / "small.weights.h5")
        fresh = model_of(keras_module, "InInit", "InOwn")
        apply_plan(fresh, plan)
        fresh.load_weights(tmp_path / "small.weights.h5")
        assert_same(fresh, small)


LOADER = """
import sys
import numpy as np
import keras, tf_keras
import keras_alds, own_layers
folder, *files = sys.argv[1:]
x = np.load(folder + "/x.npy")
for number, file in enumerate(files):
    K = tf_keras if "tf_keras" in file else keras
    own_layers.own_classes(K)
    outputs = K.models.load_model(file, compile=False)(x)
    flat = np.concatenate([np.ravel(np.asarray(output)) for output in outputs])
    np.testing.assert_array_equal(flat, np.load(file + ".npy"))
    print("loaded", end=" ")
"""


def test_a_fresh_process_loads_all_formats(tmp_path):
    files = []
    for K in reversed(zoo.KERASES):
        for suffix in SUFFIXES if K.__name__ == "tf_keras" else SUFFIXES[:2]:
            small = compressed(K, *names_for(K, suffix))
            files.append(str(tmp_path / f"{K.__name__}_small{suffix}"))
            small.save(files[-1])
            outputs = [np.ravel(np.asarray(output)) for output in small(data())]
            np.save(files[-1] + ".npy", np.concatenate(outputs))
    np.save(tmp_path / "x.npy", data())
    here = pathlib.Path(own_layers.__file__).parent
    paths = os.pathsep.join(map(str, (here.parent, here)))
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path), *files],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    assert done.stdout.split() == ["loaded"] * len(files), done.stderr[-3000:]


def test_graphs_that_a_layer_makes_of_its_layers(keras_module, tmp_path):
    """A loaded layer's code makes graphs of dense kernels, which do not compute on in silence."""
    K, x = keras_module, np.ones((2, 64), "float32")

    class Traced(own_classes(K)["InInit"]):
        def make(self):
            super().make()
            self.b.build((None, 64))
            traced = tf.function(self.b)
            graph = traced.get_concrete_function(tf.TensorSpec((None, 64)))
            mapped = tf.data.Dataset.from_tensors(x).map(self.b)
            self.graphs = lambda: (traced, graph, mapped)

    inputs = K.Input((WIDTH,))
    small = compress(K.Model(inputs, Traced(64, name="traced")(inputs)), 0.3)
    small.save(tmp_path / "small.keras")
    with pytest.warns(UserWarning, match=r"Traced traces its .* 'traced', and fail from now on"):
        loaded = K.models.load_model(tmp_path / "small.keras", custom_objects={"Traced": Traced})
    layer = loaded.get_layer("traced")
    assert is_factorized(layer.b)
    np.testing.assert_array_equal(loaded(data()), small(data()))
    traced, graph, mapped = layer.graphs()
    np.testing.assert_allclose(traced(x), layer.b(x), atol=1e-6)
    with pytest.raises(RuntimeError, match="Call `get_concrete_function` of its"):
        graph(tf.constant(x))
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not a matrix"):
        list(mapped)


def test_functions_that_a_layer_makes_trace_again(keras_module, tmp_path):
    K, x = keras_module, np.ones((2, 64), "float32")

    class Traced(own_classes(K)["InInit"]):
        def make(self):
            super().make()
            traced = tf.function(self.b)
            traced(x)
            self.traced = lambda: traced

    inputs = K.Input((WIDTH,))
    small = compress(K.Model(inputs, Traced(64, name="traced")(inputs)), 0.3)
    small.save(tmp_path / "small.keras")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* traces its layers")
        loaded = K.models.load_model(tmp_path / "small.keras", custom_objects={"Traced": Traced})
    layer = loaded.get_layer("traced")
    np.testing.assert_allclose(layer.traced()(x), layer.b(x), atol=1e-6)


class TestLifeAfterTheCompression:
    @pytest.fixture
    def small(self, keras_module):
        return compressed(keras_module, "InOwn", "StockHolders")

    def test_classes_and_names_are_the_users(self, keras_module, small):
        for layer in small.layers[1:]:
            cls = own_classes(keras_module)[type(layer).__name__]
            assert isinstance(layer, cls)
            assert type(layer) is not cls
            assert type(layer).__qualname__ == cls.__qualname__
            assert type(layer).__doc__ == cls.__doc__

    def test_a_clone(self, keras_module, small):
        clone = keras_module.models.clone_model(small)
        clone.set_weights(small.get_weights())
        assert_same(clone, small)

    def test_a_deep_copy(self, keras_module, small):
        assert_same(copy.deepcopy(small), small)

    def test_a_layer_made_again_from_its_config(self, keras_module, small):
        layer = small.get_layer("inown")
        again = type(layer).from_config({**layer.get_config(), "name": "other"})
        assert again.name == "other"
        again(data())
        again.set_weights(layer.get_weights())
        np.testing.assert_array_equal(again(data()), layer(data()))
        # A user's code makes such layers from the arguments of its class.
        assert type(layer).from_config({"n": 5}).n == 5

    @pytest.mark.parametrize("name", ["InInit", "InOwnInBuild", "Subclassed", "OwnFunctional"])
    def test_classes_that_are_not_registered(self, keras_module, name, tmp_path):
        K = keras_module

        class Unregistered(own_classes(K)[name]):
            pass

        model = Unregistered()
        if not isinstance(model, K.Model):
            model = K.Sequential([K.Input((WIDTH,)), model])
        model(data())
        objects = {"Unregistered": Unregistered}
        small = silently(lambda: compress(model, 0.3))
        smaller = silently(lambda: compress(small, 0.5))
        assert smaller.count_params() < small.count_params()
        clone = K.models.clone_model(small)
        if not clone.built:
            clone(data())
        clone.set_weights(small.get_weights())
        small.save(tmp_path / "small.keras")
        loaded = K.models.load_model(tmp_path / "small.keras", custom_objects=objects)
        for other in (clone, loaded):
            np.testing.assert_array_equal(zoo.outputs(other, data()), zoo.outputs(small, data()))

    def test_what_needs_stock_layers_names_the_holder(self, small):
        with pytest.raises(ValueError, match=r"'inown' of type InOwn, which calls them in Python"):
            expand(small)

    def test_a_second_compression_that_is_saved(self, keras_module, small, tmp_path):
        before = small.count_params()
        plan = select(small, 0.45)
        apply_plan(small, plan)
        assert small.count_params() == plan.params_after < before
        small.save(tmp_path / "smaller.keras")
        assert_same(keras_module.models.load_model(tmp_path / "smaller.keras"), small)


class TestWhatCannotBeLoaded:
    def own(self, K, how, name="own"):
        class Own(K.layers.Layer):
            def call(self, x):
                return self.a(x)

            def get_config(self):
                if how == "no config":
                    raise NotImplementedError("none here")
                return super().get_config()

            def build(self, shape):
                if how == "by hand":
                    self.built = True

        layer = Own(name=name)
        layer.a = K.layers.Dense(WIDTH)
        return layer

    @pytest.mark.parametrize(
        ("how", "reason"),
        [
            ("no config", r"NotImplementedError: none here"),
            ("by hand", r"Expected Own to make the stock layer 'a'.*Received: no layer"),
        ],
    )
    def test_the_compression_says_so_and_the_plan_helps(self, keras_module, how, reason, tmp_path):
        K = keras_module

        def make():
            return K.Sequential([K.Input((WIDTH,)), self.own(K, how)], name="model")

        model = make()
        plan = select(model, 0.3)
        text = TEXT.format(r"'own' \(Own\)") + f".*{reason}"
        with pytest.warns(UserWarning, match=text) as caught:
            apply_plan(model, plan)
        assert [w.filename for w in caught if "will not load" in str(w.message)] == [__file__]
        model.save_weights(tmp_path / "small.weights.h5")
        plan.save(tmp_path / "plan.json")
        fresh = make()
        with pytest.warns(UserWarning, match="will not load"):
            apply_plan(fresh, CompressionPlan.load(tmp_path / "plan.json"))
        fresh.load_weights(tmp_path / "small.weights.h5")
        np.testing.assert_array_equal(zoo.outputs(fresh, data()), zoo.outputs(model, data()))

    def test_layers_made_in_call(self):
        K = pytest.importorskip("tf_keras")  # Keras 3 does not build such layers

        class InCall(K.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.a = None

            def call(self, x):
                if self.a is None:
                    self.a = K.layers.Dense(WIDTH)
                return self.a(x)

        inputs = K.Input((WIDTH,))
        model = K.Model(inputs, InCall(name="own")(inputs))
        with pytest.warns(UserWarning, match=TEXT.format(r"'own' \(InCall\)")):
            apply_plan(model, select(model, 0.3))

    def test_the_file_says_so_too(self, keras_module, tmp_path):
        K = keras_module
        model = K.Sequential([K.Input((WIDTH,)), self.own(K, "by hand")])
        with pytest.warns(UserWarning, match="will not load"):
            apply_plan(model, select(model, 0.3))
        model.save(tmp_path / "small.keras")
        cls = model.layers[-1]._own
        with pytest.raises(ValueError, match=r"Expected Own to make the stock layer 'a'"):
            K.models.load_model(tmp_path / "small.keras", custom_objects={"Own": cls})

    def test_an_unknown_class_ends_in_a_sentence(self, keras_module, tmp_path):
        K = keras_module

        class Unknown(own_classes(K)["InInit"]):
            pass

        model = K.Sequential([K.Input((WIDTH,)), Unknown()])
        silently(lambda: apply_plan(model, select(model, 0.3)))
        model.save(tmp_path / "small.keras")
        with pytest.raises(ValueError, match="Expected the class 'Unknown'") as error:
            K.models.load_model(tmp_path / "small.keras")
        assert len(str(error.value)) < 500
        loaded = K.models.load_model(tmp_path / "small.keras", custom_objects={"Unknown": Unknown})
        np.testing.assert_array_equal(zoo.outputs(loaded, data()), zoo.outputs(model, data()))

    def test_a_warning_that_is_an_error_changes_nothing(self, keras_module):
        K = keras_module
        model = K.Sequential([K.Input((WIDTH,)), self.own(K, "no config")])
        before = zoo.outputs(model, data()), [type(layer) for _, layer in walk(model)]
        plan = select(model, 0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="will not load"):
                apply_plan(model, plan)
        assert [type(layer) for _, layer in walk(model)] == before[1]
        np.testing.assert_array_equal(zoo.outputs(model, data()), before[0])

    def test_the_outermost_are_named_in_one_warning(self, keras_module):
        K = keras_module
        own = [self.own(K, "no config", name) for name in "abcd"]
        model = K.Sequential([K.Input((WIDTH,)), *own])
        names = r"'a' \(Own\), 'b' \(Own\), 'c' \(Own\), …"
        with pytest.warns(UserWarning, match=TEXT.format(names)) as caught:
            apply_plan(model, select(model, 0.3, method="svd"))
        assert sum("will not load" in str(w.message) for w in caught) == 1


def step_of_its_own(K):
    class Net(K.Model):
        def train_step(self, data):
            return super().train_step(data)

    inputs = K.Input((24,))
    return Net(inputs, K.layers.Dense(3)(K.layers.Dense(24)(inputs)))


def recurrent(K):
    L = K.layers
    inputs = K.Input((5, 8))
    x = L.Bidirectional(L.LSTM(8, return_sequences=True))(inputs)
    x = L.RNN(L.GRUCell(8), return_sequences=True)(L.MultiHeadAttention(2, 8)(x, x))
    return K.Model(inputs, L.TimeDistributed(L.Dense(16))(x))


@pytest.mark.parametrize(
    "make",
    [
        *(zoo.functional, zoo.sequential, zoo.nested, zoo.shared, zoo.wrapped),
        *(step_of_its_own, recurrent),
    ],
)
def test_holders_whose_configs_have_it_all_keep_their_class(keras_module, make):
    model = make(keras_module)
    plan = select(model, 0.3)
    before = type(model)
    small = silently(lambda: compress(model, plan=plan))
    silently(lambda: apply_plan(model, plan))
    assert type(model) is type(small) is before
    assert small.count_params() == model.count_params() == plan.params_after


def test_what_is_left_whole_keeps_its_class(keras_module):
    K = keras_module
    own = own_classes(K)["InInit"](name="own")
    model = K.Sequential([K.Input((WIDTH,)), own, K.layers.Dense(WIDTH)])
    apply_plan(model, select(model, 0.1, exclude="own"))
    assert type(own) is own_classes(K)["InInit"]


def test_pruning_wrappers_are_not_warned_of():
    tfmot = pytest.importorskip("tensorflow_model_optimization")
    K = pytest.importorskip("tf_keras")
    inputs = K.Input((24,))
    x = K.layers.Dense(24)(inputs)
    model = tfmot.sparsity.keras.prune_low_magnitude(K.Model(inputs, K.layers.Dense(24)(x)))
    silently(lambda: apply_plan(model, select(model, 0.4)))

"""Layers and models that make what is inside them in code: what is said, and how they load."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import zoo

from keras_alds import ALDSCompress, CompressionPlan, apply_plan, compress, select

TEXT = r"The code of {} creates dense layers when a saved model is loaded"


def data():
    return np.random.default_rng(0).normal(size=(32, 24)).astype("float32")


@functools.cache
def own_layers(K):
    """Layers that hold two dense ones, by where they make them."""
    L = K.layers

    class Own(L.Layer):
        def __init__(self, n, **kwargs):
            super().__init__(**kwargs)
            self.n = n

        def get_config(self):
            return {**super().get_config(), "n": self.n}

        def make(self):
            return [L.Dense(self.n, "relu"), L.Dense(self.n)]

    class InInit(Own):
        def __init__(self, n, **kwargs):
            super().__init__(n, **kwargs)
            self.a, self.b = self.make()

        def call(self, x):
            return self.b(self.a(x))

    class InBuild(Own):
        def build(self, shape):
            self.a, self.b = self.make()
            self.a.build(shape)
            self.b.build((*shape[:-1], self.n))
            self.built = True

        call = InInit.call

    class InList(Own):
        def __init__(self, n, **kwargs):
            super().__init__(n, **kwargs)
            self.blocks = self.make()

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    class InConfig(L.Layer):
        def __init__(self, blocks, **kwargs):
            super().__init__(**kwargs)
            self.blocks = blocks

        call = InList.call

        def get_config(self):
            blocks = [K.saving.serialize_keras_object(block) for block in self.blocks]
            return {**super().get_config(), "blocks": blocks}

        @classmethod
        def from_config(cls, config):
            blocks = [K.saving.deserialize_keras_object(block) for block in config.pop("blocks")]
            return cls(blocks, **config)

    kinds = (InInit, InBuild, InList, InConfig)
    return {kind.__name__: K.saving.register_keras_serializable()(kind) for kind in kinds}


def with_layer(K, layer):
    model = K.Sequential([K.Input((24,)), layer, K.layers.Dense(3, name="head")])
    model.compile("sgd", K.losses.MeanSquaredError())
    return model


@pytest.mark.parametrize("kind", ["InInit", "InBuild", "InList"])
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
class TestMadeInCode:
    def test_what_compress_says_is_how_it_loads(self, keras_module, kind, suffix, tmp_path):
        def make():
            return with_layer(keras_module, own_layers(keras_module)[kind](24, name="own"))

        model = make()
        plan = select(model, 0.4, exclude="head")
        with pytest.warns(UserWarning, match=TEXT.format(rf"'own' \({kind}\)")) as caught:
            small = compress(model, plan=plan)
        said = [warning for warning in caught if "creates dense layers" in str(warning.message)]
        assert [warning.filename for warning in said] == [__file__]
        plan.save(tmp_path / "plan.json")
        path = tmp_path / f"small{suffix}"
        (small.save if suffix == ".keras" else small.save_weights)(path)

        loaded = make()
        with pytest.warns(UserWarning, match="creates dense layers"):
            apply_plan(loaded, CompressionPlan.load(tmp_path / "plan.json"))
        loaded.load_weights(path)
        np.testing.assert_array_equal(zoo.outputs(loaded, data()), zoo.outputs(small, data()))

    def test_what_the_callback_says_is_how_it_loads(self, keras_module, kind, suffix, tmp_path):
        def make():
            return with_layer(keras_module, own_layers(keras_module)[kind](24, name="own"))

        model, x = make(), data()
        callback = ALDSCompress(0.4, at_epoch=1, verbose=0)
        with pytest.warns(UserWarning, match="creates dense layers") as caught:
            model.fit(x, x[:, :3], epochs=3, callbacks=[callback], verbose=0)
        assert sum("creates dense layers" in str(warning.message) for warning in caught) == 1
        path = tmp_path / f"small{suffix}"
        (model.save if suffix == ".keras" else model.save_weights)(path)

        loaded = make()
        with pytest.warns(UserWarning, match="creates dense layers"):
            apply_plan(loaded, callback.plan)
        loaded.load_weights(path)
        np.testing.assert_array_equal(zoo.outputs(loaded, x), zoo.outputs(model, x))


def test_a_warning_that_is_an_error_changes_nothing(keras_module):
    model = with_layer(keras_module, own_layers(keras_module)["InInit"](24))
    before = zoo.outputs(model, data()), [tuple(w.shape) for w in model.weights]
    plan = select(model, 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="creates dense layers"):
            apply_plan(model, plan)
    assert [tuple(w.shape) for w in model.weights] == before[1]
    np.testing.assert_array_equal(zoo.outputs(model, data()), before[0])


def test_the_outermost_is_named_once(keras_module):
    K = keras_module

    class Net(K.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.own = own_layers(K)["InList"](24)
            self.inner = K.Sequential([K.Input((24,)), K.layers.Dense(24)])

        def call(self, x):
            return self.inner(self.own(x))

    model = Net(name="net")
    model(data())
    with pytest.warns(UserWarning, match=TEXT.format(r"'net' \(Net\)")) as caught:
        apply_plan(model, select(model, 0.4))
    assert sum("creates dense layers" in str(warning.message) for warning in caught) == 1


def test_all_are_named(keras_module):
    kinds = own_layers(keras_module)
    model = keras_module.Sequential(
        [keras_module.Input((24,)), *(kinds["InInit"](24, name=name) for name in "abcd")]
    )
    names = r"'a' \(InInit\), 'b' \(InInit\), 'c' \(InInit\), …"
    with pytest.warns(UserWarning, match=TEXT.format(names)):
        apply_plan(model, select(model, 0.4, method="svd"))


def test_a_functional_model_with_a_constructor_of_its_own(keras_module):
    K = keras_module

    class Net(K.Model):
        def __init__(self, width=24):
            inputs = K.Input((24,))
            super().__init__(inputs, K.layers.Dense(3)(K.layers.Dense(width)(inputs)))

    model = Net()
    plan = select(model, 0.4)
    with pytest.warns(UserWarning, match=r"\(Net\) creates dense layers"):
        apply_plan(model, plan)


def in_config(K):
    layers = [K.layers.Dense(24, "relu"), K.layers.Dense(24)]
    return with_layer(K, own_layers(K)["InConfig"](layers))


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
        *(in_config, step_of_its_own, recurrent),
    ],
)
def test_what_is_saved_in_configs_is_not_warned_of(keras_module, make):
    model = make(keras_module)
    plan = select(model, 0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*creates dense layers")
        small = compress(model, plan=plan)
        apply_plan(model, plan)
    assert small.count_params() == model.count_params() == plan.params_after


def test_what_is_left_whole_is_not_warned_of(keras_module):
    K = keras_module
    model = K.Sequential(
        [K.Input((24,)), own_layers(K)["InInit"](24, name="own"), K.layers.Dense(24)]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*creates dense layers")
        compress(model, 0.1, exclude="own")


def test_a_config_that_holds_the_layers_loads(keras_module, tmp_path):
    small = compress(in_config(keras_module), 0.4)
    small.save(tmp_path / "small.keras")
    loaded = keras_module.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(zoo.outputs(loaded, data()), zoo.outputs(small, data()))


def test_pruning_wrappers_are_not_warned_of():
    tfmot = pytest.importorskip("tensorflow_model_optimization")
    K = pytest.importorskip("tf_keras")
    inputs = K.Input((24,))
    x = K.layers.Dense(24)(inputs)
    model = tfmot.sparsity.keras.prune_low_magnitude(K.Model(inputs, K.layers.Dense(24)(x)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*creates dense layers")
        apply_plan(model, select(model, 0.4))

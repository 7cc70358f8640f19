"""How the configs of a user's own layers name the factorized layers in them."""

from __future__ import annotations

import pickle
import random
import warnings

import keras
import numpy as np
import pytest
from own_layers import WIDTH, model_of, own_classes

from keras_alds import apply_plan, select
from keras_alds.kinds.base import is_factorized
from keras_alds.kinds.holders import KEY, WithFactorizedLayers, does_not_load, layers_in


def factorized_in(K, name):
    """A layer of `own_classes` in which layers are factorized."""
    model = model_of(K, name)
    apply_plan(model, select(model, 0.5, method="svd"))
    return model.layers[-1]


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("InInit", ["a", "b"]),
        ("InLists", ["blocks/0/0", "blocks/1/second/0", "blocks/1/second/1"]),
        ("InDict", ["pair/0", "pair/1", "parts/a", "parts/b/c"]),
        ("InFunctional", ["net", "net/layers/0", "net/layers/1", "net/layers/2"]),
        ("Shared", ["inner", "inner/a", "inner/b", "one"]),
    ],
)
def test_paths_are_attributes_in_order_and_each_layer_has_one(keras_module, name, paths):
    (layer,) = model_of(keras_module, name).layers[1:]
    assert sorted(path for path, _ in layers_in(layer)) == paths
    found = [inner for _, inner in layers_in(layer)]
    assert len(found) == len(set(found))


def test_the_config_has_the_arguments_and_the_factorized_layers(keras_module):
    layer = factorized_in(keras_module, "InInit")
    config = layer.get_config()
    assert config["n"] == WIDTH
    assert config["name"] == layer.name
    assert config[KEY]["registered_name"] == "own>InInit"
    assert sorted(config[KEY]["layers"]) == ["a", "b"]
    assert config[KEY]["layers"]["a"]["class_name"] == "FactorizedDense"


def test_a_layer_is_factorized_before_it_is_built(keras_module):
    layer = factorized_in(keras_module, "InOwn")
    again = type(layer).from_config(layer.get_config())
    assert is_factorized(again.head)
    assert not again.head.built
    assert not again.blocks[0].built
    again.head.trainable = False
    again(np.zeros((2, WIDTH), "float32"))
    assert is_factorized(again.blocks[0].a)  # made in `build`
    assert [tuple(w.shape) for w in again.weights] == [tuple(w.shape) for w in layer.weights]
    assert not again.head.trainable_weights
    for holder in (again, again.first, *again.blocks):
        assert isinstance(holder, WithFactorizedLayers)


def test_variables_are_named_as_where_stock_layers_are_built(keras_module):
    layer = factorized_in(keras_module, "InOwn")
    again = type(layer).from_config({**layer.get_config(), "name": "again"})
    again(np.zeros((2, WIDTH), "float32"))
    encoder = again.head.encoder
    assert getattr(encoder, "path", encoder.name).startswith(f"again/{again.head.name}/encoder")


def test_names_of_variables_differ_where_names_of_layers_do_not(keras_module):
    layer = factorized_in(keras_module, "SameNames")
    names = [getattr(weight, "path", weight.name) for weight in layer.weights]
    assert sum("encoder" in name for name in names) == 4
    assert len(names) == len(set(names))


def test_a_class_that_has_changed_is_refused(keras_module):
    layer = factorized_in(keras_module, "InInit")
    config = layer.get_config()
    config[KEY]["layers"]["a"] = {
        **config[KEY]["layers"]["a"],
        "class_name": "FactorizedEmbedding",
        "registered_name": "keras_alds>FactorizedEmbedding",
        "config": {"input_dim": 8, "output_dim": 8, "rank": 1},
    }
    with pytest.raises(ValueError, match=r"the stock layer 'a', .* Received: a Dense, in the"):
        type(layer).from_config(config)


def at_the_top(K):
    """A class at the top of this module, as `pickle` needs it."""

    class Module(K.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = K.layers.Dense(WIDTH)

        def build(self, shape):
            self.dense.build(shape)
            self.built = True

        def call(self, x):
            return self.dense(x)

    Module.__name__ = Module.__qualname__ = f"Module_{K.__name__}"
    return globals().setdefault(Module.__name__, Module)


def test_pickles(keras_module):
    K, cls = keras_module, at_the_top(keras_module)
    with K.saving.custom_object_scope({cls.__name__: cls}):
        model = K.Sequential([K.Input((WIDTH,)), cls()])
        apply_plan(model, select(model, 0.3))
        layer = pickle.loads(pickle.dumps(model.layers[0]))
    assert isinstance(layer, cls)
    assert is_factorized(layer.dense)
    x = np.ones((2, WIDTH), "float32")
    np.testing.assert_array_equal(layer(x), model(x))


def test_classes_are_made_once(keras_module):
    first, second = factorized_in(keras_module, "InInit"), factorized_in(keras_module, "InInit")
    assert type(first) is type(second)
    assert issubclass(type(first), own_classes(keras_module)["InInit"])


def holder_of(K, make, counted=None):
    """A new class, which is not registered, in whose layer all is factorized."""

    class Unregistered(K.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            (counted if counted is not None else []).append(random.random())
            self.blocks = make()

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    return Unregistered


def compressed_in(K, cls, cr=0.3):
    model = K.Sequential([K.Input((WIDTH,)), cls()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_plan(model, select(model, cr, method="svd"))
    return model.layers[-1]


def test_the_check_makes_a_class_once_and_leaves_the_seeds(keras_module):
    L, made = keras_module.layers, []
    cls = holder_of(keras_module, lambda: [L.Dense(WIDTH), L.Dense(WIDTH)], made)
    for cr in (0.3, 0.4, 0.5):
        layer = compressed_in(keras_module, cls, cr)
    assert len(made) == 3 + 1
    random.seed(0)
    state = random.getstate()
    assert does_not_load(layer) is None
    assert len(made) == 4
    other = layer.get_config
    layer.get_config = lambda: {**other(), "unknown": 1}  # other arguments: made again
    assert "unknown" in does_not_load(layer)
    layer.get_config = lambda: {**other(), "trainable": False}
    assert does_not_load(layer) is None
    assert len(made) == 5
    assert random.getstate() == state


def test_a_failed_check_is_not_repeated(keras_module):
    L, made = keras_module.layers, []
    cls = holder_of(keras_module, lambda: [L.Dense(WIDTH)] if len(made) == 1 else [], made)
    layer = compressed_in(keras_module, cls)
    assert "Expected Unregistered to make the stock layer 'blocks/0'" in does_not_load(layer)
    assert len(made) == 1 + 1


def test_layers_in_a_set_are_said_not_to_load():
    # tf_keras does not look into sets at all.
    cls = holder_of(keras, lambda: {keras.layers.Dense(WIDTH, name="one")})
    reason = does_not_load(compressed_in(keras, cls))
    assert reason.endswith("Unregistered holds 'one' in other ways, such as in a set")


def test_what_holds_no_layers_costs_nothing(keras_module):
    class Word:
        def __str__(self):
            raise AssertionError("a vocabulary has a million of them")

    layer = factorized_in(keras_module, "InInit")
    paths = [path for path, _ in layers_in(layer)]
    object.__setattr__(layer, "words", {Word(): "word", "more": {Word(): 1}})
    assert [path for path, _ in layers_in(layer)] == paths

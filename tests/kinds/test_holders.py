"""How the configs of a user's own layers name the factorized layers in them."""

from __future__ import annotations

import pickle

import keras
import numpy as np
import pytest
from own_layers import WIDTH, model_of, own_classes

from keras_alds import apply_plan, select
from keras_alds.kinds.base import is_factorized
from keras_alds.kinds.holders import KEY, WithFactorizedLayers, layers_in


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


class Module(keras.layers.Layer):
    """A layer at the top of its module, as `pickle` needs it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(WIDTH)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)


def test_pickles():
    with keras.saving.custom_object_scope({"Module": Module}):
        model = keras.Sequential([keras.Input((WIDTH,)), Module()])
        apply_plan(model, select(model, 0.3))
        layer = pickle.loads(pickle.dumps(model.layers[0]))
    assert isinstance(layer, Module)
    assert is_factorized(layer.dense)
    x = np.ones((2, WIDTH), "float32")
    np.testing.assert_array_equal(layer(x), model(x))


def test_classes_are_made_once(keras_module):
    first, second = factorized_in(keras_module, "InInit"), factorized_in(keras_module, "InInit")
    assert type(first) is type(second)
    assert issubclass(type(first), own_classes(keras_module)["InInit"])

"""The memory of a file: what is planned for a model is what its file needs."""

from __future__ import annotations

from typing import Any

import keras
import pytest

import keras_alds
from keras_alds import litert
from keras_alds.litert import _package
from keras_alds.litert.memory import activation_memory
from keras_alds.models.inventory import Inventory
from keras_alds.models.memory import peak_entries

pytest.importorskip("ai_edge_litert")


def network() -> Any:
    """A residual block, a padding, scalings, folded or not, and layers of several operators."""
    L = keras.layers
    x = inputs = keras.Input((10, 10, 8))
    x = y = L.Conv2D(24, 3, padding="same", activation="relu")(x)
    y = L.BatchNormalization(beta_initializer="ones")(y)
    y = L.Conv2D(24, 3, padding="same", activation="silu")(y)
    y = L.BatchNormalization(beta_initializer="ones")(L.Conv2D(24, 3, padding="same")(y))
    x = L.ReLU()(L.Add()([x, y]))
    x = L.DepthwiseConv2D(3, strides=2)(L.ZeroPadding2D(1)(x))
    x = L.SeparableConv2D(16, 3, padding="same", activation="relu")(x)
    x = L.Dropout(0.5)(L.Flatten()(x))
    return keras.Model(inputs, L.Dense(5, activation="softmax")(x))


def arena_of_litert(content: bytes) -> int:
    """Bytes from the first to the last tensor that LiteRT allocates.

    Only the reference kernels have no memory of their own in it.
    """
    module = _package.interpreter()
    kernels = module.OpResolverType.BUILTIN_REF
    runtime = module.Interpreter(model_content=content, experimental_op_resolver_type=kernels)
    runtime.allocate_tensors()
    ends = []
    for tensor in litert.read_file(content).tensors:
        if not tensor.constant:
            array = runtime.tensor(tensor.index)()
            start = array.__array_interface__["data"][0]
            ends += [start, start + array.nbytes]
    return max(ends) - min(ends)


def test_a_file_needs_what_is_planned():
    keras.utils.set_random_seed(0)
    model = network()
    plan = keras_alds.select(model, 0.3, method="alds")
    small = keras_alds.compress(model, plan=plan)
    found = litert.compare(model, small, runs=0, verbose=0)
    peaks = (found.original.peak_activations, found.compressed.peak_activations)
    assert peaks == tuple(4 * entries for entries in plan.memory)
    assert plan.memory.after > plan.memory.before
    assert found.compressed.arena >= found.compressed.peak_activations
    assert found.original.macs == keras_alds.count_macs(model)
    assert found.compressed.macs == keras_alds.count_macs(small)
    lines = []
    found.summary(print_fn=lines.append)
    assert f"| peak activations, bytes |    {peaks[0]:,} |" in lines[0]
    assert f"| arena, bytes            |    {found.original.arena:,} |" in lines[0]


def test_a_limit_holds_in_the_file():
    """By both planners, and in LiteRT itself."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(n, 3, padding="same", activation="relu") for n in (8, 16, 8)]
    model = keras.Sequential([keras.Input((8, 8, 4)), *layers])
    files = []
    for cr in (None, 0.4, {"params": 0.4, "memory": 0.0}):
        small = model if cr is None else keras_alds.compress(model, cr, method="alds")
        content = litert.convert(small, verbose=0)
        memory = activation_memory(litert.read_file(content))
        assert memory.peak == 4 * peak_entries(Inventory.of(small))
        files.append((*memory, arena_of_litert(content)))
    before, free, limited = files
    for original, most, least in zip(before, free, limited, strict=True):
        assert least <= original < most

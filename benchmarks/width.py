"""Width pruning with a least-squares refit, to compare with; a sketch for chains of stock layers.

Where the outputs of a convolution or dense layer reach one other such layer only, through layers
that treat every channel alone, a fraction of these inner channels is removed. A channel's cost is
the error that is left of the reader's outputs after a refit without it. The reader is then refitted
to its outputs on calibration data, given the channels that stay.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers, tree

# What does not mix channels. Others may, and end a chain.
ALONE = (
    layers.Activation,
    layers.AveragePooling2D,
    layers.BatchNormalization,
    layers.DepthwiseConv2D,
    layers.Dropout,
    layers.GlobalAveragePooling2D,
    layers.MaxPooling2D,
    layers.ReLU,
    layers.ZeroPadding2D,
)
MULTIPLE = 4  # of the number of channels that stay
RIDGE = 1e-4  # as a part of the mean eigenvalue


class Chain(NamedTuple):
    """A layer, the layers between, and the only reader of its channels."""

    writer: Any
    between: list[Any]
    reader: Any


def chains(model: Any) -> list[Chain]:
    """All chains of a model whose layers are called once."""
    readers: dict[int, list[Any]] = {}
    if isinstance(model, keras.Sequential):
        readers = {id(a.output): [b] for a, b in itertools.pairwise(model.layers)}
    else:
        for layer in model.layers:
            if not isinstance(layer, layers.InputLayer):
                for tensor in tree.flatten(layer.input):
                    readers.setdefault(id(tensor), []).append(layer)
    found = []
    for writer in model.layers:
        if type(writer) not in (layers.Conv2D, layers.Dense):
            continue
        between: list[Any] = []
        last, channels = writer, writer.output.shape[-1]
        while len(after := readers.get(id(last.output), [])) == 1:
            (last,) = after
            if type(last) in (layers.Conv2D, layers.Dense):
                found.append(Chain(writer, between, last))
                break
            flat = isinstance(last, layers.Flatten)
            if last.output.shape[-1] != channels or not (flat or isinstance(last, ALONE)):
                break
            between.append(last)
    return found


def narrowed(model: Any, x: Any, fraction: float) -> Any:
    """The model without a fraction of all inner channels.

    The chains are cut one after the other. Each reader is fitted to the original's outputs, given
    what the layers before it, which are cut already, make of the images.

    Args:
        model: A Functional or Sequential model.
        x: Unlabelled images, or None: the first channels stay, which is enough for the latency.
        fraction: The part to remove of each layer's inner channels.
    """
    small = model
    for number, chain in enumerate(chains(model)):
        channels = chain.writer.output.shape[-1]
        count = max(round(channels * (1 - fraction) / MULTIPLE), 1) * MULTIPLE
        cut = chains(small)[number]
        if x is None:
            kept = np.arange(count)
            kernel = np.asarray(cut.reader.kernel)[..., kept, :]
        else:
            wanted, seen = inputs_of(model, chain.reader, x), inputs_of(small, cut.reader, x)
            kept, kernel = refitted(wanted, seen, chain, count)
        small = without(small, cut, kept, kernel)
    return small


def inputs_of(model: Any, layer: Any, x: Any) -> Any:
    """What a layer of the model gets for some images."""
    if isinstance(model, keras.Sequential):
        before = model.layers[: model.layers.index(layer)]
        part = keras.Sequential([keras.Input(x.shape[1:]), *before])
    else:
        part = keras.Model(model.inputs, layer.input)
    return part.predict(x, batch_size=32, verbose=0)


def rows_of(layer: Any, inputs: Any) -> Any:
    """The inputs of a layer, one row for each of its outputs' positions."""
    if isinstance(layer, layers.Dense):
        return inputs
    patches = tf.image.extract_patches(
        inputs,
        [1, *layer.kernel_size, 1],
        [1, *layer.strides, 1],
        [1, *layer.dilation_rate, 1],
        layer.padding.upper(),
    )
    return patches.numpy().reshape(-1, patches.shape[-1])


def refitted(wanted: Any, seen: Any, chain: Chain, count: int) -> tuple[Any, Any]:
    """The channels that stay, and the reader's kernel for them.

    Args:
        wanted: The reader's inputs in the original.
        seen: The same in the model that is cut.
        chain: The chain of the original.
        count: How many channels stay.
    """
    *window, channels, filters = chain.reader.kernel.shape
    side = math.prod(window) * channels
    moments, crossed = np.zeros((2, side, side))
    for some, others in zip(
        *(np.array_split(v, -(-len(v) // 16)) for v in (seen, wanted)), strict=True
    ):
        rows = rows_of(chain.reader, some)
        moments += rows.T @ rows
        crossed += rows.T @ rows_of(chain.reader, others)
    moments[np.diag_indices(side)] += RIDGE * np.trace(moments) / side
    outputs = crossed @ np.asarray(chain.reader.kernel, np.float64).reshape(side, filters)
    best, inverse = np.linalg.solve(moments, outputs), np.linalg.inv(moments)
    costs = []
    for channel in range(channels):
        mine = np.arange(channel, side, channels)
        costs.append(np.sum(best[mine] * np.linalg.solve(inverse[np.ix_(mine, mine)], best[mine])))
    kept = np.sort(np.argsort(costs)[::-1][:count])
    taken = np.arange(side).reshape(-1, channels)[:, kept].ravel()
    kernel = np.linalg.solve(moments[np.ix_(taken, taken)], outputs[taken])
    return kept, kernel.reshape(*window, count, filters)


def without(model: Any, chain: Chain, kept: Any, kernel: Any) -> Any:
    """A copy of the model in which only some channels of a chain are left."""
    weights = {layer.name: layer.get_weights() for layer in model.layers}
    weights[chain.reader.name][0] = kernel
    for layer in (chain.writer, *chain.between):
        is_depthwise = isinstance(layer, layers.DepthwiseConv2D)
        weights[layer.name] = [
            w[..., kept, :] if is_depthwise and w.ndim == 4 else w[..., kept]
            for w in weights[layer.name]
        ]

    def copied(layer: Any) -> Any:
        config = layer.get_config()
        if layer.name == chain.writer.name:
            config["filters" if "filters" in config else "units"] = len(kept)
        return layer.__class__.from_config(config)

    small = keras.models.clone_model(model, clone_function=copied)
    for layer in small.layers:
        layer.set_weights(weights[layer.name])
    return small

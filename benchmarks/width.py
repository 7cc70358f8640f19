"""Width pruning with a least-squares refit, to compare with; a sketch for chains of stock layers.

Where the outputs of a convolution or dense layer reach one other such layer only, through layers
that treat every channel alone, a fraction of these inner channels is removed. A channel's cost is
the error that is left of the reader's outputs after a refit without it. The reader is then refitted
to its outputs on calibration data, given the channels that stay.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, tree

from keras_alds.core.slicing import unfold

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
MULTIPLE = 4  # the number of channels that stay


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


def refitted(chain: Chain, moment: Any, fraction: float) -> tuple[Any, Any]:
    """The channels that stay, and the reader's kernel for them, as `[rows, filters]`."""
    channels = chain.writer.output.shape[-1]
    kernel = unfold(np.asarray(chain.reader.kernel, np.float64), 1)[0]
    rows = len(kernel) // channels  # of each channel
    moments = moment.slice_block(1, 0)
    inverse = np.linalg.inv(moments)
    costs = []
    for start in range(0, len(kernel), rows):
        part = slice(start, start + rows)
        costs.append(np.sum(kernel[part] * np.linalg.solve(inverse[part, part], kernel[part])))
    count = max(round(channels * (1 - fraction) / MULTIPLE), 1) * MULTIPLE
    kept = np.sort(np.argsort(costs)[::-1][:count])
    taken = (kept[:, None] * rows + np.arange(rows)).ravel()
    return kept, np.linalg.solve(moments[np.ix_(taken, taken)], moments[taken] @ kernel)


def narrowed(model: Any, stats: Any, fraction: float) -> Any:
    """The model without a fraction of all inner channels.

    Args:
        model: A Functional or Sequential model.
        stats: `CalibrationStats` of it.
        fraction: The part to remove of each layer's inner channels.
    """
    weights = {layer.name: layer.get_weights() for layer in model.layers}
    widths, cuts = {}, []
    for chain in chains(model):
        kept, kernel = refitted(chain, stats.moments[chain.reader.name], fraction)
        widths[chain.writer.name] = len(kept)
        cuts.append((chain, kept, kernel))
    for chain, kept, kernel in cuts:
        *window, _, filters = chain.reader.kernel.shape
        folded = kernel.reshape(len(kept), *window, filters)
        weights[chain.reader.name][0] = np.moveaxis(folded, 0, -2)
    for chain, kept, _ in cuts:  # after the refits, which are of all filters
        weights[chain.writer.name] = [w[..., kept] for w in weights[chain.writer.name]]
        for layer in chain.between:
            is_depthwise = isinstance(layer, layers.DepthwiseConv2D)
            weights[layer.name] = [
                w[..., kept, :] if is_depthwise and w.ndim == 4 else w[..., kept]
                for w in weights[layer.name]
            ]

    def copied(layer: Any) -> Any:
        config = layer.get_config()
        if layer.name in widths:
            config["filters" if "filters" in config else "units"] = widths[layer.name]
        return layer.__class__.from_config(config)

    small = keras.models.clone_model(model, clone_function=copied)
    for layer in small.layers:
        layer.set_weights(weights[layer.name])
    return small

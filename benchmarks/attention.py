"""Attention alone, at equal parameters: factors, one encoder for three layers, narrower heads.

    python benchmarks/attention.py --images cifar10.npz --text data_full.json
    python benchmarks/attention.py --images cifar10.npz --convolutions resnet8.h5

The first command takes the networks that `benchmarks/transformer.py --train` has written, and
prints a Markdown table for each: the change of the accuracy in points, and the total variation
distance of the outputs, where only the projections of attention are cut. All of them lose the same
fraction of their parameters, and are fitted to 512 unlabelled examples at once. The second command
compares one encoder for a convolution and its shortcut with two, by the mean relative squared error
of their outputs.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import transformer
from scipy.special import softmax

from keras_alds.core.slicing import unfold
from keras_alds.kinds.attention import projections
from keras_alds.kinds.base import kernel_values, stock_kind
from keras_alds.models.calibration import Calibration
from keras_alds.models.heads import Heads
from keras_alds.models.inventory import Inventory

Array = np.ndarray
SHARED = ("query", "key", "value")
#: Eigenvalues below this part of the largest one are rounding.
RESOLUTION = 1e-9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=Path, help=".npz file of CIFAR-10")
    add("--text", type=Path, help="data_full.json of clinc/oos-eval")
    add("--convolutions", type=Path, help="a network with shortcuts, for --images of 0 to 255")
    add("--folder", type=Path, default=Path("runs/transformer"), help="where the networks are")
    add("--crs", type=float, nargs="+", default=[0.25, 0.5, 0.625, 0.75])
    add("--examples", type=int, default=512, help="for calibration (default: 512)")
    return parser.parse_args()


def roots(moment: Array) -> tuple[Array, Array]:
    """The symmetric root of a second moment, and its inverse."""
    values, vectors = np.linalg.eigh(moment)
    values = np.sqrt(np.maximum(values, values.max() * RESOLUTION))
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def cut(matrix: Array, moment: Array, rank: int) -> tuple[Array, float]:
    """The best approximation of a rank for some inputs, and its relative squared error."""
    root, inverse = roots(moment)
    left, values, right = np.linalg.svd(root @ matrix, full_matrices=False)
    squares = values**2
    kept = inverse @ (left[:, :rank] * values[:rank]) @ right[:rank]
    return kept, float(squares[rank:].sum() / squares.sum())


def scaled(matrices: list[Array], moment: Array) -> tuple[Array, list[float]]:
    """Matrices side by side, each divided by the norm of its outputs, and the norms."""
    norms = [float(np.sqrt(np.vdot(matrix, moment @ matrix))) for matrix in matrices]
    pairs = zip(matrices, norms, strict=True)
    return np.concatenate([matrix / norm for matrix, norm in pairs], axis=1), norms


class Layer:
    """One attention layer with equal sizes of inputs, heads in all, and outputs."""

    def __init__(self, layer: Any, records: dict[Any, Any]) -> None:
        self.dense = projections(layer)
        known = {name: records[dense] for name, dense in self.dense.items()}
        self.heads = Heads(layer.name, layer, stock_kind(layer), known)
        self.moments = {n: r.moment.times(np.eye(r.moment.side)) for n, r in known.items()}
        self.matrices = {n: unfold(kernel_values(d), 1)[0] for n, d in self.dense.items()}
        self.side = len(self.matrices["query"])

    def put(self, name: str, matrix: Array) -> None:
        """Sets the kernel of a projection."""
        kernel = self.dense[name].kernel
        kernel.assign(matrix.reshape(kernel.shape))

    def factorize(self, cr: float) -> None:
        """Two factors of the same rank for every projection."""
        rank = int((1 - cr) * self.side / 2)
        for name, matrix in self.matrices.items():
            self.put(name, cut(matrix, self.moments[name], rank)[0])

    def share(self, cr: float) -> None:
        """One encoder for three projections; its rank and that of the output by least error."""
        budget, side = 4 * self.side**2 * (1 - cr), self.side
        joint, norms = scaled([self.matrices[name] for name in SHARED], self.moments["query"])
        found = []
        for rank in range(1, side + 1):
            left = int((budget - 4 * side * rank) // (2 * side))
            if left < 1:
                break
            shared, error = cut(joint, self.moments["query"], rank)
            output, other = self.matrices["output"], 0.0
            if left < side / 2:
                output, other = cut(output, self.moments["output"], left)
            found.append((3 * error + other, shared, output))
        _, shared, output = min(found, key=lambda trial: trial[0])
        for name, part, norm in zip(SHARED, np.split(shared, 3, axis=1), norms, strict=True):
            self.put(name, part * norm)
        self.put("output", output)

    def narrow(self, cr: float) -> None:
        """Narrower heads, with the split into both widths of the least error."""
        scores, values = self.heads.products(1)
        full = scores.widths[-1]
        total = int(2 * full * (1 - cr))
        widths = range(max(1, total - full), min(full, total - 1) + 1)
        errors = [scores.errors[n - 1] + values.errors[total - n - 1] for n in widths]
        width = widths[int(np.argmin(errors))]
        for product, n in ((scores, width), (values, total - width)):
            for dense, kernel in product.kernels(n).items():
                dense.kernel.assign(kernel)


def attention(task: transformer.Task, model: Any, crs: list[float], examples: int) -> None:
    """Prints the table of one network."""
    chosen = np.random.default_rng(0).permutation(len(task.examples))[:examples]
    records = records_of(model, task.examples[chosen])
    stock = keras.layers.MultiHeadAttention
    layers = [Layer(layer, records) for layer in model.layers if type(layer) is stock]
    original = model.get_weights()
    scores = model.predict(task.x_test, batch_size=250, verbose=0)

    def measured() -> str:
        new = model.predict(task.x_test, batch_size=250, verbose=0)
        model.set_weights(original)
        top1 = [100 * np.mean(some.argmax(-1) == task.y_test) for some in (scores, new)]
        away = np.abs(softmax(scores, -1) - softmax(new, -1)).sum(axis=-1).mean() / 2
        return f"{top1[1] - top1[0]:+.1f} ({away:.3f})"

    print(
        f"\n{task.title}\n\n| removed of attention | " + " | ".join(f"{c:.1%}" for c in crs) + " |"
    )
    print("|---|" + "---|" * len(crs))
    ways = {
        "factors of each projection": Layer.factorize,
        "one encoder for query, key, value": Layer.share,
        "narrower heads": Layer.narrow,
    }
    for name, way in ways.items():
        cells = []
        for cr in crs:
            for layer in layers:
                way(layer, cr)
            cells.append(measured())
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def records_of(model: Any, examples: Array) -> dict[Any, Any]:
    inventory = Inventory.of(model)
    stats = Calibration.of(inventory, examples).collected(inventory, curves=False, verbose=0)
    return {record.layer: record for record in stats.match(inventory).records}


def convolutions(model: Any, images: Array) -> None:
    """Prints the errors of one encoder and of two, for convolutions of the same tensor."""
    records = records_of(model, images)
    readers = defaultdict(list)
    for layer in model.layers:
        if type(layer) is keras.layers.Conv2D:
            readers[layer.input.name].append(layer)
    print("\n| layers | removed | an encoder each | one encoder |\n|---|---|---|---|")
    for layers in (some for some in readers.values() if len(some) > 1):
        layers.sort(key=lambda layer: -layer.kernel.shape[0])
        wide = records[layers[0]].moment
        moment = wide.times(np.eye(wide.side))
        rows = np.arange(wide.side).reshape(-1, *layers[0].kernel_size)
        inside, sizes = [], []
        for layer in layers:  # smaller windows are the centres of the largest one
            starts = [(a - b) // 2 for a, b in zip(rows.shape[1:], layer.kernel_size, strict=True)]
            (i, j), (h, w) = starts, layer.kernel_size
            matrix = np.zeros((wide.side, layer.filters))
            seen = rows[:, i : i + h, j : j + w].ravel()
            matrix[seen] = unfold(kernel_values(layer), 1)[0]
            inside.append(matrix)
            sizes.append(len(seen) + layer.filters)
        joint = scaled(inside, moment)[0]
        pairs = zip(sizes, layers, strict=True)
        full = sum((size - layer.filters) * layer.filters for size, layer in pairs)
        root = roots(moment)[0]
        parts = np.split(joint, np.cumsum([layer.filters for layer in layers])[:-1], axis=1)
        squares = [np.linalg.svd(root @ part, compute_uv=False) ** 2 for part in parts]
        whole = np.linalg.svd(root @ joint, compute_uv=False) ** 2
        for cr in (0.3, 0.5, 0.7):
            each = separate(squares, sizes, (1 - cr) * full)
            rank = int((1 - cr) * full // (wide.side + joint.shape[1]))
            both = whole[rank:].sum() / len(layers)
            names = " + ".join(layer.name for layer in layers)
            print(f"| {names} | {cr:.0%} | {each:.3f} | {both:.3f} |")


def separate(squares: list[Array], sizes: list[int], budget: float) -> float:
    """The mean error with ranks that are raised where that gains most."""
    steps = [
        (square / size, square, size)
        for values, size in zip(squares, sizes, strict=True)
        for square in values
    ]
    left = float(len(squares))
    for _, square, size in sorted(steps, reverse=True):
        if size <= budget:
            budget -= size
            left -= square
    return left / len(squares)


def main() -> None:
    arguments = parse_arguments()
    if arguments.convolutions:
        images = np.load(arguments.images)["x_train"][: arguments.examples].astype("float32")
        convolutions(keras.models.load_model(arguments.convolutions, compile=False), images)
        return
    tasks = {
        "vit": (transformer.image_task, arguments.images),
        "text": (transformer.text_task, arguments.text),
    }
    for name, (load, path) in tasks.items():
        if path:
            task = load(path)
            model = transformer.network(task, arguments.folder / f"{name}.keras", train=False)
            attention(task, model, arguments.crs, arguments.examples)


if __name__ == "__main__":
    main()

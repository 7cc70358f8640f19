"""Accuracy against epochs of retraining, from the starts that different methods give.

    python benchmarks/retraining.py --model resnet20.keras --data cifar10.npz --cr 0.75 --epochs 10

compresses the model by every method of `--starts`, retrains each on the same batches (the
example's: crops and flips, SGD with momentum, a cosine from `--learning-rate` to 0), and prints a
Markdown table of top-1 on the test images after every epoch. `"dense"` is the model itself with the
same further training, to tell what that does alone. With `--targets outputs` no labels are used:
the compressed model learns the original's scores for the same crops (Ba and Caruana, "Do Deep Nets
Really Need to be Deep?", NeurIPS 2014). `--csv` writes every figure when it is known and goes on
from what the file holds; `--plot` draws the curves.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras
import numpy as np

import keras_alds

FIELDS = ("start", "epoch", "top1", "seconds")
DENSE = "dense"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained Keras 3 model, .keras or .h5")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--cr", type=float, default=0.75, help="fraction to remove (default: 0.75)")
    add(
        "--starts",
        nargs="+",
        default=["alds", "activation", DENSE],
        help='methods, and "dense" (default: alds activation dense)',
    )
    add("--images", type=int, default=512, help="images for calibration (default: 512)")
    add("--epochs", type=int, default=10, help="epochs of retraining (default: 10)")
    add("--train", type=int, help="training images in an epoch (default: all)")
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=0.02, help="at the start (default: 0.02)")
    add("--momentum", type=float, default=0.9)
    add(
        "--targets",
        choices=("labels", "outputs"),
        default="labels",
        help="what to learn: the labels, or what the original gives (default: labels)",
    )
    add("--csv", type=Path, help="write the figures here, and go on from those it holds")
    add("--plot", type=Path, help="draw the curves into this picture")
    return parser.parse_args()


class Curves:
    """Top-1 by start and epoch (0 is before retraining), kept in a file as they come."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path and path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def add(self, start: str, epoch: int, top1: float, seconds: float) -> None:
        """Records, prints and writes one figure."""
        row = {
            "start": start,
            "epoch": str(epoch),
            "top1": f"{top1:.2f}",
            "seconds": f"{seconds:.0f}",
        }
        self.rows.append(row)
        print(*row.values(), flush=True)
        if self.path:
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)

    def of(self, start: str) -> dict[int, float]:
        """Top-1 by epoch."""
        return {int(row["epoch"]): float(row["top1"]) for row in self.rows if row["start"] == start}

    def drop(self, start: str) -> None:
        """Forgets a start that was not finished."""
        self.rows = [row for row in self.rows if row["start"] != start]

    def to_markdown(self, starts: list[str], epochs: int) -> str:
        """One line a start, one column an epoch."""
        lines = ["| epochs | " + " | ".join(map(str, range(epochs + 1))) + " |"]
        lines.append("|---|" + "---|" * (epochs + 1))
        for start in starts:
            cells = [f"{top1:.1f}" for _, top1 in sorted(self.of(start).items())]
            lines.append(f'| `"{start}"` | ' + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: Path, starts: list[str], title: str) -> None:
        """Draws one curve a start."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axis = figure.subplots()
        for index, start in enumerate(starts):
            curve = sorted(self.of(start).items())
            style = {"color": "0.5", "linestyle": ":"} if start == DENSE else {"marker": "o"}
            axis.plot(*zip(*curve, strict=True), markersize=4, label=start, **style)
            axis.annotate(
                f"{curve[-1][1]:.1f}",
                curve[-1],
                xytext=(5, 4 - 9 * index),
                textcoords="offset points",
                fontsize=8,
            )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("epochs of retraining")
        axis.set_ylabel("top-1 in %")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
        figure.savefig(path, dpi=110)


def squared_distance(expected: Any, given: Any, *, from_logits: bool) -> Any:
    """Half the mean squared difference of scores; of probabilities, that of their logarithms."""
    if not from_logits:
        floor = keras.config.epsilon()
        expected, given = (keras.ops.log(keras.ops.maximum(p, floor)) for p in (expected, given))
    return keras.ops.mean(keras.ops.square(expected - given), axis=-1) / 2


def main() -> None:
    arguments = parse_arguments()
    x_train, y_train, x_test, y_test = cifar10.load_data(arguments.data, keras, 1.0, None)
    x_train, y_train = x_train[: arguments.train], y_train[: arguments.train]
    original = cifar10.load_model(arguments.model, keras)
    from_logits = cifar10.gives_logits(original, x_test)
    steps = arguments.epochs * -(-len(x_train) // arguments.batch_size)
    curves = Curves(arguments.csv)

    if arguments.targets == "labels":
        loss: Any = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    else:
        loss = functools.partial(squared_distance, from_logits=from_logits)

    def batches() -> Any:
        data = cifar10.batches(x_train, y_train, arguments.batch_size, augment=True)
        if arguments.targets == "outputs":
            data = data.map(lambda x, _: (x, original(x, training=False)))
        return data

    def top1(model: Any) -> float:
        scores = model.predict(x_test, batch_size=250, verbose=0)
        return 100 * float(np.mean(scores.argmax(-1) == y_test))

    def started(start: str) -> Any:
        if start == DENSE:
            copy = keras.models.clone_model(original)
            copy.set_weights(original.get_weights())
            return copy
        needs_data = start in ("activation", "pca")
        data = x_train[: arguments.images] if needs_data else None
        return keras_alds.compress(original, arguments.cr, method=start, calibration_data=data)

    def retrain(start: str) -> None:
        model = started(start)
        begun = time.perf_counter()
        curves.add(start, 0, top1(model), 0)
        schedule = keras.optimizers.schedules.CosineDecay(arguments.learning_rate, steps)
        model.compile(
            keras.optimizers.SGD(schedule, momentum=arguments.momentum, nesterov=True),
            loss,
        )
        keras.utils.set_random_seed(0)
        model.fit(
            batches(),
            epochs=arguments.epochs,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda epoch, logs: curves.add(
                        start, epoch + 1, top1(model), time.perf_counter() - begun
                    )
                )
            ],
        )

    for start in arguments.starts:
        if len(curves.of(start)) <= arguments.epochs:
            curves.drop(start)
            retrain(start)

    title = f"{arguments.model.stem}, {arguments.cr:.0%} of the parameters removed"
    print(f"\n{title}, top-1 in %; dense: {top1(original):.1f}\n")
    print(curves.to_markdown(arguments.starts, arguments.epochs))
    print(
        f"\n{len(x_test):,} test images; {len(x_train):,} training images an epoch, learning "
        f"{arguments.targets}, batches of {arguments.batch_size}, SGD "
        f"{arguments.learning_rate:g} with a cosine to 0"
    )
    if arguments.plot:
        curves.plot(arguments.plot, arguments.starts, title)


if __name__ == "__main__":
    main()

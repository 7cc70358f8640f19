"""Accuracy against epochs of retraining, from the starts that different methods give.

    python benchmarks/retraining.py --model resnet20.keras --data cifar10.npz --cr 0.75 --epochs 16

compresses the model by every method of `--starts`, retrains each on the same batches (the
example's: crops and flips, SGD with momentum, a cosine from `--learning-rate` to 0), and prints a
Markdown table of top-1 on the test images after every epoch. `"dense"` is the model itself with the
same further training, to tell what that does alone. Every start learns what `--targets` names: the
labels, or, without any, the outputs, that is the original's scores for the same crops (Ba and
Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014). `--csv` writes every figure when it
is known and goes on from what the file holds; `--plot` draws the curves.
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

FIELDS = ("start", "targets", "epoch", "top1", "seconds")
Curve = tuple[str, str]  # start and targets
DENSE = "dense"
SHOWN = 16  # points below the original that the plot shows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained Keras 3 model, .keras or .h5")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--cr", type=float, default=0.75, help="fraction to remove (default: 0.75)")
    add(
        "--starts",
        nargs="+",
        default=["alds", "activation"],
        help='methods, and "dense" (default: alds activation)',
    )
    add("--images", type=int, default=512, help="images for calibration (default: 512)")
    add("--epochs", type=int, default=16, help="epochs of retraining (default: 16)")
    add("--train", type=int, help="training images in an epoch (default: all)")
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=0.02, help="at the start (default: 0.02)")
    add("--momentum", type=float, default=0.9)
    add(
        "--targets",
        nargs="+",
        choices=("labels", "outputs"),
        default=["labels", "outputs"],
        help="what to learn: the labels, or what the original gives (default: each)",
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

    def add(self, curve: Curve, epoch: int, top1: float, seconds: float) -> None:
        """Records, prints and writes one figure."""
        figures = (*curve, str(epoch), f"{top1:.2f}", f"{seconds:.0f}")
        print(*figures, flush=True)
        self.rows.append(dict(zip(FIELDS, figures, strict=True)))
        if self.path:
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)

    def of(self, curve: Curve) -> dict[int, float]:
        """Top-1 by epoch."""
        return {
            int(row["epoch"]): float(row["top1"])
            for row in self.rows
            if (row["start"], row["targets"]) == curve
        }

    def drop(self, curve: Curve) -> None:
        """Forgets a curve that was not finished."""
        self.rows = [row for row in self.rows if (row["start"], row["targets"]) != curve]

    def to_markdown(self, curves: list[Curve], epochs: int) -> str:
        """One line a curve, one column an epoch."""
        lines = ["| start, learns | " + " | ".join(map(str, range(epochs + 1))) + " |"]
        lines.append("|---|" + "---|" * (epochs + 1))
        for start, targets in curves:
            cells = [f"{top1:.1f}" for _, top1 in sorted(self.of((start, targets)).items())]
            lines.append(f'| `"{start}"`, {targets} | ' + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: Path, curves: list[Curve], base: float, title: str) -> None:
        """Draws the curves, from `SHOWN` points below the original on."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        starts = list(dict.fromkeys(start for start, _ in curves))
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axis = figure.subplots()
        axis.axhline(base, color="0.5", linestyle=":", label="the original")
        for start, targets in curves:
            curve = sorted(self.of((start, targets)).items())
            axis.plot(
                *zip(*curve, strict=True),
                color=f"C{starts.index(start)}",
                linestyle="-" if targets == "outputs" else "--",
                marker="o",
                markersize=3,
                label=f"{start}, {targets}: {curve[0][1]:.1f} → {curve[-1][1]:.1f}",
            )
        axis.set_ylim(base - SHOWN, base + 1)
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

    losses = {
        "labels": keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
        "outputs": functools.partial(squared_distance, from_logits=from_logits),
    }

    def batches(targets: str) -> Any:
        data = cifar10.batches(x_train, y_train, arguments.batch_size, augment=True)
        if targets == "outputs":
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
        options = {"method": start, "target": "size"}
        return keras_alds.compress(original, arguments.cr, calibration_data=data, **options)

    def retrain(curve: Curve) -> None:
        start, targets = curve
        model = started(start)
        begun = time.perf_counter()
        curves.add(curve, 0, top1(model), 0)
        schedule = keras.optimizers.schedules.CosineDecay(arguments.learning_rate, steps)
        model.compile(
            keras.optimizers.SGD(schedule, momentum=arguments.momentum, nesterov=True),
            losses[targets],
        )
        keras.utils.set_random_seed(0)
        model.fit(
            batches(targets),
            epochs=arguments.epochs,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda epoch, logs: curves.add(
                        curve, epoch + 1, top1(model), time.perf_counter() - begun
                    )
                )
            ],
        )

    wanted = [(start, targets) for start in arguments.starts for targets in arguments.targets]
    for curve in wanted:
        if len(curves.of(curve)) <= arguments.epochs:
            curves.drop(curve)
            retrain(curve)

    base = top1(original)
    title = f"{arguments.model.stem}, {arguments.cr:.0%} of the parameters removed"
    print(f"\n{title}, top-1 in %; the original: {base:.1f}\n")
    print(curves.to_markdown(wanted, arguments.epochs))
    print(
        f"\n{len(x_test):,} test images; {len(x_train):,} training images an epoch, batches of "
        f"{arguments.batch_size}, SGD {arguments.learning_rate:g} with a cosine to 0"
    )
    if arguments.plot:
        curves.plot(arguments.plot, wanted, base, title)


if __name__ == "__main__":
    main()

"""The low-rank bias of SGD: ranks over time by weight decay and batch size, then compression.

A small dense network learns scikit-learn's digits (as `digits.py`) with plain SGD, once for every
weight decay and batch size, full batches too. All trainings take the same number of steps.
`RankMonitor` measures the ranks. Then each network is compressed, without retraining.

    python examples/low_rank_bias.py
    python examples/low_rank_bias.py --weight-decays 0 0.002 --batch-sizes 8 full --seeds 3

Claim: Galanti, Siegel, Gupte and Poggio, "SGD and Weight Decay Secretly Compress Your Neural
Network", arXiv:2206.05794: weight decay, small batches and large learning rates lower the rank.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages

import keras
import matplotlib as mpl
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_alds

mpl.use("Agg")
from matplotlib import pyplot as plt

CRS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
FULL = "full"
#: The size of most batches; a full batch is one of all images.
Batch = int | str
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weight-decays", type=float, nargs="+", default=[0.0, 1e-3, 5e-3])
    add("--batch-sizes", type=batch_size, nargs="+", default=[4, 32, FULL], help="or: full")
    add("--learning-rate", type=float, default=0.1, help="constant (default: 0.1)")
    add("--steps", type=int, default=20_000, help="of each training (default: 20000)")
    add("--points", type=int, default=40, help="measurements of each training (default: 40)")
    add("--width", type=int, default=128, help="of the three hidden layers (default: 128)")
    add("--seeds", type=int, default=1, help="trainings of each kind (default: 1)")
    add("--output", type=Path, default=Path("runs/low_rank_bias"), help="folder")
    return parser.parse_args()


def batch_size(text: str) -> Batch:
    return text if text == FULL else int(text)


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    digits = load_digits()
    images = (digits.data / 16).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    return x_train, y_train, x_test, y_test


def batches(x: np.ndarray, y: np.ndarray, size: Batch, seed: int) -> tf.data.Dataset:
    if size == FULL:
        return tf.data.Dataset.from_tensors((x, y)).repeat()
    images = tf.data.Dataset.from_tensor_slices((x, y)).cache().shuffle(len(x), seed=seed)
    return images.repeat().batch(size)


def build_model(width: int, learning_rate: float, weight_decay: float, at_once: int) -> Any:
    layers = [keras.layers.Dense(width, "relu", name=f"hidden_{n}") for n in (1, 2, 3)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10, name="scores")])
    model.compile(
        # w ← w − rate · (gradient + weight_decay · w): without momentum, the same as an L2 loss.
        keras.optimizers.SGD(learning_rate, weight_decay=weight_decay or None),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=at_once,
    )
    return model


def train(arguments: argparse.Namespace, decay: float, size: Batch, seed: int) -> Row:
    """Trains one network and compresses it; what was measured."""
    start = time.perf_counter()
    keras.utils.set_random_seed(seed)
    x_train, y_train, x_test, y_test = load_data()
    between = max(1, arguments.steps // arguments.points)
    model = build_model(arguments.width, arguments.learning_rate, decay, between)
    history = model.fit(
        batches(x_train, y_train, size, seed),
        steps_per_epoch=between,
        epochs=arguments.steps // between,
        callbacks=[keras_alds.RankMonitor()],
        shuffle=False,
        verbose=0,
    ).history
    loss, _ = model.evaluate(x_train, y_train, verbose=0)
    test_loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
    after = {}
    for cr in CRS:
        small = keras_alds.compress(model, cr, method="energy", max_slices=1)
        after[cr] = float((np.asarray(small(x_test)).argmax(-1) == y_test).mean())
    return {
        "weight decay": decay,
        "batch": size,
        "seed": seed,
        "loss": loss,
        "held-out loss": test_loss,
        "accuracy": accuracy,
        "after": after,
        "steps": [between * (n + 1) for n in range(len(history["loss"]))],
        "ranks": history["alds_effective_rank"],
        "stable": history["alds_stable_rank"][-1],
        "seconds": time.perf_counter() - start,
    }


def draw(rows: list[Row], arguments: argparse.Namespace, path: Path) -> None:
    sizes, decays = arguments.batch_sizes, arguments.weight_decays
    figure, axes = plt.subplots(
        2, len(sizes), figsize=(3 * len(sizes) + 0.5, 5.4), sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(decays)))
    for (upper, lower), size in zip(axes.T, sizes, strict=True):
        for row in (row for row in rows if row["batch"] == size):
            index = decays.index(row["weight decay"])
            label = None if row["seed"] else f"weight decay {decays[index]:g}"
            style = {"color": colours[index], "alpha": 0.4 if row["seed"] else 1}
            upper.plot(row["steps"], row["ranks"], **style)
            points = {0.0: row["accuracy"], **row["after"]}
            lower.plot(points.keys(), points.values(), marker=".", label=label, **style)
        upper.set_title("full batches" if size == FULL else f"batches of {size}")
        upper.set(xlabel="steps", ylim=(0, 1))
        lower.set(xlabel="fraction of the parameters removed", ylim=(0, 1))
        upper.locator_params(axis="x", nbins=4)
        for ax in (upper, lower):
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("effective rank / full rank")
    axes[1, 0].set_ylabel("held-out accuracy,\nnot retrained")
    axes[1, 0].legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["weight_decay", "batch", "seed", "step", "effective_rank"])
        for row in rows:
            for step, rank in zip(row["steps"], row["ranks"], strict=True):
                writer.writerow([row["weight decay"], row["batch"], row["seed"], step, rank])


def print_table(rows: list[Row]) -> None:
    """A Markdown table; the mean over the seeds."""
    crs = (0.7, 0.8, 0.9)
    columns = ["weight decay", "batch", "loss", "held-out loss", "effective rank", "stable rank"]
    columns += ["accuracy, %", *(f"at cr {cr:g}" for cr in crs)]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    kinds: dict[tuple[float, Batch], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["weight decay"], row["batch"]), []).append(row)
    for (decay, size), some in kinds.items():
        mean = {
            name: np.mean([row[name] for row in some])
            for name in ("loss", "held-out loss", "stable", "accuracy")
        }
        rank = np.mean([row["ranks"][-1] for row in some])
        after = [100 * np.mean([row["after"][cr] for row in some]) for cr in crs]
        cells = [f"{decay:g}", f"{size}", f"{mean['loss']:.4f}", f"{mean['held-out loss']:.3f}"]
        cells += [f"{rank:.2f}", f"{mean['stable']:.2f}", f"{100 * mean['accuracy']:.1f}"]
        print(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in after)])} |")


def main() -> None:
    arguments = parse_arguments()
    tf.get_logger().setLevel("ERROR")  # every network has a graph of its own
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for decay in arguments.weight_decays:
        for size in arguments.batch_sizes:
            for seed in range(arguments.seeds):
                rows.append(train(arguments, decay, size, seed))
                seconds = rows[-1]["seconds"]
                print(f"weight decay {decay:g}, batch {size}, seed {seed}: {seconds:.0f} s")
    print()
    print_table(rows)
    write(rows, arguments.output / "ranks.csv")
    draw(rows, arguments, arguments.output / "low_rank_bias.png")
    print(
        f"\nRanks are means over the layers, each divided by its full rank. {len(rows)} trainings"
    )


if __name__ == "__main__":
    main()

"""The main job in a minute: train a small CNN, compress it inside `fit`, retrain, compare.

Data: scikit-learn's digits, 1,797 grey images of 8×8 pixels (UCI Optical Recognition of
Handwritten Digits), which ship with scikit-learn; every fourth image is held out.

    python examples/digits.py
    python examples/digits.py --cr 0.8 --epochs 60 --at-epoch 40 --keras tf_keras
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages

import matplotlib as mpl
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_alds

mpl.use("Agg")
from matplotlib import pyplot as plt

LEARNING_RATE = 2e-3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30, help="epochs in all (default: 30)")
    parser.add_argument(
        "--at-epoch", type=int, default=18, help="compress before this epoch index (default: 18)"
    )
    parser.add_argument(
        "--cr", type=float, default=0.75, help="fraction of parameters to remove (default: 0.75)"
    )
    parser.add_argument("--method", default="alds", help='"alds" (default) or "energy"')
    parser.add_argument(
        "--output", type=Path, default=Path("runs/digits"), help="folder (default: runs/digits)"
    )
    parser.add_argument("--keras", choices=("keras", "tf_keras"), default="keras")
    arguments = parser.parse_args()
    if not 0 < arguments.at_epoch < arguments.epochs:
        parser.error(
            "expected 0 < --at-epoch < --epochs, so that there is something to compress and "
            f"time to retrain. Received: {arguments.at_epoch} and {arguments.epochs}"
        )
    return arguments


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    digits = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    return x_train, y_train, x_test, y_test


def build_model(keras: Any) -> Any:
    layers = keras.layers

    def convolution(filters: int) -> list[Any]:
        return [
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),  # epochs are short
            layers.ReLU(),
        ]

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *convolution(32),
            *convolution(64),
            layers.MaxPooling2D(),
            *convolution(96),
            *convolution(128),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(10),
        ],
        name="digits_cnn",
    )


def rewound_cosine(epochs: int, at_epoch: int) -> Any:
    """The learning rate of an epoch: a cosine, whose end is run again after the compression."""

    def rate(epoch: int) -> float:
        # Learning-rate rewinding: the r epochs of retraining repeat the last r before them.
        position = epoch if epoch < at_epoch else max(epoch - (epochs - at_epoch), 0)
        return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * position / at_epoch))

    return rate


def monitor(keras: Any, progress: Progress, epochs: int) -> Any:
    """A callback that shows one bar for all epochs and keeps the seconds that each took."""

    class Monitor(keras.callbacks.Callback):
        def on_train_begin(self, logs: dict | None = None) -> None:
            self.seconds: list[float] = []
            self.task = progress.add_task("training", total=epochs)

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            self.end = time.perf_counter()  # before validation

        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            self.seconds.append(self.end - self.start)
            figures = f"held-out accuracy {logs['val_accuracy']:.4f}"
            progress.update(self.task, advance=1, description=figures)

    return Monitor()


def predict_seconds(model: Any, x: np.ndarray) -> float:
    """Median seconds of five predictions; one comes before, since it compiles."""
    model.predict(x, batch_size=128, verbose=0)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        model.predict(x, batch_size=128, verbose=0)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def draw(history: dict[str, list[float]], at_epoch: int, cr: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    epochs = range(1, len(history["accuracy"]) + 1)
    axes.plot(epochs, history["accuracy"], label="training images", color="tab:gray")
    axes.plot(epochs, history["val_accuracy"], label="held-out images", color="tab:blue")
    axes.axvline(at_epoch + 0.5, color="tab:red", linestyle="--")
    axes.annotate(
        f"{cr:.0%} of the\nparameters removed",
        (at_epoch + 0.5, 0.4),
        xytext=(-6, 0),
        ha="right",
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color="tab:red",
    )
    lowest = min(history["val_accuracy"][1:] + history["accuracy"][1:])
    axes.set(xlabel="epochs", ylabel="accuracy", ylim=(max(0.0, lowest - 0.03), 1.005))
    axes.set_title("Digits: accuracy in one `fit`, compressed on the way")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_history(history: dict[str, list[float]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *history])
        writer.writerows([n, *row] for n, row in enumerate(zip(*history.values(), strict=True)))


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    keras = importlib.import_module(arguments.keras)
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    epochs, at_epoch, output = arguments.epochs, arguments.at_epoch, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    dense_file, small_file = output / "dense.keras", output / "compressed.keras"

    x_train, y_train, x_test, y_test = load_data()
    model = build_model(keras)
    model.compile(
        optimizer=keras.optimizers.Adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    def keep_dense_model(epoch: int, logs: dict | None = None) -> None:
        if epoch == at_epoch:
            model.save(dense_file)

    console = Console()
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        clock = monitor(keras, progress, epochs)
        alds = keras_alds.ALDSCompress(cr=arguments.cr, at_epoch=at_epoch, method=arguments.method)
        history = model.fit(
            x_train,
            y_train,
            batch_size=64,
            epochs=epochs,
            validation_data=(x_test, y_test),
            callbacks=[
                keras.callbacks.LearningRateScheduler(rewound_cosine(epochs, at_epoch)),
                keras.callbacks.LambdaCallback(on_epoch_begin=keep_dense_model),
                alds,  # the one line that compresses
                clock,
            ],
            # One line an epoch where no bar can be drawn.
            verbose=0 if console.is_terminal else 2,
        ).history
    model.save(small_file)
    alds.plan.save(output / "plan.json")
    write_history(history, output / "history.csv")
    draw(history, at_epoch, alds.plan.cr, output / "accuracy.png")

    dense = keras.models.load_model(dense_file)
    accuracy_before = dense.evaluate(x_test, y_test, verbose=0)[1]
    not_retrained = keras_alds.compress(dense, plan=alds.plan)
    loaded = keras.models.load_model(small_file)
    accuracy_after = loaded.evaluate(x_test, y_test, verbose=0)[1]
    np.testing.assert_array_equal(
        model.predict(x_test, verbose=0), loaded.predict(x_test, verbose=0)
    )

    alds.plan.summary()
    print()
    keras_alds.report(
        dense,
        loaded,
        {
            "held-out accuracy, not retrained": (
                accuracy_before,
                not_retrained.evaluate(x_test, y_test, verbose=0)[1],
            ),
            "held-out accuracy": (accuracy_before, accuracy_after),
            "file with optimizer, bytes": (dense_file.stat().st_size, small_file.stat().st_size),
            "seconds per training epoch": (
                statistics.median(clock.seconds[:at_epoch]),
                statistics.median(clock.seconds[at_epoch:]),
            ),
            f"seconds to predict {len(x_test)} images": (
                predict_seconds(dense, x_test),
                predict_seconds(loaded, x_test),
            ),
        },
    ).summary()
    print(
        f"\nSaved in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}. "
        f"compressed.keras was loaded again and predicts the same.\n"
        f"{time.perf_counter() - started:.0f} seconds in all."
    )


if __name__ == "__main__":
    main()

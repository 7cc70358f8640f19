"""`keras_alds demo`: train a small CNN, compress it inside `fit`, retrain, compare.

Data: scikit-learn's digits, 1,797 grey images of 8×8 pixels (UCI Optical Recognition of
Handwritten Digits), which ship with scikit-learn; every fourth image is held out.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from keras_alds.cli.answers import Answer
from keras_alds.cli.models import LOADERS
from keras_alds.cli.outputs import add_output
from keras_alds.extras import imported, matplotlib
from keras_alds.progress import progress_bar

USAGE = "[options]"
EXAMPLES = """
keras_alds demo
keras_alds demo --cr 0.8 --epochs 60 --at-epoch 40 --keras tf_keras --force
"""
LEARNING_RATE = 2e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Trains a small CNN on scikit-learn's digits, compresses it inside `fit`, goes on "
        "training, and compares. Nothing is downloaded. Takes half a minute on two CPU cores."
    )
    add = parser.add_argument
    add("--epochs", type=int, default=30, help="epochs in all (default: 30)")
    add("--at-epoch", type=int, default=18, help="compress before this epoch index (default: 18)")
    add("--cr", type=float, default=0.75, help="fraction of parameters to remove (default: 0.75)")
    add("--method", default="alds", help='"alds" (default) or "energy"')
    add("--keras", choices=LOADERS, default=LOADERS[0], help="default: keras")
    default = Path("runs/digits")
    help = f"folder to write to (default: {default.as_posix()})"
    add_output(parser, "-o", "--output", endings=(), default=default, help=help)


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    if not 0 < arguments.at_epoch < arguments.epochs:
        raise ValueError(
            "Expected 0 < --at-epoch < --epochs, so that there is something to compress and time "
            f"to retrain. Received: {arguments.at_epoch} and {arguments.epochs}"
        )
    matplotlib("figure")
    from keras_alds._backend.training import repeatable

    started = time.perf_counter()
    keras = importlib.import_module(arguments.keras)
    data = load_data()
    repeatable(keras)
    output = arguments.outputs.path("output")
    output.mkdir()
    seconds, alds, history = train(keras, arguments, data, output)
    alds.plan.save(output / "plan.json")
    write_history(history, output / "history.csv")
    draw(history, arguments.at_epoch, alds.plan.cr, output / "accuracy.png")
    comparison = compared(keras, arguments, data, output, seconds, alds.plan)
    document = {"figures": comparison.rows, "plan": alds.plan.to_dict()}
    names = ", ".join(sorted(path.name for path in output.iterdir()))

    def show() -> None:
        alds.plan.summary()
        print()
        comparison.summary()
        print(
            f"\n{names}: compressed.keras was loaded again and predicts the same.\n"
            f"{time.perf_counter() - started:.0f} seconds in all."
        )

    return Answer(document, show)


def load_data() -> tuple[Any, Any, Any, Any]:
    """Images and their classes: to train with, and held out."""
    datasets, selection = (
        imported(f"sklearn.{part}", "the demo", '"keras_alds[demo]"')
        for part in ("datasets", "model_selection")
    )
    digits = datasets.load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype("float32")
    x_train, x_test, y_train, y_test = selection.train_test_split(
        images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    return x_train, y_train, x_test, y_test


def build_model(keras: Any) -> Any:
    """A small CNN."""
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


def train(
    keras: Any, arguments: argparse.Namespace, data: tuple[Any, Any, Any, Any], output: Path
) -> tuple[list[float], Any, dict[str, list[float]]]:
    """Trains, and compresses on the way; returns seconds of epochs, the callback, the history."""
    from keras_alds.callbacks import ALDSCompress

    x_train, y_train, x_test, y_test = data
    epochs, at_epoch = arguments.epochs, arguments.at_epoch
    model = build_model(keras)
    model.compile(
        optimizer=keras.optimizers.Adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    def keep_dense_model(epoch: int, logs: dict | None = None) -> None:
        if epoch == at_epoch:
            model.save(output / "dense.keras")

    with progress_bar(verbose=1) as progress:
        clock = monitor(keras, progress, epochs)
        alds = ALDSCompress(cr=arguments.cr, at_epoch=at_epoch, method=arguments.method)
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
            verbose=0 if progress.console.is_terminal else 2,
        ).history
    model.save(output / "compressed.keras")
    loaded = keras.models.load_model(output / "compressed.keras")
    np.testing.assert_array_equal(
        model.predict(x_test, verbose=0), loaded.predict(x_test, verbose=0)
    )
    return clock.seconds, alds, history


def monitor(keras: Any, progress: Any, epochs: int) -> Any:
    """A callback that shows one bar for all epochs and keeps the seconds that each took."""

    class Monitor(keras.callbacks.Callback):
        def on_train_begin(self, logs: dict | None = None) -> None:
            self.seconds: list[float] = []
            self.task = progress.add_task("training", total=epochs)

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            self.end = time.perf_counter()  # before validation

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.seconds.append(self.end - self.start)
            figures = f"held-out accuracy {logs['val_accuracy']:.4f}"
            progress.update(self.task, advance=1, description=figures)

    return Monitor()


def compared(
    keras: Any,
    arguments: argparse.Namespace,
    data: tuple[Any, Any, Any, Any],
    output: Path,
    seconds: list[float],
    plan: Any,
) -> Any:
    """The figures before and after."""
    from keras_alds.api import compress
    from keras_alds.reports import report

    x, y = data[2:]
    dense_file, small_file = output / "dense.keras", output / "compressed.keras"
    dense, small = map(keras.models.load_model, (dense_file, small_file))
    before, not_retrained, after = (
        model.evaluate(x, y, verbose=0)[1] for model in (dense, compress(dense, plan=plan), small)
    )
    figures = {
        "held-out accuracy, not retrained": (before, not_retrained),
        "held-out accuracy": (before, after),
        "file with optimizer, bytes": (dense_file.stat().st_size, small_file.stat().st_size),
        "seconds per training epoch": (
            statistics.median(seconds[: arguments.at_epoch]),
            statistics.median(seconds[arguments.at_epoch :]),
        ),
        f"seconds to predict {len(x)} images": (
            predict_seconds(dense, x),
            predict_seconds(small, x),
        ),
    }
    return report(dense, small, figures)


def predict_seconds(model: Any, x: Any) -> float:
    """Median seconds of five predictions; one comes before, since it compiles."""
    model.predict(x, batch_size=128, verbose=0)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        model.predict(x, batch_size=128, verbose=0)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def draw(history: dict[str, list[float]], at_epoch: int, cr: float, path: Path) -> None:
    """Draws the accuracy over the epochs."""
    figure = matplotlib("figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
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


def write_history(history: dict[str, list[float]], path: Path) -> None:
    """Writes the history as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *history])
        writer.writerows([n, *row] for n, row in enumerate(zip(*history.values(), strict=True)))

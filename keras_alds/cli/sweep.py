"""`keras_alds sweep`: methods × ratios as tables and a plot, for an image classifier."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_alds.cli.answers import Answer
from keras_alds.cli.data import add_scale, load_arrays
from keras_alds.cli.models import add_model, read_model
from keras_alds.cli.outputs import add_output
from keras_alds.extras import matplotlib
from keras_alds.methods import METHODS
from keras_alds.options import add_flags, flags

USAGE = "MODEL --data FILE [options]"
EXAMPLES = """
keras_alds sweep model.keras --data images.npz --methods energy alds --plot sweep.png
keras_alds sweep model.keras --data images.npz --crs 0.5 0.7 --test 1000 --epochs 3 --csv sweep.csv
"""
OPTIONS = ("objective", "exclude", "max_slices", "latency_table", "quantize", "schemes")


PICTURES = (".png", ".svg", ".pdf", ".jpg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Compresses an image classifier by every method to every ratio, and prints the top-1 "
        "accuracy in % as Markdown. The .npz file holds x_test and y_test. Calibration also needs "
        "x_train, and retraining x_train and y_train. Pixels are only scaled by --scale."
    )
    add_model(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, help=".npz file of images and labels")
    add_scale(parser)
    add("--methods", nargs="+", choices=list(METHODS), help="default: all")
    add("--crs", type=float, nargs="+", help="fractions to remove (default: 0.2 to 0.7)")
    add_flags(parser, OPTIONS)
    add("--calibration", type=int, default=512, help="unlabelled x_train (default: 512; 0: none)")
    add("--test", type=int, help="images to test with (default: all)")
    add("--epochs", type=int, default=0, help="epochs of retraining (default: 0, none)")
    add("--train", type=int, help="images to retrain with (default: all)")
    add(
        "--learning-rates",
        type=float,
        nargs="+",
        default=(0.01, 0.001),
        help="learning rates of the last training epochs, in order. Retraining repeats them "
        "(learning-rate rewinding), each for an equal part of --epochs (default: 0.01 0.001)",
    )
    add("--batch-size", type=int, default=128, help="images in a batch of retraining")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="crops and flips")
    add_output(parser, "--csv", endings=(".csv",), help="write all figures to this file")
    add_output(parser, "--markdown", endings=(".md",), help="write the tables to this file")
    add_output(parser, "--plot", endings=PICTURES, help="write the plot to this picture")


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    from keras_alds.research.sweeping import DEFAULT_CRS, sweep

    if arguments.epochs < 0 or arguments.calibration < 0:
        raise ValueError(
            "Expected --epochs and --calibration to be 0 or more. "
            f"Received: {arguments.epochs} and {arguments.calibration}"
        )
    if arguments.plot is not None:
        matplotlib("figure")
    model = read_model(arguments)
    x_test, y_test = read_images(arguments, "test", arguments.test)
    logits = scores(model, x_test[:64])
    from_logits = bool((logits < 0).any() or not np.allclose(logits.sum(-1), 1, atol=1e-3))
    calibration = retrain = None
    methods = [METHODS[name] for name in arguments.methods or METHODS]
    if arguments.calibration and any(m.needs_data or m.takes_data for m in methods):
        calibration, _ = read_images(arguments, "train", arguments.calibration, labels=False)
    trained = 0
    if arguments.epochs:
        x_train, y_train = read_images(arguments, "train", arguments.train)
        trained = len(x_train)
        retrain = _retrainer(arguments, x_train, y_train, from_logits)
    result = sweep(
        model,
        lambda candidate: 100 * float(np.mean(scores(candidate, x_test).argmax(-1) == y_test)),
        methods=arguments.methods,
        crs=arguments.crs or DEFAULT_CRS,
        calibration_data=calibration,
        retrain=retrain,
        **flags(arguments, OPTIONS),
    )
    return _write(result, arguments, len(x_test), trained)


def _write(result: Any, arguments: argparse.Namespace, images: int, trained: int) -> Answer:
    text = f"No retraining, top-1 in %, {images:,} images:\n\n{result.to_markdown()}\n"
    if arguments.epochs:
        text += (
            f"\nAfter {arguments.epochs} epoch{'s' * (arguments.epochs > 1)} of {trained:,} images:"
            f"\n\n{result.to_markdown(retrained=True)}\n"
        )
    outputs = arguments.outputs
    if (path := outputs.path("csv")) is not None:
        result.to_csv(path)
    if (path := outputs.path("markdown")) is not None:
        path.write_text(text, encoding="utf-8")
    if (path := outputs.path("plot")) is not None:
        result.plot(path, label="top-1 accuracy, %")
    rows = [dataclasses.asdict(row) for row in result.rows]
    return Answer({"rows": rows, "images": images}, lambda: print(text, end=""))


def _retrainer(
    arguments: argparse.Namespace, x: Any, y: Any, from_logits: bool
) -> Callable[[Any], None]:
    from keras_alds.research.retraining import retrainer

    return retrainer(
        x,
        y,
        learning_rates=arguments.learning_rates,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        augment=arguments.augment,
        from_logits=from_logits,
    )


def read_images(
    arguments: argparse.Namespace, part: str, limit: int | None, *, labels: bool = True
) -> tuple[Any, Any]:
    """Images in float32 and their classes (None without `labels`) from the .npz file."""
    images, classes = f"x_{part}", f"y_{part}"
    names = (images, classes) if labels else (images,)
    arrays = load_arrays(arguments.data, names)
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(
            f"Expected {arguments.data} to hold {' and '.join(names)}. Received: no "
            + " and no ".join(missing)
        )
    x = arrays[images][:limit].astype("float32") * arguments.scale
    if not labels:
        return x, None
    y = arrays[classes]
    if y.size != len(arrays[images]):
        raise ValueError(
            f"Expected one class, a number, for each image in {images}. "
            f"Received: {classes} of shape {y.shape} for {len(arrays[images])} images"
        )
    return x, y.reshape(-1)[:limit]


def scores(model: Any, x: Any) -> Any:
    """The class scores of a classifier, `[n, classes]`."""
    outputs = model.predict(x, batch_size=250, verbose=0)
    if not isinstance(outputs, np.ndarray) or outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(
            "Expected a classifier with one score for each class. Received: outputs of shape "
            f"{getattr(outputs, 'shape', type(outputs).__name__)}. Use `keras_alds.sweep` with "
            "your own `evaluate`."
        )
    return outputs

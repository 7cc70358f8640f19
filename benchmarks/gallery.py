"""Draws the pictures of docs/gallery.md from a trained network.

    python benchmarks/gallery.py --model resnet20.keras --data cifar10.npz --output docs/images

`--pictures` chooses some of them; `latency` and `singular_values` have to be asked for. The .npz
file holds x_train, x_test and y_test; pixels go into the model as they are. `costs`, `ranks`,
`latency`, `size_error` and `singular_values` need no data.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

import keras_alds
from keras_alds import plots

COLOURS = 64  # of a picture, for small files
WIDTH = 5.6  # inches: readable on a phone


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained Keras 3 classifier, .keras or .h5")
    add("--data", type=Path, help=".npz file of images and labels")
    add("--output", type=Path, required=True, help="folder for the pictures")
    add("--cr", type=float, default=0.5, help="fraction to remove (default: 0.5)")
    add("--images", type=int, default=512, help="images for calibration (default: 512)")
    add("--test", type=int, default=1000, help="images for scores (default: 1,000)")
    add("--pictures", nargs="+", choices=PICTURES, default=PICTURES[2:], help="default: most")
    return parser.parse_args()


class Gallery:
    """The pictures of one model; what several of them need is made once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.cr = arguments, arguments.cr
        self.model = keras.models.load_model(arguments.model, compile=False)

    @functools.cached_property
    def data(self) -> tuple[Any, Any, Any]:
        """Images to calibrate, and images and labels to test."""
        with np.load(self.arguments.data) as file:
            x = file["x_train"][: self.arguments.images].astype("float32")
            x_test = file["x_test"][: self.arguments.test].astype("float32")
            return x, x_test, file["y_test"][: self.arguments.test].reshape(-1)

    @functools.cached_property
    def stats(self) -> Any:
        """Statistics of the calibration images."""
        return keras_alds.CalibrationStats.collect(self.model, self.data[0])

    @functools.cached_property
    def plan(self) -> Any:
        """A plan by data, which does not look at the outputs of whole plans."""
        return self.select(method="activation", calibration_data=self.stats)

    def select(self, **options: Any) -> Any:
        """A plan of the model."""
        return keras_alds.select(self.model, self.cr, **options)

    def accuracy(self, model: Any) -> float:
        """Top-1 on the test images in %."""
        _, x, y = self.data
        return 100 * float((model.predict(x, batch_size=250, verbose=0).argmax(-1) == y).mean())

    def costs(self) -> Any:
        """Where the parameters go."""
        return plots.costs(self.select(method="energy"))

    def ranks(self) -> Any:
        """Ranks and slices, up to four slices."""
        return plots.ranks(self.select(method="energy", target="size", max_slices=4))

    def latency(self) -> Any:
        """Where the measured latency goes."""
        return plots.costs(self.select(objective="latency"), most=12)

    def size_error(self) -> Any:
        """The choices that layers have, and what the paper's method takes."""
        plan = self.select(method="alds", target="size")
        return plots.size_error(self.model, plan)

    def singular_values(self) -> Any:
        """How fast the singular values fall."""
        return plots.singular_values(self.model)

    def scores(self) -> Any:
        """Methods by accuracy and size, without retraining."""
        methods = ["activation", "synthetic", "energy", "alds", "svd"]
        result = keras_alds.sweep(
            self.model, self.accuracy, methods=methods, calibration_data=self.stats
        )
        return plots.scores(result, label=f"top-1, %, of {len(self.data[1]):,} images")

    def sensitivity(self) -> Any:
        """What each layer alone does to the outputs."""
        result = keras_alds.sensitivity(self.model, self.stats)
        return plots.sensitivity(result)

    def output_errors(self) -> Any:
        """What the compression did to the outputs of layers."""
        small = keras_alds.compress(self.model, plan=self.plan, calibration_data=self.stats)
        return plots.output_errors(self.model, small, self.data[1][:256], plan=self.plan)

    def dark(self) -> Any:
        """Two pictures on axes of a user's own."""
        with plt.style.context("dark_background"):
            _, axes = plt.subplots(2, 1, figsize=(WIDTH, 7.6), layout="constrained")
            plots.singular_values(self.model, ax=axes[0])
            plots.costs(self.plan, most=12, ax=axes[1])
        return axes[0]


PICTURES = (
    *("latency", "singular_values", "costs", "ranks", "size_error", "scores", "sensitivity"),
    *("output_errors", "dark"),
)


def save(ax: Any, path: Path) -> None:
    """Writes a picture of few colours."""
    ax.figure.set_figwidth(WIDTH)
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", dpi=110)
    Image.open(buffer).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    gallery = Gallery(arguments)
    for name in arguments.pictures:
        save(getattr(gallery, name)(), arguments.output / f"{arguments.model.stem}_{name}.png")


if __name__ == "__main__":
    main()

"""Activation-aware compression: accuracy without retraining, seconds, and peak memory.

    python benchmarks/calibration.py --model resnet20.keras --data cifar10.npz --images 512

prints a Markdown table of top-1 for every ratio, with no data (methods `"alds"` and `"energy"`) and
with unlabelled training images, and what the statistics took. `--csv` writes the figures.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras
import numpy as np
from rich.progress import Progress

import keras_alds
from keras_alds.models.calibration import CalibrationStats


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained Keras 3 model, .keras or .h5")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--images", type=int, default=512, help="unlabelled training images (default: 512)")
    add("--crs", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    add("--max-slices", type=int, help="largest number of slices (default: no limit)")
    add("--target", default="size", help="what the plans are for (default: size)")
    add("--scale", type=float, default=1.0, help="multiply the pixels by this (default: 1)")
    add("--csv", type=Path, help="write the figures here")
    return parser.parse_args()


def peak_memory() -> float:
    """The most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    arguments = parse_arguments()
    x_train, _, x_test, y_test = cifar10.load_data(arguments.data, keras, arguments.scale, None)
    x_train = x_train[: arguments.images]
    original = cifar10.load_model(arguments.model, keras)

    def accuracy(model: Any) -> float:
        scores = model.predict(x_test, batch_size=250, verbose=0)
        return 100 * float(np.mean(scores.argmax(-1) == y_test))

    base, before = accuracy(original), peak_memory()
    start = time.perf_counter()
    stats = CalibrationStats.collect(original, x_train, max_examples=None)
    collected, after = time.perf_counter() - start, peak_memory()

    columns = {
        "alds, no data": {"method": "alds"},
        "energy, no data": {"method": "energy"},
        "activation, at once": {"calibration_data": stats},
        "activation": {"calibration_data": x_train},
    }
    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("compression", total=len(columns) * len(arguments.crs))
        for name, options in columns.items():
            for cr in arguments.crs:
                start = time.perf_counter()
                row: dict[str, Any] = {"method": name, "cr": cr, "top1": None, "seconds": None}
                try:
                    options = {"target": arguments.target, **options}
                    model = keras_alds.compress(
                        original, cr, max_slices=arguments.max_slices, **options
                    )
                except ValueError as error:
                    progress.console.print(f"{name}, cr={cr}: {error}")
                else:
                    row["seconds"] = time.perf_counter() - start
                    row["top1"] = accuracy(model)
                rows.append(row)
                progress.advance(task)

    print(f"{arguments.model.name}, top-1 in % without retraining; dense: {base:.1f}\n")
    print("| cr | " + " | ".join(f"{cr:g}" for cr in arguments.crs) + " |")
    print("|---|" + "---|" * len(arguments.crs))
    for name in columns:
        figures = [row["top1"] for row in rows if row["method"] == name]
        cells = ["–" if figure is None else f"{figure:.1f}" for figure in figures]
        print(f"| {name} | " + " | ".join(cells) + " |")
    at_once, sequential = (
        max(row["seconds"] or 0 for row in rows if row["method"] == name)
        for name in list(columns)[-2:]
    )
    print(
        f"\n{len(x_test):,} test images; statistics of {stats.examples} images in "
        f"{collected:.1f} s, peak memory {before:.0f} → {after:.0f} MB; selecting and factorizing "
        f"afterwards: at most {at_once:.1f} s at once; layer after layer, statistics included, at "
        f"most {sequential:.1f} s"
    )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

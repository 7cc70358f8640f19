"""Accuracy against speed: plans for common CPUs, the default, plans for size alone, other methods.

    python benchmarks/forms.py resnet20.keras resnet8.h5 vgglike.keras --data cifar10.npz

    python benchmarks/forms.py resnet20.keras resnet8.h5 vgglike.keras --data cifar10.npz
        --limits params=0.3 params=0.5 params=0.7 macs=0.5 --methods tucker cp svd pca

sets tensor decompositions beside them, and the SVD of whole kernels.

Plans and factors come from 512 unlabelled training images. Prints top-1 with no retraining, with
`--refine` also after refinement, and the latency of float and int8 files with LiteRT on one thread.
Latencies are relative to the original's, measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras

import keras_alds
from keras_alds.litert import convert
from keras_alds.litert.timing import time_files
from keras_alds.methods import METHODS

LIMITS = ("params=0.5", "params=0.6", "params=0.7", "macs=0.3", "macs=0.5")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("models", type=Path, nargs="+", help="trained Keras 3 models, .keras or .h5")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--images", type=int, default=512, help="unlabelled images; 0 for none (default: 512)")
    add("--limits", nargs="+", default=LIMITS, help="what to remove, such as macs=0.5")
    add("--targets", nargs="+", default=["cpu", "size"], help="what the plans are for")
    add("--methods", nargs="+", default=[], choices=METHODS, help="other methods, for size alone")
    add("--refine", action="store_true", help="also refine every model")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    x_train, _, x_test, y_test = cifar10.load_data(arguments.data, keras, 1.0, None)
    x = x_train[: arguments.images]
    data: dict[str, Any] = {"calibration_data": x} if arguments.images else {}
    formats: dict[str, dict[str, Any]] = {
        "float": {},
        "int8": {"quantize": "int8", "representative_data": x_train[:128]},
    }

    def accuracy(model: Any) -> float:
        return 100 * float((model.predict(x_test, verbose=0).argmax(-1) == y_test).mean())

    def files(model: Any) -> list[Any]:
        found = [convert(model, verbose=0, **options) for options in formats.values()]
        return [lambda content=content: content for content in found]

    forms = {name: {"target": name, **data} for name in arguments.targets}
    for name in arguments.methods:
        method = METHODS[name]
        forms[name] = {"method": name, **(data if method.needs_data or method.takes_data else {})}

    print("| model | removed | form | top-1 | refined | float | int8 |")
    print("|---|---|---|---|---|---|---|")
    for path in arguments.models:
        original = cifar10.load_model(path, keras)
        rows, content = [], [files(original)]
        print(f"| {path.stem} | – | – | {accuracy(original):.1f} | – | 1 | 1 |", flush=True)
        for limit in arguments.limits:
            objective, cr = limit.split("=")
            for name, options in forms.items():
                small = keras_alds.compress(original, float(cr), objective=objective, **options)
                top1, refined = f"{accuracy(small):.1f}", "–"
                content.append(files(small))
                if arguments.refine:
                    keras_alds.refine(small, original, x, verbose=0)
                    refined = f"{accuracy(small):.1f}"
                rows.append(f"| {path.stem} | {limit} | `{name}` | {top1} | {refined} |")
        times = [time_files(column) for column in zip(*content, strict=True)]
        for n, row in enumerate(rows, start=1):
            print(
                row, " | ".join(f"{column[n] / column[0]:.2f}" for column in times), "|", flush=True
            )


if __name__ == "__main__":
    main()

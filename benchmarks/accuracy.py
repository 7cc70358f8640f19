"""Accuracy against the fraction removed, for every error measure, without and with retraining.

    python benchmarks/accuracy.py --model resnet20.keras --data cifar10.npz --epochs 3 --train 5000

prints a Markdown table, and with `--csv` writes the figures. `--schemes all` puts the choice among
all fold schemes beside each configuration, and what the plans take of the multiply–accumulates:

    python benchmarks/accuracy.py --model resnet20.keras --data cifar10.npz --schemes all
        --configurations "alds, slice" "energy (min–sum)"

Retraining is the example's
(`examples/cifar10.py`): crops and flips, SGD with momentum, a cosine from `--learning-rate`; every
row starts from the same model and sees the same batches. One row is the dense model with the same
further training, to tell what the retraining itself does.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras
from rich.progress import Progress

import keras_alds

CONFIGURATIONS = {
    "alds, slice": {"method": "alds"},
    "alds, bound": {"method": "alds", "error_measure": "bound"},
    "alds, spectral": {"method": "alds", "error_measure": "spectral"},
    "alds, energy": {"method": "alds", "error_measure": "energy"},
    "energy (min–sum)": {"method": "energy"},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained Keras 3 model, .keras or .h5")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--crs", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    add("--epochs", type=int, default=0, help="epochs of retraining (default: 0, none)")
    add("--train", type=int, default=5000, help="training images in an epoch (default: 5000)")
    add("--learning-rate", type=float, default=0.01)
    add("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    add(
        "--schemes", choices=["0", "all"], default="0", help="fold schemes to compare with scheme 0"
    )
    add("--max-slices", type=int, help="largest number of slices (default: no limit)")
    add("--csv", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    x_train, y_train, x_test, y_test = cifar10.load_data(arguments.data, keras, 1.0, None)
    x_train, y_train = x_train[: arguments.train], y_train[: arguments.train]
    original = cifar10.load_model(arguments.model, keras)
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=cifar10.gives_logits(original, x_test)
    )
    steps = arguments.epochs * -(-len(x_train) // 128)

    def compiled(model: Any) -> Any:
        schedule = keras.optimizers.schedules.CosineDecay(arguments.learning_rate, max(steps, 1))
        optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        return model

    def accuracy(model: Any) -> float:
        return 100 * compiled(model).evaluate(x_test, y_test, batch_size=250, verbose=0)[1]

    def retrained(model: Any) -> float | None:
        if not arguments.epochs:
            return None
        keras.utils.set_random_seed(0)
        compiled(model).fit(
            cifar10.batches(x_train, y_train, 128, augment=True),
            epochs=arguments.epochs,
            shuffle=False,
            verbose=0,
        )
        return accuracy(model)

    configurations = {name: CONFIGURATIONS[name] for name in arguments.configurations}
    if arguments.schemes == "all":
        configurations = {
            name + end: {**options, "schemes": schemes}
            for name, options in configurations.items()
            for end, schemes in (("", 0), (", all schemes", "all"))
        }
    macs = keras_alds.count_macs(original)
    rows: list[dict[str, Any]] = []
    work = [(name, cr) for name in configurations for cr in arguments.crs]
    start = time.perf_counter()
    with Progress() as progress:
        task = progress.add_task("accuracy", total=len(work) + 1)
        base = accuracy(original)
        dense = keras.models.clone_model(original)
        dense.set_weights(original.get_weights())
        rows.append(
            {
                "method": "dense",
                "cr": 0.0,
                "at once": base,
                "retrained": retrained(dense),
                "MACs": 1.0,
            }
        )
        progress.advance(task)
        for name, cr in work:
            row: dict[str, Any] = {"method": name, "cr": cr}
            row |= dict.fromkeys(("at once", "retrained", "MACs"))
            try:
                options = {"schemes": 0, "target": "size", **configurations[name]}
                model = keras_alds.compress(
                    original, cr, max_slices=arguments.max_slices, **options
                )
            except ValueError as error:
                progress.console.print(f"{name}, cr={cr}: {error}")
            else:
                row["at once"] = accuracy(model)
                row["MACs"] = keras_alds.count_macs(model) / macs
                row["retrained"] = retrained(model)
            rows.append(row)
            progress.advance(task)

    tables = [("at once", "top-1 in % at once", 1)]
    tables += [("retrained", "top-1 in % retrained", 1)] if arguments.epochs else []
    tables += [("MACs", "MACs that are left", 2)] if arguments.schemes == "all" else []
    for key, title, digits in tables:
        print(f"\n{arguments.model.name}, {title}; dense: {rows[0][key]:.{digits}f}\n")
        print("| cr | " + " | ".join(f"{cr:g}" for cr in arguments.crs) + " |")
        print("|---|" + "---|" * len(arguments.crs))
        for name in configurations:
            figures = [row[key] for row in rows if row["method"] == name]
            cells = ["–" if figure is None else f"{figure:.{digits}f}" for figure in figures]
            print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        f"\n{len(x_test):,} test images; retraining: {arguments.epochs} epochs of "
        f"{len(x_train):,} images; {time.perf_counter() - start:.0f} s"
    )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

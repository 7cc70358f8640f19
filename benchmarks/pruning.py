"""Size of the zipped file against accuracy: compression, pruning, and both in one `fit`.

    python benchmarks/pruning.py                                      # the digits net, from scratch
    python benchmarks/pruning.py --model resnet8.h5 --data cifar10.npz --epochs 6 --at-epoch 2

Every run is one `fit` of a tf_keras model with the same epochs, learning rates and batches. Pruning
is TF-MOT's polynomial schedule from the first step; compression is `ALDSCompress` at
`--at-epoch`. The file is the stripped model as .h5 without optimizer, zipped with gzip. For every
combination the smallest file of either technique alone is sought whose mean accuracy is not below
its own by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras
from rich.progress import Progress

import keras_alds
from keras_alds.cli import demo

DIGITS = {
    "compression": [(0.75, 0), (0.9, 0), (0.95, 0), (0.97, 0), (0.98, 0)],
    "pruning": [(0, 0.75), (0, 0.9), (0, 0.95), (0, 0.97)],
    "both": [(0.75, 0.5), (0.75, 0.8), (0.9, 0.5), (0.9, 0.75), (0.95, 0.3), (0.95, 0.5)],
}
CIFAR10 = {
    "both": [(0.2, 0.5), (0.4, 0.4), (0.2, 0.7)],
    "compression": [(0.2, 0), (0.4, 0), (0.6, 0)],
    "pruning": [(0, 0.4), (0, 0.6), (0, 0.8)],
}


class Task(NamedTuple):
    """What is trained, and on what."""

    build: Callable[[], Any]
    data: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    rates: Callable[[int], float]
    optimizer: Callable[[], Any]
    from_logits: bool
    augment: bool


class Run(NamedTuple):
    """One `fit`."""

    technique: str
    cr: float
    sparsity: float
    seed: int
    accuracy: float
    bytes: int
    lowest: float
    highest: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, help="trained CIFAR-10 model (default: the digits net, untrained)")
    add("--data", type=Path, help=".npz file of CIFAR-10 (default: downloaded)")
    add("--limit", type=int, help="use only so many images for training")
    add("--epochs", type=int, default=24, help="epochs in all (default: 24)")
    add("--at-epoch", type=int, default=12, help="compress before this epoch (default: 12)")
    add("--seeds", type=int, default=3, help="runs of every setting (default: 3)")
    add("--method", default="alds", help="of ALDSCompress (default: alds)")
    add("--tolerance", type=float, default=0.2, help="points of accuracy (default: 0.2)")
    add("--csv", type=Path, help="write every run here, as it ends; runs in it are not repeated")
    return parser.parse_args()


def digits_task(epochs: int, at_epoch: int) -> Task:
    return Task(
        lambda: demo.build_model(tf_keras),
        demo.load_data(),
        demo.rewound_cosine(epochs, at_epoch),
        tf_keras.optimizers.Adam,
        from_logits=True,
        augment=False,
    )


def cifar10_task(path: Path, data: Path | None, limit: int | None, epochs: int) -> Task:
    x_train, y_train, x_test, y_test = cifar10.load_data(data, tf_keras, 1.0, None)
    from_logits = cifar10.gives_logits(cifar10.load_model(path, tf_keras), x_test)
    return Task(
        lambda: cifar10.load_model(path, tf_keras),
        (x_train[:limit], y_train[:limit], x_test, y_test),
        lambda epoch: 0.01 * 0.5 * (1 + np.cos(np.pi * epoch / epochs)),
        lambda: tf_keras.optimizers.SGD(momentum=0.9, nesterov=True),
        from_logits=from_logits,
        augment=True,
    )


def zipped_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
        path = Path(folder) / "model.h5"
        model.save(path, include_optimizer=False)
        return len(gzip.compress(path.read_bytes()))


def run(task: Task, technique: str, cr: float, sparsity: float, seed: int, options: Any) -> Run:
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(seed)
    x_train, y_train, x_test, y_test = task.data
    steps = -(-len(x_train) // 64)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=task.from_logits)
    model = task.build()
    callbacks: list[Any] = [tf_keras.callbacks.LearningRateScheduler(task.rates)]
    if sparsity:
        schedule = tfmot.sparsity.keras.PolynomialDecay(
            0.0, sparsity, 0, int(0.75 * options.epochs * steps), frequency=max(steps // 4, 1)
        )
        model = tfmot.sparsity.keras.prune_low_magnitude(model, schedule)
        callbacks.append(tfmot.sparsity.keras.UpdatePruningStep())
    if cr:
        callbacks.append(
            keras_alds.ALDSCompress(cr, at_epoch=options.at_epoch, method=options.method, verbose=0)
        )
    model.compile(task.optimizer(), loss, metrics=["accuracy"])
    images = cifar10.batches(x_train, y_train, 64, task.augment)
    model.fit(images, epochs=options.epochs, callbacks=callbacks, verbose=0)
    stripped = tfmot.sparsity.keras.strip_pruning(model)
    stripped.compile(loss=loss, metrics=["accuracy"])
    shares = [
        float((weight.numpy() == 0).mean())
        for layer in stripped.layers
        for weight in layer.weights
        if len(weight.shape) > 1
    ]
    accuracy = 100 * stripped.evaluate(x_test, y_test, batch_size=250, verbose=0)[1]
    size = zipped_bytes(stripped)
    return Run(technique, cr, sparsity, seed, accuracy, size, min(shares), max(shares))


def read(path: Path | None) -> list[Run]:
    if path is None or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Run(
                *(
                    kind(value)
                    for kind, value in zip(get_type_hints(Run).values(), row.values(), strict=True)
                )
            )
            for row in csv.DictReader(file)
        ]


def append(path: Path | None, done: Run) -> None:
    if path is not None:
        new = not path.is_file()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows(([Run._fields] if new else []) + [done])


def print_tables(runs: list[Run], tolerance: float) -> None:
    groups: dict[tuple[str, float, float], list[Run]] = {}
    for done in runs:
        groups.setdefault((done.technique, done.cr, done.sparsity), []).append(done)
    mean = {
        key: (np.mean([r.accuracy for r in group]), np.mean([r.bytes for r in group]))
        for key, group in groups.items()
    }
    print("\n| technique | cr | sparsity | zipped file, kB | accuracy, % | zeros in a weight |")
    print("|---|---|---|---|---|---|")
    for key, group in groups.items():
        accuracies = [r.accuracy for r in group]
        low, high = min(r.lowest for r in group), max(r.highest for r in group)
        print(
            f"| {key[0]} | {key[1] or '–'} | {key[2] or '–'} | {mean[key][1] / 1e3:.1f} | "
            f"{mean[key][0]:.2f} ± {np.std(accuracies):.2f} | {low:.3f} to {high:.3f} |"
        )
    print(f"\nSmallest file at no more than {tolerance} points less:\n")
    print("| both (cr, sparsity) | kB | accuracy, % | compression alone | pruning alone |")
    print("|---|---|---|---|---|")
    for key, (accuracy, size) in mean.items():
        if key[0] != "both":
            continue
        cells = []
        for technique in ("compression", "pruning"):
            equal = [
                (other, name)
                for name, (reached, other) in mean.items()
                if name[0] == technique and reached >= accuracy - tolerance
            ]
            best = min(equal, default=None)
            cells.append("none" if best is None else f"{best[0] / 1e3:.1f} kB ({max(best[1][1:])})")
        print(
            f"| {key[1]}, {key[2]} | {size / 1e3:.1f} | {accuracy:.2f} | "
            + " | ".join(cells)
            + " |"
        )


def main() -> None:
    options = parse_arguments()
    if options.model is None:
        task, settings = digits_task(options.epochs, options.at_epoch), DIGITS
    else:
        task = cifar10_task(options.model, options.data, options.limit, options.epochs)
        settings = CIFAR10
    runs = read(options.csv)
    known = {done[:4] for done in runs}
    work = [
        (technique, float(cr), float(sparsity), seed)
        for seed, (technique, pairs) in itertools.product(range(options.seeds), settings.items())
        for cr, sparsity in pairs
    ]
    start = time.perf_counter()
    with Progress() as progress:
        for setting in progress.track([item for item in work if item not in known]):
            done = run(task, *setting, options)
            append(options.csv, done)
            runs.append(done)
    print_tables(runs, options.tolerance)
    print(f"\n{options.seeds} seeds, {options.epochs} epochs; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Times what a compression inside `fit` costs, beside `select` alone.

    python benchmarks/pause.py --networks resnet20 resnet50 --images 0 256

After an epoch from random weights: `select`; the pause, from the beginning of the next epoch to its
first batch; the first step after it, which traces the step function anew; and a usual step.
Seconds, and the pause as a multiple of `select`.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import memory
import numpy as np

import keras_alds

NETWORKS = {
    "resnet20": lambda: (memory.resnet20(), 32),
    "resnet50": lambda: (keras.applications.ResNet50(weights=None, classes=10), 224),
}


class Clock(keras.callbacks.Callback):
    """Seconds of the pause and of each step in the epoch of the compression."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch, self.now, self.pause, self.steps = epoch, -1, 0.0, []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the pause."""
        self.now = epoch
        self.start = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Ends the pause, and starts a step."""
        if self.now == self.epoch and batch == 0:
            self.pause = time.perf_counter() - self.start
        self.step = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Ends a step."""
        if self.now == self.epoch:
            self.steps.append(time.perf_counter() - self.step)


def measure(name: str, images: int) -> list[float]:
    """Seconds of `select`, the pause, the first step and a usual step."""
    model, size = NETWORKS[name]()
    rng = np.random.default_rng(0)
    model.compile("sgd", "sparse_categorical_crossentropy")
    x = rng.standard_normal((8, size, size, 3)).astype("float32")
    y = rng.integers(0, 10, 8)
    data = rng.standard_normal((images, size, size, 3)).astype("float32") if images else None
    options = {"calibration_data": data}
    # What is chosen without data depends on the statistics of BatchNormalization.
    model.fit(x, y, batch_size=2, verbose=0)
    start = time.perf_counter()
    keras_alds.select(model, 0.5, **options)
    select = time.perf_counter() - start
    # The clock is first in the list, so its epoch begins before the compression.
    clock = Clock(epoch=1)
    alds = keras_alds.ALDSCompress(0.5, at_epoch=1, verbose=0, **options)
    model.fit(x, y, batch_size=2, epochs=2, verbose=0, callbacks=[clock, alds])
    return [select, clock.pause, clock.steps[0], float(np.median(clock.steps[1:]))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--images", nargs="+", type=int, default=[0, 256])
    options = parser.parse_args()
    print("| network | images | `select` | pause | pause / `select` | first step | usual step |")
    print("|---|---|---|---|---|---|---|")
    for name in options.networks:
        for images in options.images:
            select, pause, first, usual = measure(name, images)
            row = [f"{select:.2f}", f"{pause:.2f}", f"{pause / select:.2f}"]
            print(f"| {name} | {images} | {' | '.join(row)} | {first:.2f} | {usual:.2f} |")


if __name__ == "__main__":
    main()

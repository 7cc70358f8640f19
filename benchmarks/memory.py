"""Compression with calibration data: seconds and peak memory, by network and number of images.

    python benchmarks/memory.py --networks resnet20 wide vgg16 --images 128 512 1024

prints a Markdown table. Every line is measured in a process of its own, on random images: neither
time nor memory depends on the weights. `--repeats 3` takes the median line by processor time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import Progress

NETWORKS = {
    "resnet20": "ResNet20, 32×32",
    "wide": "5 convolutions, two of 512→512; 25088→4096→4096→1000; 56×56",
    "vgg16": "VGG16, 224×224",
}
STAGES = ("statistics", "selection", "compression")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "wide"])
    add("--images", type=int, nargs="+", default=[128, 512, 1024])
    add("--cr", type=float, default=0.5, help="fraction to remove (default: 0.5)")
    add("--repeats", type=int, default=1, help="processes a line (default: 1)")
    add("--csv", type=Path, help="write the figures here")
    add("--measure", action="store_true", help="measure here and print JSON: one line of the table")
    return parser.parse_args()


def convolutions(x: Any, *filters: int) -> Any:
    from keras import layers

    for count in filters:
        x = layers.Conv2D(count, 3, padding="same", activation="relu")(x)
    return x


def resnet20() -> Any:
    import keras
    from keras import layers

    def normalized(x: Any, filters: int, strides: int, size: int = 3) -> Any:
        x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(normalized(inputs, 16, 1))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if filters > 16 and block == 0 else 1
            y = normalized(layers.ReLU()(normalized(x, filters, strides)), filters, 1)
            x = normalized(x, filters, strides, 1) if strides > 1 else x
            x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def vgg(size: int, stages: list[tuple[int, ...]]) -> Any:
    import keras
    from keras import layers

    x = inputs = keras.Input((size, size, 3))
    for filters in stages:
        x = layers.MaxPooling2D()(convolutions(x, *filters))
    x = layers.Flatten()(x)
    for units in (4096, 4096):
        x = layers.Dense(units, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(1000)(x))


def network(name: str) -> Any:
    if name == "resnet20":
        return resnet20()
    if name == "wide":
        return vgg(56, [(64, 64), (512,), (512, 512)])
    return vgg(224, [(64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3])


def peak() -> float:
    """The most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident() -> float:
    """The memory that this process holds now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(name: str, images: int, cr: float) -> dict[str, Any]:
    """Statistics, selection and compression in this process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np

    import keras_alds

    keras.utils.set_random_seed(0)
    model = network(name)
    shape = (images, *model.input_shape[1:])
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    model(x[:1])
    row: dict[str, Any] = {
        "network": name,
        "images": images,
        "parameters": model.count_params(),
        "before_mb": resident(),
        "before_peak_mb": peak(),
    }

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter(), time.process_time()
        result = run()
        row[f"{stage}_seconds"] = time.perf_counter() - start[0]
        row[f"{stage}_cpu_seconds"] = time.process_time() - start[1]
        row[f"{stage}_peak_mb"] = peak()
        return result

    def chosen() -> Any:
        collect = keras_alds.CalibrationStats.collect
        stats = timed("statistics", lambda: collect(model, x, max_examples=None, verbose=0))
        return timed("selection", lambda: keras_alds.select(model, cr, calibration_data=stats))

    plan = chosen()
    timed("compression", lambda: keras_alds.compress(model, plan=plan, calibration_data=x))
    return row


def measured(name: str, images: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same in new processes: the one with the median processor time."""
    command = [sys.executable, __file__, "--measure", "--networks", name, "--cr", f"{arguments.cr}"]
    command += ["--images", f"{images}"]
    rows = []
    for _ in range(arguments.repeats):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))

    def total(row: dict[str, Any]) -> float:
        return sum(row[f"{stage}_cpu_seconds"] for stage in STAGES)

    middle = statistics.median_low(map(total, rows))
    return next(row for row in rows if total(row) == middle)


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(arguments.networks[0], arguments.images[0], arguments.cr)))
        return
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("processes", total=len(arguments.networks) * len(arguments.images))
        for name in arguments.networks:
            for images in arguments.images:
                rows.append(measured(name, images, arguments))
                progress.advance(task)
    for name in arguments.networks:
        print(f"{name}: {NETWORKS[name]}")
    print(
        f"\ncr={arguments.cr:g}; seconds, processor seconds in brackets; load average "
        f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores\n"
    )
    print("| network | images | statistics | selection | compression | before, MB | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["network"], f"{row['images']}"]
        cells += [
            f"{row[f'{stage}_seconds']:.1f} ({row[f'{stage}_cpu_seconds']:.1f})" for stage in STAGES
        ]
        cells += [f"{row['before_mb']:.0f}", f"{row['compression_peak_mb']:.0f}"]
        print("| " + " | ".join(cells) + " |")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

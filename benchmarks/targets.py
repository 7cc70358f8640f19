"""Which slices and ranks are fast where: single layers on LiteRT, with and without delegate.

    python benchmarks/targets.py                  # the tables of docs/how-to/targets.md
    python benchmarks/targets.py --layers 3x3:16x64x64 1x1:14x256x256 --rounds 21

Every layer is converted as it is and factorized with k slices of rank j to about half of its
weights, in float and in int8 (int8 input and output), and run with one thread

- by XNNPACK, the delegate that LiteRT takes by itself on CPUs (target "litert");
- by LiteRT's built-in kernels, without delegate ("litert-reference").

A figure is the median over rounds of the time relative to the dense layer's in the same round, so
that a busy machine slows both. A layer is `kernel:size x channels x filters`; `dense:` has no size.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import time
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType

import keras_alds
from keras_alds.core.slicing import divisors, weights

LAYERS = (
    "3x3:32x16x16",
    "3x3:16x32x32",
    "3x3:8x64x64",
    "3x3:16x128x128",
    "3x3:7x256x256",
    "1x1:14x128x128",
    "1x1:7x256x512",
    "dense:512x512",
)
RUNTIMES = {
    "XNNPACK": OpResolverType.AUTO,
    "built-in": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
}


def parse(text: str) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """The spatial kernel, the input's shape, channels and filters of a layer's text."""
    kernel, sizes = text.split(":")
    if kernel == "dense":
        channels, filters = map(int, sizes.split("x"))
        return (), (channels,), channels, filters
    size, channels, filters = map(int, sizes.split("x"))
    height, width = map(int, kernel.split("x"))
    return (height, width), (size, size, channels), channels, filters


def model_of(text: str, slices: int = 0, rank: int = 0) -> Any:
    """A model of one layer, dense for `slices=0`."""
    spatial, shape, _, filters = parse(text)
    inputs = keras.Input(shape, batch_size=1)
    if spatial:
        layer = (
            keras_alds.FactorizedConv2D(filters, spatial, slices=slices, rank=rank, padding="same")
            if slices
            else keras.layers.Conv2D(filters, spatial, padding="same")
        )
    elif slices:
        layer = keras_alds.FactorizedDense(filters, slices=slices, rank=rank)
    else:
        layer = keras.layers.Dense(filters)
    return keras.Model(inputs, layer(inputs))


def convert(model: Any, *, int8: bool) -> bytes:
    """The file of a model, in float or in int8 throughout."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if int8:
        random = np.random.default_rng(0)
        shape = (1, *model.input_shape[1:])
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: (
            [random.standard_normal(shape).astype("float32")] for _ in range(4)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    with contextlib.redirect_stdout(io.StringIO()):  # the converter lists every variable
        return bytes(converter.convert())


def ready(file: bytes, resolver: OpResolverType) -> Interpreter:
    """An interpreter that holds some input."""
    interpreter = Interpreter(
        model_content=file, num_threads=1, experimental_op_resolver_type=resolver
    )
    interpreter.allocate_tensors()
    detail = interpreter.get_input_details()[0]
    noise = 40 * np.random.default_rng(1).standard_normal(detail["shape"])
    interpreter.set_tensor(detail["index"], noise.astype(detail["dtype"]))
    for _ in range(3):
        interpreter.invoke()
    return interpreter


def seconds(interpreter: Interpreter, budget: float = 0.004) -> float:
    """The least time of one run, of as many as `budget` seconds hold."""
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < budget:
        before = time.perf_counter()
        interpreter.invoke()
        best = min(best, time.perf_counter() - before)
    return best


def choices(text: str) -> list[tuple[int, int]]:
    """Some (k, j) of a layer, at about half its weights, and near them for k = 1 and k = c."""
    spatial, _, channels, filters = parse(text)
    shape = (*spatial, channels, filters)
    dense = channels * filters * int(np.prod(spatial, dtype=int))
    found: set[tuple[int, int]] = set()
    for slices in divisors(channels):
        if slices & (slices - 1):
            continue
        half = max(1, round(dense / 2 / weights(shape, slices, 1)))
        if weights(shape, slices, half) >= dense:
            continue
        found.add((slices, half))
        if slices == 1:
            found.update((1, j) for j in (half - half % 8 + d for d in (0, 1, 2, 4, 6)) if j > 0)
        if slices == channels:
            found.update((slices, j) for j in (1, 2) if j <= half)
        elif slices > 1:
            found.update((slices, half - half % m) for m in (2, 4) if half >= m)
    return sorted(found)


def measure(text: str, rounds: int) -> Iterable[list[str]]:
    """Rows of a table: the layer, k, j, and a figure for every precision and runtime."""
    rows = [(0, 0), *choices(text)]
    files = {
        (row, int8): convert(model_of(text, *row), int8=int8)
        for row in rows
        for int8 in (False, True)
    }
    spatial, _, channels, filters = parse(text)
    times: dict[tuple, list[float]] = {}
    for int8 in (False, True):
        for name, resolver in RUNTIMES.items():
            runners = {row: ready(files[row, int8], resolver) for row in rows}
            for _ in range(rounds):
                for row, runner in runners.items():
                    times.setdefault((row, int8, name), []).append(seconds(runner))
    dense = channels * filters * int(np.prod(spatial, dtype=int))
    for row in rows:
        kept = weights((*spatial, channels, filters), *row) / dense if row[0] else 1.0
        cells = [f"`{text}`", str(row[0] or "–"), str(row[1] or "–"), f"{kept:.2f}"]
        for name in RUNTIMES:
            for int8 in (False, True):
                base = times[rows[0], int8, name]
                own = times[row, int8, name]
                if row == rows[0]:
                    cells.append(f"{statistics.median(base) * 1e6:.0f} µs")
                else:
                    ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
                    cells.append(f"{ratio:.2f}")
        yield cells


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="kernel:size x c x f")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    heads = [f"{name}, {kind}" for name in RUNTIMES for kind in ("float", "int8")]
    print("| " + " | ".join(["layer", "k", "j", "weights", *heads]) + " |")
    print("|---" * (4 + len(heads)) + "|")
    for text in arguments.layers:
        for cells in measure(text, arguments.rounds):
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Activation memory: what a plan predicts, what a file needs, and what tflite-micro allocates.

    python benchmarks/arena.py resnet20.keras resnet8.h5 --crs 0.5

prints a Markdown table in bytes of int8 files with int8 inputs and outputs, and says whether
float32 files agree as well. `tflite-micro` runs where it is installed (`pip install tflite-micro`).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.progress import track

import keras_alds
from keras_alds.litert.memory import activation_memory
from keras_alds.models.inventory import Inventory
from keras_alds.models.memory import peak_entries

FORMS: dict[str, dict[str, Any]] = {
    "one slice": {"method": "energy", "max_slices": 1},
    "any": {"method": "energy", "target": "size"},
    "`alds`": {"method": "alds"},
}
# It prints what it allocated, from C++.
MICRO = """
import sys
from tflite_micro.python.tflite_micro import runtime
runtime.Interpreter.from_file(sys.argv[1], arena_size=200_000_000).print_allocations()
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="Keras models")
    parser.add_argument("--crs", nargs="+", type=float, default=[0.5])
    return parser.parse_args()


def compressed(model: Any, crs: list[float]) -> Iterator[tuple[str, Any, int]]:
    """The model itself and its compressed forms: a text, a model, the predicted peak."""
    yield "–", model, peak_entries(Inventory.of(model)) or 0
    for cr in crs:
        for form, options in FORMS.items():
            for limits in ({"params": cr}, {"params": cr, "memory": 0.0}):
                plan = keras_alds.select(model, limits, **options)
                text = f"{form}, {', '.join(f'{n} {f:g}' for n, f in limits.items())}"
                yield text, keras_alds.compress(model, plan=plan), plan.memory.after


def by_micro(content: bytes) -> int | None:
    """The bytes that tflite-micro plans for activations, or None if it is not installed."""
    with tempfile.NamedTemporaryFile(suffix=".tflite") as file:
        Path(file.name).write_bytes(content)
        command = [sys.executable, "-c", MICRO, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Arena allocation head (\d+) bytes", done.stdout + done.stderr)
    return int(found.group(1)) if found else None


def measure(model: Any, predicted: int) -> tuple[list[int | None], bool]:
    """Bytes of the int8 file, and whether both files are as predicted."""
    x = np.random.default_rng(0).standard_normal((16, *model.input_shape[1:]), np.float32)
    rows = []
    for size, options in (
        (4, {}),
        (1, {"quantize": "int8", "representative_data": x, "inference_input_type": "int8"}),
    ):
        more = {"inference_output_type": "int8"} if size == 1 else {}
        content = keras_alds.litert.convert(model, verbose=0, **options, **more)
        memory = activation_memory(keras_alds.litert.read_file(content))
        micro = by_micro(content)
        agree = memory.peak == size * predicted and micro in (None, memory.arena)
        rows.append(([predicted, memory.peak, memory.arena, micro], agree))
    return rows[-1][0], all(agree for _, agree in rows)


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    lines = []
    for path in track(arguments.models, transient=True):
        model = keras.models.load_model(path, compile=False)
        for text, small, predicted in compressed(model, arguments.crs):
            figures, agree = measure(small, predicted)
            cells = ["–" if n is None else f"{n:,}" for n in figures]
            lines.append([path.stem, text, *cells, "yes" if agree else "no"])
    print("| network | compressed | plan: peak | file: peak | file: arena | tflite-micro | agree |")
    print("|---|---|---|---|---|---|---|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()

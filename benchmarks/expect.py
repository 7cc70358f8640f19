"""What to expect: accuracy, latency, file and memory of one network in many forms.

    python benchmarks/expect.py --model resnet20.keras --data cifar10.npz --json expect.json
        --folder files --rows original params=0.5 macs=0.5 search pruning width inputs
    python benchmarks/expect.py --latency-only --json expect.json --folder files

The first command makes the files and scores them, the second one measures how long they take. The
JSON file is written after every row; rows that are in it are not made again. Both print a table for
each network of the JSON file. The rows:

- original
- OBJECTIVE=CR or OBJECTIVE=CR:TARGET, such as macs=0.5:litert: `compress` with `--images`
  unlabelled images. With `--refine` it is refined too, and the files are then of that model.
- search, search-int8: `search` with objective="latency" and max_drop=0.01. It scores the Keras
  models, or the int8 files, on the test images.
- pruning: half of the weights of every kernel are zero, as TF-MOT's pruning does. Its file counts
  gzipped, and it is not faster.
- width: channels between two layers are removed, and the second layer is refitted by least squares;
  as many as bring it to the latency of `--equal`.
- inputs: smaller images, the largest ones that bring it to the latency of `--equal`.

`--data` is an .npz file with x_train, x_test and y_test. With `--fidelity` no labels are needed:
the score is the share of the images that get the same class as from the original. Without data,
only files and latency are shown. Models are saved files, or names of keras.applications (random
weights).
"""

from __future__ import annotations

import argparse
import bisect
import gzip
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from latency import load
from mobile import zeroed
from width import narrowed

import keras_alds
from keras_alds.litert import convert, read_file
from keras_alds.litert.memory import activation_memory
from keras_alds.litert.runs import Runner
from keras_alds.litert.timing import time_files
from keras_alds.writing import write_whole

MAX_DROP, SPARSITY = 0.01, 0.5
ROWS = ("original", "params=0.5", "macs=0.5", "search", "search-int8", "pruning", "width", "inputs")
LABELS = {
    "search": "`search`, latency in float",
    "search-int8": "`search`, latency in int8",
    "pruning": "half of the weights zero (TF-MOT)",
    "width": "width pruning",
    "inputs": "smaller images",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help="trained Keras 3 model, or a name of keras.applications")
    add("--data", type=Path, help=".npz file with x_train, x_test and y_test")
    add("--fidelity", action="store_true", help="score agreement with the original")
    add("--rows", nargs="+", default=ROWS, help="what to make (see above)")
    add("--refine", nargs="*", default=[], help="rows to refine as well")
    add("--equal", default="macs=0.5", help="row whose latency width and inputs get (macs=0.5)")
    add("--images", type=int, default=512, help="unlabelled images; 0 for none (default: 512)")
    add("--json", type=Path, required=True, help="figures of all networks, also to go on from")
    add("--folder", type=Path, required=True, help="where the .tflite files are kept")
    add("--latency-only", action="store_true", help="measure the latency of the files again")
    add("--repeats", type=int, default=5, help="measurements of every file (default: 5)")
    return parser.parse_args()


# -- The network and its data ----------------------------------------------------------------------


class Bed:
    """A network, images, and how models are scored."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.name = Path(arguments.model).stem
        self.original = load(arguments.model, top=True)
        self.images: Any = None
        self.x_test: Any = None
        # Images that set the ranges of int8 files.
        shape = (16, *self.original.input_shape[1:])
        self.representative = np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")
        if not arguments.data:
            return
        with np.load(arguments.data) as file:
            train = file["x_train"][: max(arguments.images, 256)].astype("float32")
            self.x_test = file["x_test"].astype("float32")
            labels = None if arguments.fidelity else file["y_test"].reshape(-1)
        self.images = train[: arguments.images] if arguments.images else None
        self.representative = train[:256]
        self.y_test = classes(self.original, self.x_test) if labels is None else labels

    @property
    def options(self) -> dict[str, Any]:
        """How plans are made: with the images, without, or for random weights."""
        if self.x_test is None:
            return {"method": "energy"}
        return {} if self.images is None else {"calibration_data": self.images}

    def score(self, model: Any) -> float:
        """The share of test images that a model or a file gets right."""
        return float(np.mean(classes(model, self.x_test) == self.y_test))


def classes(model: Any, x: Any) -> Any:
    """The class that a model or a file gives every image."""
    if isinstance(model, bytes):
        runner = Runner(model)
        outputs = runner.predict(resized(x, int(runner.inputs[0]["shape"][1])))
    else:
        outputs = model.predict(resized(x, model.input_shape[1]), batch_size=100, verbose=0)
    return np.asarray(outputs).argmax(-1)


def resized(x: Any, side: int) -> Any:
    """Images of another size."""
    if x.shape[1] == side:
        return x
    parts = np.array_split(x, max(len(x) // 500, 1))
    return np.concatenate([tf.image.resize(p, (side, side), antialias=True) for p in parts])


# -- The rows --------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A model, and what the table and its readers need to know of it."""

    model: Any
    facts: dict[str, Any]


def compressed(bed: Bed, row: str) -> Made:
    """The model of a row such as macs=0.5 or params=0.5:size."""
    limit, _, target = row.partition(":")
    objective, cr = limit.split("=")
    options = {"objective": objective, **({"target": target} if target else {}), **bed.options}
    return Made(keras_alds.compress(bed.original, float(cr), **options), {})


def searched(bed: Bed, quantize: str | None) -> Made:
    """The fastest model that `search` finds."""
    begun = time.perf_counter(), time.process_time()
    result = keras_alds.search(
        bed.original,
        bed.score if quantize is None else lambda model: bed.score(int8_file(bed, model)),
        max_drop=MAX_DROP,
        objective="latency",
        quantize=quantize,
        verbose=0,
        **bed.options,
    )
    facts = {"evaluations": len(result.points), **spent(begun)}
    result.summary()
    predicted = None if result.best is None else 1 - result.best.removed
    return Made(result.model, {**facts, "predicted": predicted})


def int8_file(bed: Bed, model: Any) -> bytes:
    """The int8 file of a model, quantized after training."""
    examples = resized(bed.representative, model.input_shape[1])
    return bytes(convert(model, quantize="int8", representative_data=examples, verbose=0))


def shrunk(model: Any, side: int) -> Any:
    """The same network for smaller images; pooling over the whole image stays that."""
    before = model.input_shape[1]

    def copied(layer: Any) -> Any:
        config = layer.get_config()
        pools_all = isinstance(layer, keras.layers.AveragePooling2D) and layer.output.shape[1] == 1
        if pools_all:
            config["pool_size"] = config["strides"] = -(-layer.input.shape[1] * side // before)
        return layer.__class__.from_config(config)

    inputs = keras.tree.map_structure(lambda t: keras.Input((side, side, t.shape[-1])), model.input)
    small = keras.models.clone_model(model, input_tensors=inputs, clone_function=copied)
    small.set_weights(model.get_weights())
    return small


def at_latency(
    original: Any, wanted: float, sizes: Sequence[Any], build: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """The first size whose model takes at most a latency, and the model."""
    dense = convert(original, verbose=0)

    def reached(size: Any) -> bool:
        return ratio_of(dense, convert(build(size), verbose=0), repeats=3)[0] <= wanted

    size = sizes[min(bisect.bisect_left(sizes, True, key=reached), len(sizes) - 1)]
    return size, build(size)


def narrow(bed: Bed, wanted: float) -> Made:
    """Width pruning at a latency."""
    fractions = [n / 100 for n in range(5, 90, 5)]
    fraction, _ = at_latency(
        bed.original, wanted, fractions, lambda part: narrowed(bed.original, None, part)
    )
    images = bed.images[: 64 if bed.images.shape[1] >= 128 else 256]
    model = narrowed(bed.original, images, fraction)
    return Made(model, {"note": f"{fraction:.0%} of inner channels"})


def smaller_images(bed: Bed, wanted: float) -> Made:
    """Smaller images at a latency."""
    side = bed.original.input_shape[1]
    step = 32 if side >= 128 else 4
    sides = range(side - step, step, -step)
    side, model = at_latency(
        bed.original, wanted, sides, lambda smaller: shrunk(bed.original, smaller)
    )
    return Made(model, {"note": f"{side}×{side}"})


def make(bed: Bed, row: str, wanted: Callable[[], float]) -> Made:
    """The model of a row."""
    if row == "original":
        return Made(bed.original, {})
    if row.startswith("search"):
        return searched(bed, "int8" if row.endswith("int8") else None)
    if row == "pruning":
        return Made(zeroed(bed.original, SPARSITY), {})
    if row in ("width", "inputs"):
        return {"width": narrow, "inputs": smaller_images}[row](bed, wanted())
    return compressed(bed, row)


# -- Files -----------------------------------------------------------------------------------------


def file_of(folder: Path, network: str, row: str, kind: str) -> Path:
    """Where a file is kept."""
    return folder / network / f"{re.sub(r'[^0-9a-z.]+', '-', row)}.{kind}.tflite"


def figures(bed: Bed, row: str, made: Made, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is known of a row but its latency; the files are kept."""
    found: dict[str, Any] = dict(made.facts)
    model = made.model
    if bed.x_test is not None:
        found["top1"] = bed.score(model)
        if row in arguments.refine:
            keras_alds.refine(model, bed.original, bed.images, verbose=0)
            found["refined"] = bed.score(model)
    for kind in ("float", "int8"):
        path = file_of(arguments.folder, bed.name, row, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(int8_file(bed, model) if kind == "int8" else convert(model, verbose=0))
        found[kind] = file_figures(path.read_bytes())
        if kind == "int8" and bed.x_test is not None:
            found[kind]["top1"] = bed.score(path.read_bytes())
    return found


def file_figures(content: bytes) -> dict[str, Any]:
    """What is known of a file without running it."""
    return {
        "bytes": len(content),
        "gzip": len(gzip.compress(content, mtime=0)),
        "arena": activation_memory(read_file(content)).arena,
    }


def spent(begun: tuple[float, float]) -> dict[str, int]:
    """Seconds since then, by the clock and of the processors."""
    seconds, processor = time.perf_counter() - begun[0], time.process_time() - begun[1]
    return {"seconds": round(seconds), "processor_seconds": round(processor)}


# -- Latency ---------------------------------------------------------------------------------------


def ratio_of(before: bytes, after: bytes, repeats: int) -> tuple[float, float]:
    """The median ratio of the least times of two files that take turns, and the first one's ms."""
    times = [time_files([lambda: before, lambda: after]) for _ in range(repeats)]
    return statistics.median(b / a for a, b in times), min(a for a, _ in times) / 1e6


def measure(networks: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Measures all files that are kept, each in turns with the original's."""
    for network, rows in networks.items():
        for row, found in rows.items():
            for kind in ("float", "int8"):
                paths = [file_of(arguments.folder, network, r, kind) for r in ("original", row)]
                if row == "original" or kind not in found:
                    continue
                before, after = (path.read_bytes() for path in paths)
                ratio, ms = ratio_of(before, after, arguments.repeats)
                found[kind]["latency"] = ratio
                rows["original"][kind]["ms"] = min(ms, rows["original"][kind].get("ms", ms))


# -- The table -------------------------------------------------------------------------------------


def label(row: str, found: dict[str, Any]) -> str:
    """How a row is called in the table."""
    limit, _, target = row.partition(":")
    if "=" in limit:
        objective, cr = limit.split("=")
        words = {"params": "parameters", "macs": "MACs"}.get(objective, objective)
        return f"{float(cr):.0%} of the {words}" + (f", `{target}`" if target else "")
    text = LABELS.get(row, row)
    return f"{text}: {found['note']}" if "note" in found else text


def place(row: str) -> tuple[int, str]:
    """Where a row stands in the table: the original, plans, searches, then the others."""
    kinds = [row == "original", "=" in row, row.startswith("search"), True]
    return kinds.index(True), row


def table(network: str, rows: dict[str, Any]) -> str:
    """The rows of a network as Markdown."""
    scores, files = "top-1 | refined | int8 file", "kB, float | gzip | int8 | arena, kB"
    head = f"| removed, or instead | {scores} | latency, float | int8 | {files} |"
    lines = [f"\n{network}\n", head, "|---" * 10 + "|"]
    for row in sorted(rows, key=place):
        found = rows[row]
        both = [found.get(kind, {}) for kind in ("float", "int8")]
        scores = (found.get("top1"), found.get("refined"), both[1].get("top1"))
        cells = ["–" if score is None else f"{100 * score:.1f}" for score in scores]
        cells += [f"{kind['ms']:.2f} ms" if "ms" in kind else ratio(kind) for kind in both]
        sizes = [both[0].get("bytes"), both[0].get("gzip"), both[1].get("bytes")]
        sizes.append(both[1].get("arena"))
        cells += ["–" if size is None else f"{size / 1000:.0f}" for size in sizes]
        lines.append(f"| {label(row, found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(kind: dict[str, Any]) -> str:
    """The latency of a file as text."""
    return f"{kind['latency']:.2f}" if "latency" in kind else "–"


def add_rows(networks: dict[str, Any], arguments: argparse.Namespace, write: Any) -> None:
    """Makes the rows that are not there yet."""
    bed = Bed(arguments)
    rows = networks.setdefault(bed.name, {})

    def equal() -> float:
        paths = [
            file_of(arguments.folder, bed.name, row, "float")
            for row in ("original", arguments.equal)
        ]
        return ratio_of(*(path.read_bytes() for path in paths), repeats=3)[0]

    for row in arguments.rows:
        if row in rows:
            continue
        begun = time.perf_counter()
        rows[row] = figures(bed, row, make(bed, row, equal), arguments)
        seconds = time.perf_counter() - begun
        print(f"{row}: {rows[row]}, {seconds:.0f} s", file=sys.stderr, flush=True)
        write()


def main() -> None:
    arguments = parse_arguments()
    known = arguments.json.exists()
    networks = json.loads(arguments.json.read_text()) if known else {}

    def write() -> None:
        write_whole(arguments.json, json.dumps(networks, indent=1) + "\n")

    if arguments.model:
        add_rows(networks, arguments, write)
    if arguments.latency_only:
        measure(networks, arguments)
        write()
    for network, rows in networks.items():
        print(table(network, rows))


if __name__ == "__main__":
    main()

"""Latency on a device: writes files for the benchmark tool and reads a table from its log."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from keras_alds.core.costs import DENSE
from keras_alds.litert.latency import converted, measurable, measured_records, ranks_of_calls
from keras_alds.litert.layer_files import empty_file, layer_calls, layer_file
from keras_alds.litert.table import LatencyTable, Settings, read_rows
from keras_alds.litert.timing import Timing
from keras_alds.progress import progress_bar
from keras_alds.tables import write_csv

INDEX = "candidates.csv"
_MODEL, _EMPTY = "model.tflite", "empty.tflite"
_STEPS = 5  # intervals that the ranks of one number of slices are divided into
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])"
_GRAPH = re.compile(r"Graph: \[(.+?)\]")
_TIMINGS = re.compile(rf"Inference timings in us:.*\bInference \(avg\): {_NUMBER}")
_STATISTICS = re.compile(rf"\bcount=\d+ .*\bavg={_NUMBER}")
_MEDIAN = re.compile(rf"\bmedian={_NUMBER}")


def write_latency_files(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    quantize: str | None = None,
    threads: int = 1,
    target: str = "litert",
    exclude: Any = (),
    max_slices: int | None = 4,
    representative_data: Any = None,
    verbose: int = 1,
) -> int:
    """Writes the files to measure on a device, and the list `candidates.csv`.

    There is one file for the whole model, an empty one, and for every layer that can be factorized
    the dense layer and some of its choices. Run TensorFlow's `benchmark_model` on each and pass
    the log to `read_latency_log`; docs/how-to/latency.md has the commands.

    Args:
        model: A built model, not compressed, whose input sizes are known.
        folder: Where to write; created if it does not exist.
        quantize: None for float32, or `"int8"`.
        threads: Integer. Number of threads on the device.
        target: The runtime of the device, as for `select`. Defaults to `"litert"`.
        exclude: As for `select`: layers to leave out.
        max_slices: Integer or None. Largest number of slices k. Defaults to 4.
        representative_data: As for `measure_latency`.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Returns:
        The number of `.tflite` files.

    Raises:
        ImportError: If LiteRT is not installed.
        ValueError: If an argument is not as above or the model cannot be converted.

    Example:
    ```python
    keras_alds.litert.write_latency_files(model, "latency", max_slices=1, verbose=0)
    ```
    """
    settings = Settings(quantize, threads, target, max_slices)
    inventory = measurable(model, exclude, stacklevel=2)
    records = measured_records(inventory)
    calls = layer_calls(inventory, records)
    choices = ranks_of_calls(records, calls, settings)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / _MODEL).write_bytes(converted(model, quantize, representative_data, verbose))
    (path / _EMPTY).write_bytes(empty_file())
    rows = [settings.row(None, file=_MODEL), settings.row(None, kind="empty", file=_EMPTY)]
    with progress_bar(verbose) as progress:
        for call in progress.track(sorted(choices), description="files of layers"):
            points = [(k, j, s) for (k, s), ranks in choices[call].items() for j in _spread(ranks)]
            count = sum(found.count(call) for found in calls.values())
            for point in (DENSE, *points):
                name = f"{len(rows) - 1:05}.tflite"
                (path / name).write_bytes(layer_file(call, *point, quantize=quantize))
                rows.append(settings.row(call, count, point, file=name))
    write_csv(path / INDEX, rows)
    return len(rows)


def read_latency_log(folder: str | os.PathLike[str], log: str | os.PathLike[str]) -> LatencyTable:
    """Reads the log of `benchmark_model` for the files of `write_latency_files`.

    Args:
        folder: The folder with `candidates.csv`.
        log: Path of the log. For every file, the lines `Graph: […]` and `count=… avg=…` or
            `Inference timings in us: … Inference (avg): …` are read. A median is preferred where
            the tool prints one. If a file was measured several times, the least time that was
            reproduced counts, and the table's `noise` says how well the times agree.

    Returns:
        A `LatencyTable`.

    Raises:
        ValueError: If a file was not measured, or `folder` holds no list of files.

    Example:
    ```python
    keras_alds.litert.write_latency_files(model, "latency", max_slices=1, verbose=0)
    # adb push latency …, benchmark_model …, adb pull …
    # table = keras_alds.litert.read_latency_log("latency", "log.txt")
    ```
    """
    index = Path(folder) / INDEX
    if not index.is_file():
        raise ValueError(
            f"Expected {INDEX} in the folder, as `latency-files` writes it. "
            f"Received: folder={os.fspath(folder)!r}, which has no {INDEX}"
        )
    rows = read_rows(index)
    if [row.get("kind") for row in rows[:2]] != ["model", "empty"] or "file" not in rows[0]:
        raise ValueError(
            f"Expected {os.fspath(index)!r} as `latency-files` wrote it, with the rows of the "
            "whole model and of the empty file first. Received: another file. Write it again."
        )
    times = parse_log(Path(log).read_text(encoding="utf-8", errors="replace"))
    missing = [row["file"] for row in rows if row["file"] not in times]
    if missing:
        raise ValueError(
            f"Expected timings of all {len(rows)} files in {os.fspath(log)!r}. Received: none of "
            f"{len(missing)}: {', '.join(missing[:5])}. Run benchmark_model on them and append "
            "what it prints."
        )
    overhead = 1000 * min(times[rows[1]["file"]])
    measured = []
    for row in rows:
        if row["kind"] != "empty":
            found = [1000 * time for time in times[row["file"]]]
            timing = Timing.of(found, 0 if row["kind"] == "model" else overhead)
            measured.append(row | dataclasses.asdict(timing))
    return LatencyTable.from_rows(measured, os.fspath(index))


def parse_log(text: str) -> dict[str, list[float]]:
    """Microseconds per run of every measurement by file name, from a log of `benchmark_model`."""
    times: dict[str, list[float]] = {}
    name, statistics = None, None
    for line in text.splitlines():
        if found := _GRAPH.search(line):
            name, statistics = re.split(r"[/\\]", found[1])[-1], None
        elif found := _STATISTICS.search(line):  # first the warm-up, then the runs
            statistics = _MEDIAN.search(line) or found
        elif (found := _TIMINGS.search(line)) and name is not None:
            times.setdefault(name, []).append(float((statistics or found)[1]))
            name = None
    return times


def _spread(ranks: tuple[int, ...]) -> list[int]:
    """A sample of ranks; latency is a staircase that steps up after multiples of powers of two."""
    last = len(ranks) - 1
    near = {0, last}
    for step in range(1, _STEPS):
        around = range(
            max(0, last * (2 * step - 1) // (2 * _STEPS)),
            last * (2 * step + 1) // (2 * _STEPS) + 1,
        )
        top = max(around, key=lambda i: (ranks[i] & -ranks[i], -i))
        near |= {top, min(top + 1, last)}
    return [ranks[i] for i in sorted(near)]

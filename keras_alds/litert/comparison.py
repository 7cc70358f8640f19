"""`compare`: bytes, latency and accuracy of two models or files, side by side."""

from __future__ import annotations

import dataclasses
import gzip
import statistics
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds.core.checks import int_at_least, positive_int
from keras_alds.litert.conversion import ConvertOptions, convert_quietly, numbered
from keras_alds.litert.files import contents, read_file
from keras_alds.litert.measure import Latency, time_together
from keras_alds.litert.memory import activation_memory
from keras_alds.litert.quantized import warn_of_thin_groups
from keras_alds.litert.runs import Runner, check_file, check_local
from keras_alds.models.data import is_iterator
from keras_alds.progress import progress_bar
from keras_alds.tables import Tabular, TextTable

#: A metric: a function of targets and outputs.
Compute = Callable[[Any, Any], float]


@dataclasses.dataclass(frozen=True)
class FileFigures:
    """The figures of one of the files that `compare` compares.

    Attributes:
        size: Bytes of the file.
        gzip_size: Bytes of the file compressed by gzip, as in an app's package.
        parameters: Number of constant values: weights and biases.
        macs: Multiply–accumulates for one example; None for a file with loops.
        peak_activations: Bytes of activations that are live at once, inputs and outputs included.
        arena: Bytes of the arena in which LiteRT for Microcontrollers places them.
        latency: Its latency, or None if it was not measured.
        metrics: Metrics on the given data, by name.
    """

    size: int
    gzip_size: int
    parameters: int
    macs: int | None
    peak_activations: int
    arena: int
    latency: Latency | None
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, file: bytes, latency: Latency | None, metrics: dict[str, float]) -> FileFigures:
        """The record of a file, its latency and its metrics."""
        content = read_file(file)
        memory = activation_memory(content)
        return cls(
            size=len(file),
            gzip_size=len(gzip.compress(file, mtime=0)),
            parameters=content.parameters,
            macs=content.macs,
            peak_activations=memory.peak,
            arena=memory.arena,
            latency=latency,
            metrics=MappingProxyType(metrics),
        )


@dataclasses.dataclass(frozen=True, repr=False)
class FileComparison(Tabular):
    """Two files side by side; made by `keras_alds.litert.compare`.

    Attributes:
        original: Figures of the original's file.
        compressed: Figures of the compressed model's file.
        latency_ratio: Median ratio, compressed to original, over pairs of consecutive runs; None
            if latency was not measured.
    """

    original: FileFigures
    compressed: FileFigures
    latency_ratio: float | None

    def __repr__(self) -> str:
        before, after = self.original, self.compressed
        ratio = "" if self.latency_ratio is None else f", latency × {self.latency_ratio:.3f}"
        metrics = "".join(
            f", {name} {value:.4f} → {after.metrics[name]:.4f}"
            for name, value in before.metrics.items()
        )
        return (
            f"<FileComparison: {before.size:,} → {after.size:,} bytes{ratio}{metrics}. "
            "summary() prints a table>"
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """The figures as dicts; the latency is the median in seconds."""
        both = (self.original, self.compressed)
        figures: dict[str, list[Any]] = {
            "bytes": [file.size for file in both],
            "bytes, gzip": [file.gzip_size for file in both],
            "parameters": [file.parameters for file in both],
            "MACs": [file.macs for file in both],
            "peak activations, bytes": [file.peak_activations for file in both],
            "arena, bytes": [file.arena for file in both],
            "latency, s": [file.latency and file.latency.median for file in both],
            **{name: [file.metrics[name] for file in both] for name in self.original.metrics},
        }
        return [
            {"figure": name, "original": before, "compressed": after}
            for name, (before, after) in figures.items()
        ]

    def _table(self) -> TextTable:
        before, after = self.original, self.compressed
        rows = [
            _row("bytes", before.size, after.size),
            _row("bytes, gzip", before.gzip_size, after.gzip_size),
            _row("parameters", before.parameters, after.parameters),
            _row("MACs", before.macs, after.macs),
            _row("peak activations, bytes", before.peak_activations, after.peak_activations),
            _row("arena, bytes", before.arena, after.arena),
        ]
        lines = []
        if before.latency and after.latency and self.latency_ratio is not None:
            pair = before.latency, after.latency
            rows.append(
                ["ms", *(f"{1e3 * t.median:.3f}" for t in pair), f"{self.latency_ratio:.3f}"]
            )
            rows.append(
                ["ms, quartiles", *(f"{1e3 * t.lower:.3f}–{1e3 * t.upper:.3f}" for t in pair), ""]
            )
            lines.append(
                f"Latency: {pair[0].runs} runs each, alternating, {pair[0].runtime}; the ratio is "
                "the median over pairs of runs"
            )
        for name, value in before.metrics.items():
            change = f"{after.metrics[name] - value:+.4f}"
            rows.append([name, f"{value:.4f}", f"{after.metrics[name]:.4f}", change])
        columns = ["", "original", "compressed", "compressed / original"]
        return TextTable("LiteRT files", columns, rows, lines)


def compare(
    original: Any,
    compressed: Any,
    data: tuple[Any, Any] | None = None,
    *,
    metric: Any = None,
    quantize: str | None = None,
    representative_data: Any = None,
    threads: int = 1,
    runs: int = 100,
    warmup: int = 10,
    target: str = "litert",
    verbose: int = 1,
) -> FileComparison:
    """Compares two models or files: size, memory, latency and accuracy in the LiteRT runtime.

    The files are timed alternately, one run each, so that other load on the machine affects
    both. Metrics are computed on the files, not on the Keras models, so they include the cost of
    quantization. Warnings of `litert.convert` are issued once, not per file.

    Args:
        original: A model, or the bytes or path of a `.tflite` file.
        compressed: The same.
        data: `(x, y)` to compute the metrics on, or None for no metrics. `x` is an array, or one
            array for each input, by name or in order. Defaults to None.
        metric: Function `metric(y, outputs)` that returns one number, or one for each example; a
            Keras metric, or its name. Defaults to the metrics that `original` is compiled with,
            else to `"accuracy"`, which takes class numbers, one-hot classes, or two classes in
            one score. Models with several outputs need a function.
        quantize: As for `litert.convert`; applies to models, not files. Defaults to None.
        representative_data: As for `litert.convert`; applies to models, not files.
        threads: As for `litert.benchmark`.
        runs: As for `litert.benchmark`; 0 to measure no latency. Defaults to 100.
        warmup: As for `litert.benchmark`.
        target: As for `litert.benchmark`.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Returns:
        A `FileComparison`. Its `summary()` prints it.

    Raises:
        ImportError: If LiteRT is not installed.
        ValueError: If an argument is not as above, or for the reasons of `litert.convert`.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    keras_alds.litert.compare(model, small, (x, y), runs=20, verbose=0).summary()
    ```
    """
    positive_int(threads, "threads")
    int_at_least(runs, "runs", 0)
    int_at_least(warmup, "warmup", 0)
    target = check_local(target)
    if data is not None and not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise ValueError(
            "Expected `data` to be a pair (x, y) of inputs and targets. "
            f"Received: {type(data).__name__}"
        )
    metrics = _metrics(metric, original) if data is not None else {}
    if not (_is_model(original) or _is_model(compressed)) and (
        quantize is not None or representative_data is not None
    ):
        raise ValueError(
            "Expected `quantize` and `representative_data` only with a model to convert. "
            "Received: two files"
        )
    if is_iterator(representative_data):
        representative_data = list(representative_data)  # both models need it
    options = ConvertOptions(quantize=quantize, representative_data=representative_data, verbose=0)
    with progress_bar(verbose) as progress:
        task = progress.add_task("comparison", total=4)
        files = []
        for item in (original, compressed):
            if _is_model(item):
                item = convert_quietly(item, options, stacklevel=3)
            files.append(contents(item))
            check_file(files[-1], targets=(target,))
            progress.advance(task)
        runners = [Runner(file, threads=threads, target=target) for file in files]
        values = [_computed(metrics, runner, data) for runner in runners]
        progress.advance(task)
        seconds = time_together(runners, runs=runs, warmup=warmup) if runs else [[], []]
        progress.advance(task)
    warn_of_thin_groups(*files, stacklevel=3)
    latencies = [
        Latency.of(times, threads=threads, target=target, size=len(file)) if runs else None
        for file, times in zip(files, seconds, strict=True)
    ]
    before, after = map(FileFigures.of, files, latencies, values)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    return FileComparison(before, after, statistics.median(ratios) if ratios else None)


def _computed(metrics: Mapping[str, Compute], runner: Runner, data: Any) -> dict[str, float]:
    """The metrics of a file's outputs; none without data."""
    if not metrics:
        return {}
    x, y = data
    outputs = runner.predict(x)
    return {name: compute(y, outputs) for name, compute in metrics.items()}


def _row(name: str, before: int | None, after: int | None) -> list[str]:
    figures = ("–" if value is None else f"{value:,}" for value in (before, after))
    return [name, *figures, f"{after / before:.3f}" if before and after else ""]


def _is_model(item: Any) -> bool:
    try:
        _backend.backend_of(item)
    except ValueError:
        return False
    return True


# -- Metrics -------------------------------------------------------------------------------------


def _metrics(metric: Any, model: Any) -> dict[str, Compute]:
    """Functions of targets and outputs, by name."""
    backend = _backend.backend_of(model) if _is_model(model) else None
    chosen = [metric]
    if metric is None:
        chosen = ["accuracy"]
        if backend is not None and backend.is_compiled(model):
            own = backend.compile_arguments(model).get("metrics")
            chosen = list(own) if isinstance(own, (list, tuple)) and own else chosen
    names, computes = zip(*(_metric(item, backend) for item in chosen), strict=True)
    return dict(zip(numbered(names), computes, strict=True))


def _metric(metric: Any, backend: _backend.Backend | None) -> tuple[str, Compute]:
    if isinstance(metric, str) and metric in ("accuracy", "acc"):
        return "accuracy", accuracy
    if isinstance(metric, str) and backend is not None:
        metric = backend.keras.metrics.get(metric)
    if hasattr(metric, "update_state"):
        fresh = type(metric).from_config(metric.get_config())

        def compute(y: Any, outputs: Any) -> float:
            fresh.reset_state()
            fresh.update_state(y, outputs)
            return float(np.asarray(fresh.result()))

        return metric.name, compute
    if not callable(metric):
        raise ValueError(
            "Expected `metric` to be a function of targets and outputs, a Keras metric or, with "
            f"a Keras model, the name of one. Received: metric={metric!r}"
        )
    return getattr(metric, "__name__", "metric"), lambda y, o: float(
        np.mean(np.asarray(metric(y, o)))
    )


def accuracy(y: Any, outputs: Any) -> float:
    """The share of correct predictions, for class numbers, one-hot classes or binary scores."""
    if isinstance(outputs, list):
        raise ValueError(
            "Expected a model of one output, for the metric 'accuracy'. "
            f"Received: {len(outputs)} outputs; pass a function as `metric`"
        )
    targets, scores = np.asarray(y), np.asarray(outputs)
    classes = scores.argmax(-1)
    if scores.shape[-1] == 1:  # two classes in one score, as in Keras
        classes = (scores[..., 0] > 0.5).astype(np.int64)
    if targets.shape == scores.shape != (*classes.shape, 1):
        known = np.allclose(targets.sum(-1), 1)  # one-hot, or a distribution
        targets = targets.argmax(-1)
    else:
        if targets.shape == (*classes.shape, 1):
            targets = targets[..., 0]
        known = targets.shape == classes.shape and np.array_equal(targets, np.round(targets))
    if not known:
        raise ValueError(
            "Expected targets to be class numbers or one-hot classes, for the metric 'accuracy'. "
            f"Received: targets of shape {np.shape(y)} for outputs of shape {scores.shape}, or "
            "values that are neither; pass a function as `metric`"
        )
    return float(np.mean(classes == targets))

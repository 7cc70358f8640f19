"""`benchmark`: how long a file takes in the runtime of this machine, operator by operator."""

from __future__ import annotations

import dataclasses
import operator as python_operator
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from keras_alds.litert.files import File, Operator, contents, extract, read_file
from keras_alds.litert.runs import Runner, check_runs
from keras_alds.tables import print_table

PrintFn = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class OperatorTime:
    """What one operator of a file takes by itself.

    Attributes:
        name: The built-in operator's name, such as `"CONV_2D"`.
        output: Name of its output tensor, which names the Keras layer.
        shape: Shape of its output.
        median: Median seconds of one run, or None if it does not run by itself.
    """

    name: str
    output: str
    shape: tuple[int, ...]
    median: float | None


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long a file takes; made by `keras_alds.litert.benchmark`.

    Attributes:
        median: Median seconds of one run.
        lower: Lower quartile: a quarter of the runs took less.
        upper: Upper quartile: a quarter of the runs took more.
        fastest: The fastest run.
        runs: Number of runs that were timed.
        threads: Number of threads.
        delegate: Whether XNNPACK took the operators that it knows.
        size: Bytes of the file.
        operators: What every operator takes by itself, if a profile was asked for.
    """

    median: float
    lower: float
    upper: float
    fastest: float
    runs: int
    threads: int
    delegate: bool
    size: int
    operators: tuple[OperatorTime, ...] = ()

    @classmethod
    def of(
        cls, seconds: Sequence[float], *, threads: int, delegate: bool, size: int, **fields: Any
    ) -> Latency:
        """The record of the seconds that some runs took."""
        lower, median, upper = np.quantile(seconds, (0.25, 0.5, 0.75))
        return cls(
            median=float(median),
            lower=float(lower),
            upper=float(upper),
            fastest=float(min(seconds)),
            runs=len(seconds),
            threads=threads,
            delegate=delegate,
            size=size,
            **fields,
        )

    def __str__(self) -> str:
        return (
            f"{1e3 * self.median:.3f} ms ({1e3 * self.lower:.3f} to {1e3 * self.upper:.3f}, "
            f"{self.runs} runs)"
        )

    def summary(self, print_fn: PrintFn | None = None, line_length: int | None = None) -> None:
        """Prints the figures, with the operators if there is a profile.

        Args:
            print_fn: Called with the text; default: standard output, in colour on a terminal.
            line_length: Width of the table in characters; default: the terminal's.
        """
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        kernels = "XNNPACK" if self.delegate else "built-in kernels"
        title = f"{self.size:,} bytes, {threads}, {kernels}: {self}"
        known = [row.median for row in self.operators if row.median is not None]
        total = sum(known)
        rows = [
            [
                f"{row.name} ({row.output})",
                "×".join(map(str, row.shape)),
                "–" if row.median is None else f"{1e3 * row.median:.3f}",
                "–" if row.median is None else f"{row.median / total:.1%}",
            ]
            for row in self.operators
        ]
        if not rows:
            (print_fn or print)(title)
            return
        print_table(
            title,
            ["Operator (output)", "Output shape", "ms", "Share"],
            rows,
            [
                f"Sum of the operators, each run by itself: {1e3 * total:.3f} ms",
                *(["–: does not run by itself"] if len(known) < len(rows) else []),
            ],
            print_fn=print_fn,
            line_length=line_length,
        )


def benchmark(
    file: File,
    *,
    threads: int = 1,
    runs: int = 100,
    warmup: int = 10,
    delegate: bool = True,
    profile: bool = False,
    verbose: int = 1,
) -> Latency:
    """Measures how long a `.tflite` file takes for one run on this machine.

    The runtime's Python interface has no profiler. A `profile` is therefore made by cutting the
    file into one file for every operator (with its own weights, and with the operators that only
    unpack constants) and measuring each: what an operator takes alone, its inputs in the cache.
    Their sum differs from the whole, and is printed beside it.

    Args:
        file: Bytes of the file, or its path.
        threads: Integer. Number of threads. Defaults to 1.
        runs: Integer. Number of runs that are timed. Defaults to 100.
        warmup: Integer. Number of runs before that. Defaults to 10.
        delegate: Boolean. Whether XNNPACK, the runtime's default on CPUs, takes the operators
            that it knows; without it the built-in kernels do. Defaults to `True`.
        profile: Boolean. Whether to measure every operator too. Defaults to `False`.
        verbose: 0 for silence, else a progress bar is shown on a terminal. Defaults to 1.

    Returns:
        A `Latency`. Its `summary()` prints it.

    Raises:
        ImportError: If LiteRT is not installed.
        ValueError: If an argument is not as above, or the file does not run.

    Example:
    ```python
    content = keras_alds.litert.convert(model, verbose=0)
    keras_alds.litert.benchmark(content, runs=20, profile=True, verbose=0).summary()
    ```
    """
    check_counts(threads=threads, runs=runs, warmup=warmup)
    content = contents(file)
    check_runs(content, delegate=delegate)
    with Progress(transient=True, disable=not verbose) as progress:
        steps: list[Operator] = []
        if profile:
            record = read_file(content)
            steps = [step for step in record.operators if not record.is_constant(step)]
        task = progress.add_task("benchmark", total=1 + len(steps))
        runner = Runner(content, threads=threads, delegate=delegate)
        (seconds,) = time_together([runner], runs=runs, warmup=warmup)
        progress.advance(task)
        operators = []
        for step in steps:
            operators.append(
                OperatorTime(
                    name=step.name,
                    output=step.outputs[0].name if step.outputs else "",
                    shape=step.outputs[0].shape if step.outputs else (),
                    median=_alone(content, step, threads, delegate, runs, warmup),
                )
            )
            progress.advance(task)
    return Latency.of(
        seconds,
        threads=threads,
        delegate=delegate,
        size=len(content),
        operators=tuple(operators),
    )


def _alone(
    content: bytes, step: Operator, threads: int, delegate: bool, runs: int, warmup: int
) -> float | None:
    part = extract(content, step)
    if part is None:
        return None
    try:
        runner = Runner(part, threads=threads, delegate=delegate)
        (seconds,) = time_together([runner], runs=runs, warmup=warmup)
    except (RuntimeError, ValueError):
        return None  # an operator that needs state or a subgraph of the whole file
    return statistics.median(seconds)


def time_together(
    runners: Sequence[Runner], *, runs: int = 100, warmup: int = 10
) -> list[list[float]]:
    """Seconds of every run of some files, taken in turns, so that whatever else runs hits all.

    Before a run is timed, one that is not brings the file's weights back into the cache.

    Args:
        runners: The files, loaded.
        runs: Number of runs that are timed, for each.
        warmup: Number of runs before that, for each.

    Returns:
        One list of seconds for every runner; runs of one position belong together.
    """
    for runner in runners:
        runner.set_random_inputs()
        for _ in range(warmup):
            runner.invoke()
    found: list[list[float]] = [[] for _ in runners]
    for _ in range(runs):
        for runner, seconds in zip(runners, found, strict=True):
            if len(runners) > 1:
                runner.invoke()
            start = time.perf_counter()
            runner.invoke()
            seconds.append(time.perf_counter() - start)
    return found


def check_counts(**counts: Any) -> None:
    """Raises a ValueError unless every count is an integer of at least 1 (`warmup`: 0)."""
    for name, value in counts.items():
        least = 0 if name == "warmup" else 1
        try:
            number = -1 if isinstance(value, bool) else python_operator.index(value)
        except TypeError:
            number = -1
        if number < least:
            raise ValueError(
                f"Expected `{name}` to be an integer >= {least}. Received: {name}={value!r}"
            )

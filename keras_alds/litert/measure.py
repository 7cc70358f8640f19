"""`benchmark`: times a file in the runtime of this machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from keras_alds.core.checks import int_at_least, positive_int
from keras_alds.litert.files import File, contents
from keras_alds.litert.runs import Runner, check_file, check_local
from keras_alds.progress import progress_bar
from keras_alds.tables import PrintFn


@dataclasses.dataclass(frozen=True)
class Latency:
    """The latency of a file; made by `keras_alds.litert.benchmark`.

    Attributes:
        median: Median seconds of one run.
        lower: Lower quartile: a quarter of the runs took less.
        upper: Upper quartile: a quarter of the runs took more.
        fastest: Seconds of the fastest run.
        runs: Number of timed runs.
        threads: Number of threads.
        target: `"litert"` if XNNPACK ran the operators that it supports, else
            `"litert-reference"`.
        size: Bytes of the file.
    """

    median: float
    lower: float
    upper: float
    fastest: float
    runs: int
    threads: int
    target: str
    size: int

    @classmethod
    def of(cls, seconds: Sequence[float], *, threads: int, target: str, size: int) -> Latency:
        """The record of the seconds per run."""
        lower, median, upper = np.quantile(seconds, (0.25, 0.5, 0.75))
        return cls(
            median=float(median),
            lower=float(lower),
            upper=float(upper),
            fastest=float(min(seconds)),
            runs=len(seconds),
            threads=threads,
            target=target,
            size=size,
        )

    @property
    def runtime(self) -> str:
        """The runtime that was measured, such as `"1 thread, XNNPACK"`."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{threads}, {'XNNPACK' if self.target == 'litert' else 'built-in kernels'}"

    def __str__(self) -> str:
        return (
            f"{1e3 * self.median:.3f} ms ({1e3 * self.lower:.3f} to {1e3 * self.upper:.3f}, "
            f"{self.runs} runs)"
        )

    def summary(self, print_fn: PrintFn | None = None) -> None:
        """Prints the figures.

        Args:
            print_fn: Called with the text. Defaults to `print`.
        """
        (print_fn or print)(f"{self.size:,} bytes, {self.runtime}: {self}")


def benchmark(
    file: File,
    *,
    threads: int = 1,
    runs: int = 100,
    warmup: int = 10,
    target: str = "litert",
    verbose: int = 1,
) -> Latency:
    """Measures how long one run of a `.tflite` file takes on this machine.

    Args:
        file: Bytes of the file, or its path.
        threads: Integer. Number of threads. Defaults to 1.
        runs: Integer. Number of timed runs. Defaults to 100.
        warmup: Integer. Number of untimed runs before them. Defaults to 10.
        target: `"litert"`, where XNNPACK runs the operators that it supports, as by default on
            CPUs, or `"litert-reference"`, the built-in kernels alone. Defaults to `"litert"`.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Returns:
        A `Latency`. Its `summary()` prints it.

    Raises:
        ImportError: If LiteRT is not installed.
        ValueError: If an argument is not as above, or the file does not run.

    Example:
    ```python
    content = keras_alds.litert.convert(model, verbose=0)
    keras_alds.litert.benchmark(content, runs=20, verbose=0).summary()
    ```
    """
    positive_int(threads, "threads")
    positive_int(runs, "runs")
    int_at_least(warmup, "warmup", 0)
    target = check_local(target)
    content = contents(file)
    check_file(content, targets=(target,))
    runner = Runner(content, threads=threads, target=target)
    with progress_bar(verbose) as progress:
        progress.add_task("benchmark", total=None)  # updating the bar would cost time
        (seconds,) = time_together([runner], runs=runs, warmup=warmup)
    return Latency.of(seconds, threads=threads, target=target, size=len(content))


def time_together(
    runners: Sequence[Runner], *, runs: int = 100, warmup: int = 10
) -> list[list[float]]:
    """Times several files alternately, so that other load on the machine affects all of them.

    An untimed run before each timed one brings the file's weights back into the cache.

    Returns:
        One list of seconds for every runner; entries at the same position belong together.
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

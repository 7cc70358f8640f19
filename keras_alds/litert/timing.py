"""Times `.tflite` files on machines where other programs run too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from keras_alds.litert.runs import Runner

#: Most bytes of the files that are measured together.
_BATCH_BYTES = 128_000_000
_ROUNDS = (5, 30)
_ROUNDS_NS = 10_000_000  # as many rounds as fill this time
#: Most bytes to sweep caches with; common processors have no larger cache.
MOST_SWEPT = 40_000_000


def clock(threads: int) -> Callable[[], int]:
    """Returns the clock for measurements, in nanoseconds.

    On one thread it is the thread's processor time, which other programs affect little. With
    several threads, or where the system's processor time is coarse, it is the wall clock.
    """
    if threads == 1 and time.get_clock_info("thread_time").resolution < 1e-6:
        return time.thread_time_ns
    return time.perf_counter_ns


def time_files(
    files: Sequence[Callable[[], bytes]],
    *,
    threads: int = 1,
    target: str = "litert",
    swept: int = 0,
) -> list[int]:
    """Measures the least time of one run of every file.

    The files take turns, so that a slow moment of the machine affects all of them.

    Args:
        files: Functions that make the files; few are held at a time.
        threads: Number of threads.
        target: As for `Runner`.
        swept: Bytes to read between two runs, like the rest of a model. If a model is larger than
            the caches, a layer's weights are not in them when it runs.

    Returns:
        Nanoseconds, one for every file.

    Raises:
        ImportError: If LiteRT is not installed.
        RuntimeError: If a file does not run.
    """
    sweep = np.zeros(min(swept, MOST_SWEPT) // 8 + 1)
    now = clock(threads)
    times: list[int] = []
    while len(times) < len(files):
        runners: list[Runner] = []
        held = 0
        while len(times) + len(runners) < len(files) and (not runners or held < _BATCH_BYTES):
            content = files[len(times) + len(runners)]()
            held += len(content)
            runners.append(Runner(content, threads=threads, target=target))
        times += _take_turns(runners, now, sweep)
    return times


def _take_turns(runners: list[Runner], now: Callable[[], int], sweep: np.ndarray) -> list[int]:
    inputs = [[np.zeros(d["shape"], d["dtype"]) for d in runner.inputs] for runner in runners]

    def run(index: int) -> int:
        runner = runners[index]
        sweep.sum()
        runner.get_outputs()  # stays in the caches, as between the layers of a model
        runner.set_inputs(inputs[index])
        start = now()
        runner.invoke()
        return now() - start

    # A first run prepares the weights, and allocates outputs of dynamic size.
    for runner, arrays in zip(runners, inputs, strict=True):
        runner.set_inputs(arrays)
        runner.invoke()
    least = [run(index) for index in range(len(runners))]
    rounds = [int(np.clip(_ROUNDS_NS // max(t, 1), *_ROUNDS)) for t in least]
    for turn in range(max(rounds, default=0)):
        for index, count in enumerate(rounds):
            if turn < count:
                least[index] = min(least[index], run(index))
    return least

"""How long `.tflite` files take, where other programs run too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from keras_alds.litert.runs import Runner

#: What is measured at once may hold so many bytes.
_BATCH_BYTES = 128_000_000
_ROUNDS = (5, 30)
_ROUNDS_NS = 10_000_000  # as many rounds as fill this time
#: Caches are swept with at most so much: the largest cache of common processors is not larger.
MOST_SWEPT = 40_000_000


def clock(threads: int) -> Callable[[], int]:
    """The clock of measurements, in nanoseconds.

    On one thread it is the thread's processor time, to which other programs add little. A runtime
    of several threads, and systems that count processor time coarsely, take the wall clock.
    """
    if threads == 1 and time.get_clock_info("thread_time").resolution < 1e-6:
        return time.thread_time_ns
    return time.perf_counter_ns


def time_files(
    files: Sequence[Callable[[], bytes]],
    *,
    threads: int = 1,
    delegate: bool = True,
    swept: int = 0,
) -> list[int]:
    """Least time of one run of every file.

    The files take turns, so that a slow moment of the machine meets all of them.

    Args:
        files: Functions that make the files; few are held at a time.
        threads: Number of threads.
        delegate: Whether XNNPACK is used.
        swept: Bytes that are read between two runs, as the rest of a model would be: weights of a
            model that is larger than the caches are not in them when their layer's turn comes.

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
            runners.append(Runner(content, threads=threads, delegate=delegate))
        times += _take_turns(runners, now, sweep)
    return times


def _take_turns(runners: list[Runner], now: Callable[[], int], sweep: np.ndarray) -> list[int]:
    inputs = [[np.zeros(d["shape"], d["dtype"]) for d in runner.inputs] for runner in runners]

    def run(index: int) -> int:
        runner = runners[index]
        sweep.sum()
        runner.get_outputs()  # what the layers before and after leave in the caches
        runner.set_inputs(inputs[index])
        start = now()
        runner.invoke()
        return now() - start

    # A first run prepares the weights, and makes outputs whose size the file leaves open.
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

"""Times `.tflite` files on machines where other programs run too."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from keras_alds.litert.runs import Runner

#: Most bytes of the files that are measured together.
_BATCH_BYTES = 128_000_000
_ROUNDS = (3, 20)
_ROUNDS_NS = 6_000_000  # as many rounds as fill this time
#: A time counts as reproduced if a second measurement is above it by at most this fraction.
REPRODUCED = 0.03
#: Most bytes to sweep caches with; common processors have no larger cache.
MOST_SWEPT = 40_000_000


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a file takes, and how well this is known.

    Attributes:
        nanoseconds: The least time that was reproduced: another measurement is at most 3 % above
            it. A single lucky measurement does not count. If none was reproduced, the least time.
        repeats: Number of measurements.
        spread: The difference of the first two measurements, as a fraction of `nanoseconds`. It
            does not shrink as more are made, until two agree by chance. None if there was only one.
    """

    nanoseconds: int
    repeats: int = 1
    spread: float | None = None

    @classmethod
    def of(cls, times: Sequence[float], overhead: float = 0) -> Timing:
        """The record of some measurements.

        Args:
            times: Nanoseconds.
            overhead: What every one of them contains besides the file's own time.

        Example:
            >>> Timing.of([112, 110, 130], overhead=10)
            Timing(nanoseconds=100, repeats=3, spread=0.02)
            >>> Timing.of([132, 80, 130])
            Timing(nanoseconds=130, repeats=3, spread=0.4)
        """
        net = max(round(_reproduced(times) - overhead), 1)
        spread = round(abs(times[0] - times[1]) / net, 4) if len(times) > 1 else None
        return cls(net, len(times), spread)

    @property
    def noise(self) -> float:
        """The spread in nanoseconds, 0 if it is not known."""
        return (self.spread or 0) * self.nanoseconds


class Repeats:
    """Files that are measured again until their times are reproduced.

    Every measurement loads the file anew, because a file's place in memory affects its time.

    Args:
        measure: Measures the files of some keys once each, in nanoseconds.
        reference: The key of a file that the others are compared with. They need not be known
            better than to 3 % of its time. Defaults to None: each to 3 % of its own.
    """

    def __init__(
        self, measure: Callable[[Sequence[Any]], Sequence[int]], reference: Hashable = None
    ) -> None:
        self._measure = measure
        self._reference = reference
        self._times: dict[Hashable, list[int]] = {}

    def times(self, keys: Sequence[Any], count: int) -> list[int]:
        """The times of some files; measures those that are not settled, up to `count` times."""
        while new := [
            key for key in keys if len(self._times.get(key, ())) < count and not self.settled(key)
        ]:
            for key, found in zip(new, self._measure(new), strict=True):
                self._times.setdefault(key, []).append(int(found))
        return [int(_reproduced(self._times[key])) for key in keys]

    def settled(self, key: Hashable) -> bool:
        """Whether the least time of a file was reproduced."""
        scale = min(self._times.get(self._reference, [0]))
        least, *others = sorted(self._times.get(key, [0]))
        return bool(others) and others[0] - least <= REPRODUCED * max(least, scale)

    def timing(self, key: Hashable, overhead: int = 0) -> Timing:
        """The record of a file's measurements."""
        return Timing.of(self._times[key], overhead)


def _reproduced(times: Sequence[float]) -> float:
    """The least time that another one is near, else the least."""
    pairs = itertools.pairwise(sorted(times))
    near = (time for time, other in pairs if other - time <= REPRODUCED * time)
    return next(near, min(times))


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

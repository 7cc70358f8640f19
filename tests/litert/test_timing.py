"""Repeated measurements: when a time counts as reproduced, and how well it is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytest.importorskip("ai_edge_litert")

from keras_alds.litert.timing import Repeats, Timing


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([500], Timing(500, 1, None)),
        ([510, 500], Timing(500, 2, 0.02)),
        ([900, 500, 505], Timing(500, 3, 0.8)),  # a busy moment
        ([900, 1000, 400, 920], Timing(900, 4, 0.1111)),  # one lucky measurement
        ([900, 500, 700], Timing(500, 3, 0.8)),  # no two agree
        ([0, 0], Timing(1, 2, 0.0)),
    ],
)
def test_the_least_time_that_is_reproduced_counts(times: list[int], expected: Timing):
    assert Timing.of(times) == expected


def test_noise_is_that_of_the_time_without_the_overhead():
    timing = Timing.of([1000, 1010], overhead=900)
    assert timing == Timing(100, 2, 0.1)
    assert timing.noise == 10
    assert Timing(100).noise == 0


def test_files_are_measured_until_their_times_are_reproduced():
    series = {
        "quiet": [100, 101, 50],
        "busy once": [100, 180, 102, 50],
        "lucky": [100, 50, 101, 102, 103, 50],
        "busy": [100, 110, 121, 133, 146, 50],
    }
    asked: list[str] = []

    def measure(keys: Sequence[str]) -> list[int]:
        found = [series[key][asked.count(key)] for key in keys]
        asked.extend(keys)
        return found

    repeats = Repeats(measure)
    assert repeats.times(["quiet", "busy"], 1) == [100, 100]
    assert not repeats.settled("quiet")
    assert not repeats.settled("unknown")
    # A file that is asked for later is measured as often.
    assert repeats.times(["busy once", "quiet"], 2) == [100, 100]
    assert [asked.count(key) for key in series] == [2, 2, 0, 1]
    assert repeats.settled("quiet")
    assert not repeats.settled("busy once")
    assert repeats.times(list(series), 5) == [100, 100, 100, 100]
    assert [asked.count(key) for key in series] == [2, 3, 5, 5]
    assert [repeats.settled(key) for key in series] == [True, True, False, False]
    assert repeats.timing("busy").repeats == 5


def test_times_need_not_be_known_better_than_to_a_part_of_the_reference():
    series = {"dense": [1000, 1001], "small": [100, 120], "large": [2000, 2050], "wide": [500, 550]}
    asked: list[str] = []

    def measure(keys: Sequence[str]) -> list[int]:
        found = [series[key][asked.count(key)] for key in keys]
        asked.extend(keys)
        return found

    repeats = Repeats(measure, "dense")
    repeats.times(list(series), 2)
    assert [repeats.settled(key) for key in series] == [True, True, True, False]

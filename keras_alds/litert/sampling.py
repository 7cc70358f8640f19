"""Estimates a layer's latency at every rank from as few measurements as possible."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from keras_alds.core.costs import DENSE, NEVER, Point, SampledCosts

#: The allowed ranks of a layer, ascending, by number of slices and fold scheme.
Ranks = Mapping[tuple[int, int], Sequence[int]]
#: Measures some choices of one layer, in nanoseconds.
Measure = Callable[[Sequence[Point]], Sequence[int]]

# Ranks between two measured ones count as known if the two differ by no more than this fraction
# of the dense layer's latency.
_TOLERANCE = 0.04
_DOMINATED_IN_A_ROW = 2


def sample_costs(measure: Measure, ranks: Ranks) -> SampledCosts:
    """Measures the choices of a layer at some ranks.

    Latency is a staircase over the rank. Its steps begin after multiples of a power of two, as
    wide as the runtime's tiles. If two measured ranks differ by more than the tolerance, the rank
    between them that is a multiple of the largest power of two is measured, and the next one.
    Unless both lie on the straight line, each part is refined again.

    Useless numbers of slices are skipped: none of their choices is faster than the dense layer, or
    each costs as much as one slice of the same total rank, which keeps more of the kernel. Two
    such numbers in a row end the search, except for the largest k. A fold scheme is skipped if its
    smallest rank is not faster than the dense layer. One that is slower than others is not: it may
    keep more of the kernel, which depends on the weights.
    """
    layer = _Layer(measure)
    ends = [(k, j, s) for (k, s), row in ranks.items() if k == 1 for j in {row[0], row[-1]}]
    layer.known([DENSE, *ends])
    useful: list[tuple[int, int]] = []
    useless = 0
    last = max((k for k, scheme in ranks if not scheme), default=0)
    for k, scheme in sorted(ranks, key=lambda key: key[::-1]):
        row = ranks[k, scheme]
        if scheme and not layer.faster((k, row[0], scheme)):
            continue
        if not scheme and useless == _DOMINATED_IN_A_ROW and k != last:
            continue
        probes = [(k, rank, 0) for rank in sorted({row[0], row[len(row) // 2], row[-1]})]
        if not scheme and k > 1 and layer.dominated(probes, (1, 0) in useful):
            useless += 1
            continue
        useless = 0
        layer.refine(k, scheme, row)
        useful.append((k, scheme))
    points = {p: t for p, t in layer.times.items() if p == DENSE or (p[0], p[2]) in useful}
    return SampledCosts.of_points(points)


class _Layer:
    """The latencies of one layer that are known so far."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self.times: dict[Point, int] = {}

    def known(self, points: Sequence[Point]) -> list[int]:
        """The latencies of some choices; measures those that are not known."""
        new = [point for point in dict.fromkeys(points) if point not in self.times]
        self.times.update(zip(new, map(int, self._measure(new)) if new else (), strict=True))
        return [self.times[point] for point in points]

    def faster(self, point: Point) -> bool:
        """Whether a choice is faster than the dense layer."""
        dense, time = self.known([DENSE, point])
        return time < dense

    def dominated(self, probes: Sequence[Point], compare: bool) -> bool:
        """Whether choices are slower than the dense layer or one slice of the same total rank."""
        if not self.faster(probes[0]):
            return True
        one = SampledCosts.of_points({p: t for p, t in self.times.items() if p[0] <= 1})
        for (k, rank, _), time in zip(probes, self.known(probes), strict=True):
            same = int(one.of(1, [k * rank])[0]) if compare else NEVER
            if time < min(self.times[DENSE], same):
                return False
        return True

    def refine(self, k: int, scheme: int, ranks: Sequence[int]) -> None:
        """Measures until the latency at every rank is known within the tolerance."""
        points = [(k, rank, scheme) for rank in ranks]
        (dense,) = self.known([DENSE])
        self.known([points[0], points[-1]])
        measured = [i for i, point in enumerate(points) if point in self.times]
        gaps = list(itertools.pairwise(measured))
        while gaps:
            splits = []
            for a, b in gaps:
                low, high = self.times[points[a]], self.times[points[b]]
                if b - a > 1 and low < dense and abs(high - low) > _TOLERANCE * dense:
                    middle = max(
                        range(a + 1, b), key=lambda i: (ranks[i] & -ranks[i], -abs(2 * i - a - b))
                    )
                    splits.append((a, [i for i in (middle, middle + 1) if i < b], b))
            self.known([points[i] for _, inner, _ in splits for i in inner])
            gaps = []
            for a, inner, b in splits:
                found = [self.times[points[i]] for i in (a, *inner, b)]
                line = np.interp(
                    [ranks[i] for i in inner], [ranks[a], ranks[b]], [found[0], found[-1]]
                )
                if np.abs(line - found[1:-1]).max() > _TOLERANCE / 2 * dense:
                    ends = [a, *inner, b]
                    gaps += itertools.pairwise(ends)

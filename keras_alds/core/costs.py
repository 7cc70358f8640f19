"""Costs of the choices for a layer: from their weights, or measured at some ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.chains import stage_weights

Int64 = NDArray[np.int64]
#: The cost of a forbidden choice.
NEVER = int(np.iinfo(np.int64).max)


class Costs(Protocol):
    """Costs of the choices for one layer in one budget."""

    @property
    def dense(self) -> int:
        """Cost of the unchanged layer."""

    def of(self, slices: int, ranks: Any, scheme: int = 0) -> Int64:
        """Costs of choices with one number of slices and one fold scheme, `[n]`."""


@dataclass(frozen=True)
class WeightCosts:
    """Costs that are proportional to weights: parameters, or multiply–accumulates.

    A weight costs 1 as a parameter. In multiply–accumulates it costs 1 per position at which it
    is used. In some fold schemes encoder and decoder differ in their number of positions.

    Attributes:
        forms: Tuples `(scheme, kernel_shape, units)`: the kernel's shape in the fold scheme, and
            the cost of a weight of the encoder; of a chain, one for each convolution but the last,
            or one for all of them.
        unit: Cost of a weight of the decoder or of the dense kernel.
        added: Cost of every factorized form besides its weights, such as a bias that the dense
            layer lacks.

    Example:
        >>> costs = WeightCosts(((0, (3, 3, 8, 16), 10),), unit=10)
        >>> costs.dense, costs.of(2, [1, 4]).tolist()
        (11520, [1040, 4160])
    """

    forms: tuple[tuple[int, tuple[int, ...], int | tuple[int, ...]], ...]
    unit: int = 1
    added: int = 0

    @property
    def dense(self) -> int:
        """Cost of the unchanged layer."""
        return self.unit * math.prod(self.forms[0][1])

    def of(self, slices: int, ranks: Any, scheme: int = 0) -> Int64:
        """Returns the costs of choices.

        Args:
            slices: Number of slices k.
            ranks: Ranks j, a sequence of integers.
            scheme: Fold scheme, one of the `forms`.

        Returns:
            Array `[n]` of int64.
        """
        shape, units = next((s, unit) for known, s, unit in self.forms if known == scheme)
        *stages, last = stage_weights(shape, slices, np.asarray(list(ranks), np.int64), scheme)
        others = (units,) * len(stages) if isinstance(units, int) else units
        costs = sum(unit * part for unit, part in zip(others, stages, strict=True))
        return costs + self.unit * last + self.added


#: A choice: number of slices k, rank j and fold scheme.
Point = tuple[int, int, int]
#: The unchanged layer.
DENSE: Point = (0, 0, 0)


@dataclass(frozen=True)
class SampledCosts:
    """Costs of the choices for one layer, interpolated between some known ranks.

    For every fold scheme and number of slices k the cost is linear in the rank between neighbouring
    samples, and constant below the first one. A scheme or k without samples is forbidden, and so
    are ranks above the last sample.

    Attributes:
        dense: Cost of the unchanged layer.
        samples: Tuples `(scheme, k, ranks, costs)`, ascending in scheme, k and the ranks.
        step: What a choice saves against the unchanged layer is rounded down to multiples of it,
            so that smaller differences do not count.

    Raises:
        ValueError: If the samples are not such tuples, a cost is negative or the step is below 1.
    """

    dense: int
    samples: tuple[tuple[int, int, tuple[int, ...], tuple[int, ...]], ...]
    step: int = 1

    def __post_init__(self) -> None:
        rows = [(scheme, k) for scheme, k, _, _ in self.samples]
        if (
            any(len(ranks) != len(costs) or not ranks for *_, ranks, costs in self.samples)
            or any(list(ranks) != sorted(set(ranks)) for *_, ranks, _ in self.samples)
            or rows != sorted(set(rows))
            or min([self.dense, *(min(costs) for *_, costs in self.samples)]) < 0
            or self.step < 1
        ):
            raise ValueError(
                "Expected samples (scheme, slices, ranks, costs) with ascending schemes, slices "
                "and ranks, costs of at least 0 and a step of at least 1. Received: "
                f"dense={self.dense}, samples={self.samples}, step={self.step}"
            )

    @classmethod
    def of_points(cls, points: Mapping[Point, int]) -> SampledCosts:
        """Returns the costs that interpolate the given points.

        Args:
            points: Costs by `(slices, rank, scheme)`; `(0, 0, 0)` is the unchanged layer.

        Raises:
            ValueError: If the cost of the unchanged layer is missing.

        Example:
            >>> SampledCosts.of_points({(0, 0, 0): 9, (1, 8, 0): 6, (1, 4, 0): 2}).samples
            ((0, 1, (4, 8), (2, 6)),)
        """
        if DENSE not in points:
            raise ValueError(
                f"Expected the cost of the dense layer, at (0, 0, 0). Received: {sorted(points)}"
            )
        rows: dict[tuple[int, int], dict[int, int]] = {}
        for (k, rank, scheme), cost in sorted(points.items()):
            if k:
                rows.setdefault((scheme, k), {})[rank] = int(cost)
        return cls(
            int(points[DENSE]),
            tuple((*key, tuple(rows[key]), tuple(rows[key].values())) for key in sorted(rows)),
        )

    @property
    def points(self) -> dict[Point, int]:
        """The costs by `(slices, rank, scheme)`, starting with the unchanged layer."""
        points = {DENSE: self.dense}
        for scheme, k, ranks, costs in self.samples:
            points.update(((k, j, scheme), cost) for j, cost in zip(ranks, costs, strict=True))
        return points

    def of(self, slices: int, ranks: Any, scheme: int = 0) -> Int64:
        """Returns the costs of choices, rounded up to whole steps below the unchanged layer.

        Args:
            slices: Number of slices k.
            ranks: Ranks j, a sequence of integers.
            scheme: Fold scheme.

        Returns:
            Array `[n]` of int64; `NEVER` for forbidden choices.

        Example:
            >>> costs = SampledCosts.of_points({(0, 0, 0): 9, (1, 8, 0): 6, (1, 4, 0): 2})
            >>> costs.of(1, [2, 4, 5, 8]).tolist(), bool(costs.of(1, [9])[0] == NEVER)
            ([2, 2, 3, 6], True)
        """
        asked = np.asarray(list(ranks), np.int64)
        for *key, known, costs in self.samples:
            if key == [scheme, slices]:
                saved = np.floor((self.dense - np.interp(asked, known, costs)) / self.step)
                cost = self.dense - self.step * saved.astype(np.int64)
                return np.where(asked <= known[-1], cost, NEVER)
        return np.full(asked.shape, NEVER, np.int64)

    def smoothed(self, step: int = 1) -> SampledCosts:
        """Returns the costs without the noise of their measurement.

        Along the ranks they become the nearest costs, by squared differences, that never fall. A
        larger rank is then not taken to be faster because it was measured at a better moment.

        Args:
            step: The noise: smaller differences do not count.

        Example:
            >>> noisy = SampledCosts.of_points({(0, 0, 0): 99, (1, 2, 0): 41, (1, 3, 0): 37})
            >>> noisy.smoothed().points
            {(0, 0, 0): 99, (1, 2, 0): 39, (1, 3, 0): 39}
            >>> noisy.smoothed(step=20).of(1, [2, 3])
            array([39, 39])
        """
        samples = tuple((s, k, ranks, _never_falling(costs)) for s, k, ranks, costs in self.samples)
        return SampledCosts(self.dense, samples, max(step, 1))


def _never_falling(values: Sequence[int]) -> tuple[int, ...]:
    """The nearest sequence that never falls: neighbours that fall are replaced by their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (second, m), (first, n) = pools.pop(), pools.pop()
            pools.append(((first * n + second * m) / (n + m), n + m))
    return tuple(round(mean) for mean, count in pools for _ in range(count))


def sum_costs(parts: Sequence[tuple[int, SampledCosts]]) -> SampledCosts:
    """Returns the costs of a layer that is called several times, on inputs of several sizes.

    Args:
        parts: Pairs of a number of calls and the costs of one call.

    Returns:
        The sum of the costs. A choice is allowed only if every call allows it.

    Raises:
        ValueError: If there are no calls.

    Example:
        >>> once = SampledCosts.of_points({(0, 0, 0): 9, (1, 8, 0): 6, (1, 4, 0): 2})
        >>> sum_costs([(2, once), (1, once)]).points
        {(0, 0, 0): 27, (1, 4, 0): 6, (1, 8, 0): 18}
    """
    if not parts:
        raise ValueError("Expected at least one call. Received: none")
    tables = [{(k, s): ranks for s, k, ranks, _ in costs.samples} for _, costs in parts]
    points = {DENSE: sum(count * costs.dense for count, costs in parts)}
    for k, scheme in set.intersection(*(set(table) for table in tables)):
        known = [table[k, scheme] for table in tables]
        last = min(ranks[-1] for ranks in known)
        ranks = sorted({rank for row in known for rank in row if rank <= last})
        total = np.sum([count * costs.of(k, ranks, scheme) for count, costs in parts], axis=0)
        points.update(
            ((k, rank, scheme), int(cost)) for rank, cost in zip(ranks, total, strict=True)
        )
    return SampledCosts.of_points(points)

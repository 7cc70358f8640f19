"""Moves cost between the layers of a plan while that brings the outputs nearer.

A layer's curve is measured with all other layers exact. In a compressed network, an error of the
same layer has another effect. So each layer of a plan alone is made cheaper and dearer, with all
others as the plan has them. These effects correct the curves, and the problem is solved again, near
the plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from keras_alds.core.choices import ChoiceTable, Int64
from keras_alds.core.spectra import Float64
from keras_alds.models.probes import Kernels, Prober
from keras_alds.models.selection import Selection
from keras_alds.models.trials import approximations, weighed

#: How often the effects of all layers are measured, at most.
ROUNDS = 3
# The most by which a layer's cost is multiplied or divided in the first round.
_RATIO = 1.5
# Measured effects are noisy: the corrections are bounded, and their square roots are tried too.
_LARGEST_CORRECTION, _POWERS = 6.0, (1.0, 0.5)

#: The row of each layer's table that a plan takes.
Rows = tuple[int, ...]


class CostExchange:
    """A plan whose layers exchange cost.

    Args:
        selection: The selection problem, with curves.
        tables: The choices of its candidates.
        weighing: How errors are weighed.
        probing: Measures the effects of single layers.
        judging: Compares whole plans, on other examples if there are enough.
        progress: Called after each layer of a round.
    """

    def __init__(
        self,
        selection: Selection,
        tables: Sequence[ChoiceTable],
        weighing: str,
        probing: Prober,
        judging: Prober,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._selection, self._tables = selection, tables
        self._records = selection.inventory.candidates
        self._weighed = weighed(tables, self._records, weighing)
        self._probing, self._judging, self._progress = probing, judging, progress

    def improved(self, rows: Sequence[int], kernels: Kernels) -> tuple[Rows, Kernels]:
        """The best plan that is found, and its kernels; at worst the given one.

        Args:
            rows: The rows of the tables that a plan takes.
            kernels: Its kernels, fitted without the held-out examples.
        """
        best, ratio = tuple(rows), _RATIO
        least, tried = self._judging.discrepancy(kernels), {best}
        start: Rows | None = None
        corrections = np.ones(len(best))
        for _ in range(ROUNDS):
            if best != start:
                corrections = self._corrections(best, kernels, math.sqrt(ratio))
            start, of_start = best, kernels
            for limit in (ratio, math.sqrt(ratio)):
                for power in _POWERS:
                    new = self._solved(start, corrections**power, limit)
                    if new in tried:
                        continue
                    tried.add(new)
                    of_new = self._changed(start, of_start, new)
                    discrepancy = self._judging.discrepancy(of_new)
                    if discrepancy < least:
                        least, best, kernels = discrepancy, new, of_new
            if best == start:
                ratio = math.sqrt(ratio)
        return best, kernels

    def _changed(self, rows: Rows, kernels: Kernels, new: Sequence[int]) -> Kernels:
        """The kernels of a plan, from those of another one."""
        changed = [index for index, row in enumerate(new) if row != rows[index]]
        records = [self._records[index] for index in changed]
        choices = [self._tables[index][new[index]] for index in changed]
        gone = {record.layer for record in records}  # some are dense in the new plan
        kept = {layer: kernel for layer, kernel in kernels.items() if layer not in gone}
        return {**kept, **approximations(records, choices)}

    def _solved(self, rows: Rows, corrections: Float64, ratio: float) -> Rows:
        """The best rows near those of a plan."""
        near = [_near(t, row, ratio) for t, row in zip(self._weighed, rows, strict=True)]
        tables = [
            dataclasses.replace(table := whole.take(some), error=table.error * correction)
            for whole, some, correction in zip(self._weighed, near, corrections, strict=True)
        ]
        found = self._selection.solve(tables).indices
        return tuple(int(some[index]) for some, index in zip(near, found, strict=True))

    def _corrections(self, rows: Rows, kernels: Kernels, ratio: float) -> Float64:
        """What every layer's weighted error is to be multiplied with."""
        own = self._probing.discrepancy(kernels)
        effects = np.full(len(rows), np.nan)

        def with_row(index: int, row: int) -> float:
            new = (*rows[:index], row, *rows[index + 1 :])
            changed = self._changed(rows, kernels, new)
            return own if new == rows else self._probing.discrepancy(changed)

        for index, (table, row) in enumerate(zip(self._weighed, rows, strict=True)):
            cheapest, dearest = _ends(table, row, ratio)
            more = table.error[cheapest] - table.error[dearest]
            if more > 0:
                differ = with_row(index, cheapest) - with_row(index, dearest)
                effects[index] = differ / more
            self._progress()
        rising = effects[np.isfinite(effects) & (effects > 0)]
        if not len(rising):
            return np.ones(len(rows))
        # A layer whose larger error seems to help, by noise or by chance, counts least.
        relative = np.where(np.isfinite(effects), effects / np.median(rising), 1.0)
        return np.clip(relative, 1 / _LARGEST_CORRECTION, _LARGEST_CORRECTION)


def _ends(table: ChoiceTable, row: int, ratio: float) -> tuple[int, int]:
    """The cheapest and the dearest of the best rows near one of them."""
    near = _near(table, row, ratio)
    front = near[table.take(near).front_rows()]
    return int(front[0]), int(front[-1])


def _near(table: ChoiceTable, row: int, ratio: float) -> Int64:
    """The rows that cost at most so many times as much, or as little, as one of them."""
    cost = table.cost[:, 0]
    return np.flatnonzero((cost <= cost[row] * ratio) & (cost * ratio >= cost[row]))

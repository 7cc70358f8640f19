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
from typing import Any

import numpy as np

from keras_alds.core.choices import Choice, ChoiceTable, Int64
from keras_alds.core.parallel import threads
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Float64
from keras_alds.models.curves import approximation
from keras_alds.models.inventory import LayerRecord
from keras_alds.models.probes import Kernels, Prober
from keras_alds.models.selection import Selection
from keras_alds.models.trials import approximations, weighed

#: How often the effects of all layers are measured, at most.
ROUNDS = 3
# So many times as cheap or dear a layer becomes in a round, and the least for another round.
_FARTHEST, _NEAREST = 1.5, 1.1
# Measured effects are noisy: the corrections are bounded, and their square roots are tried too.
_LARGEST_CORRECTION, _POWERS = 6.0, (1.0, 0.5)


class Exchange:
    """A plan whose layers exchange cost.

    Args:
        selection: The selection problem, with curves.
        tables: The choices of its candidates.
        weighing: How errors are weighed.
        probing: Measures the effects of single layers.
        judging: Compares whole plans, on other examples.
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

    def improved(self, rows: Sequence[int]) -> tuple[tuple[int, ...], Kernels] | None:
        """A better choice by layer, and its kernels; None if none is found.

        Args:
            rows: The rows of the tables that the plan takes.
        """
        best, kernels, farthest = tuple(rows), self._kernels(rows), _FARTHEST
        least = first = self._judging.apart(kernels)
        for _ in range(ROUNDS):
            corrections = self._corrections(best, kernels, farthest)
            found = []
            for times in (farthest, math.sqrt(farthest)):
                for power in _POWERS:
                    new = self._solved(best, corrections**power, times)
                    of_new = self._kernels(new)
                    found.append((self._judging.apart(of_new), new, of_new))
            nearest = min(found, key=lambda one: one[0])
            if nearest[0] < least:
                least, best, kernels = nearest
            elif (farthest := math.sqrt(farthest)) < _NEAREST:
                break
        return (best, kernels) if least < first else None

    def _kernels(self, rows: Sequence[int]) -> Kernels:
        chosen = [table[row] for table, row in zip(self._tables, rows, strict=True)]
        return approximations(self._records, chosen)

    def _solved(self, rows: Sequence[int], corrections: Float64, times: float) -> tuple[int, ...]:
        """The best rows near those of a plan."""
        near = [_near(t, row, times) for t, row in zip(self._weighed, rows, strict=True)]
        tables = [
            dataclasses.replace(table := whole.take(some), error=table.error * correction)
            for whole, some, correction in zip(self._weighed, near, corrections, strict=True)
        ]
        found = self._selection.solve(tables).indices
        return tuple(int(some[index]) for some, index in zip(near, found, strict=True))

    def _corrections(self, rows: Sequence[int], kernels: Kernels, times: float) -> Float64:
        """What every layer's weighted error is to be multiplied with."""
        own = self._probing.apart(kernels)
        effects = np.full(len(rows), np.nan)
        with threads() as pool:
            for index, (record, row) in enumerate(zip(self._records, rows, strict=True)):
                table, errors = self._tables[index], self._weighed[index].error
                ends = _ends(self._weighed[index], row, math.sqrt(times))
                made = list(pool.map(_kernel, (record, record), (table[end] for end in ends)))
                found = [
                    own if end == row else self._probing.apart(_with(kernels, record.layer, kernel))
                    for end, kernel in zip(ends, made, strict=True)
                ]
                if errors[ends[0]] > errors[ends[1]]:
                    effects[index] = (found[0] - found[1]) / (errors[ends[0]] - errors[ends[1]])
                self._progress()
        rising = effects[np.isfinite(effects) & (effects > 0)]
        if not len(rising):
            return np.ones(len(rows))
        relative = np.where(np.isfinite(effects), effects / np.median(rising), 1.0)
        return np.clip(relative, 1 / _LARGEST_CORRECTION, _LARGEST_CORRECTION)


def _kernel(record: LayerRecord, choice: Choice) -> Array | None:
    return None if choice.keep else approximation(record, choice)


def _with(kernels: Kernels, layer: Any, kernel: Array | None) -> Kernels:
    """The kernels with another one of a layer, or without one."""
    others = {known: kernels[known] for known in kernels if known is not layer}
    return others if kernel is None else {**others, layer: kernel}


def _ends(table: ChoiceTable, row: int, times: float) -> tuple[int, int]:
    """The cheapest and the dearest of the best rows near one of them."""
    near = _near(table, row, times)
    front = near[table.take(near).front_rows()]
    return int(front[0]), int(front[-1])


def _near(table: ChoiceTable, row: int, times: float) -> Int64:
    """The rows that cost at most so many times as much, or as little, as one of them."""
    cost = table.cost[:, 0]
    return np.flatnonzero((cost <= cost[row] * times) & (cost * times >= cost[row]))

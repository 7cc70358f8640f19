"""Makes several plans, and returns the one whose outputs are nearest to the original's."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

from keras_alds._backend.calls import replaced_calls
from keras_alds._backend.strategies import replica_count
from keras_alds.core.choices import ChoiceTable
from keras_alds.core.slicing import Array
from keras_alds.models.calibration import Calibration
from keras_alds.models.data import KeptExamples
from keras_alds.models.exchange import ROUNDS, CostExchange
from keras_alds.models.fit import TRIED_EXAMPLES, can_be_sequential, tried_one_by_one
from keras_alds.models.inventory import Inventory
from keras_alds.models.matching import Pairs, match
from keras_alds.models.moving_statistics import Drift
from keras_alds.models.probes import Kernels, Prober
from keras_alds.models.selection import Selection
from keras_alds.models.trials import EQUAL, WEIGHINGS, WITHOUT_DATA, approximations, judge, weighed
from keras_alds.plan import CompressionPlan
from keras_alds.progress import progress_bar

# A second plan is tried layer by layer if its outputs are at most so many times as far from the
# original's as those of the best one.
_NEAR = 1.5
# The part to which a distance is expected to shrink: with the sequential pass, as it is tried on
# some of the examples only; and with equal weights, into which no measurement on few has gone. A
# smaller power of the measured divergences is between the two. Moving statistics gain more on new
# examples than on those of the training, of which a network is too sure.
_WITH_MORE, _WITHOUT_NOISE, _CORRECTED = 0.9, 0.9, 0.95
# Logarithms of distances that differ by less are equal.
_EQUAL = 0.02
#: What is added to the name of a trial.
EXCHANGED, SEQUENTIAL, NORMALIZED = "exchanged", "sequential", "normalized"


def best_plan(
    selection: Selection,
    calibration: Calibration,
    without_data: Selection | None,
    sequential: bool | None,
    *,
    verbose: int = 1,
    stacklevel: int = 1,
) -> CompressionPlan:
    """The best of several plans, by the outputs on held-out examples.

    Errors are weighed in different ways, the factors are fitted at once or layer by layer, and a
    plan without data takes part. All factors are fitted without the held-out examples.

    Args:
        selection: The selection problem, with calibration statistics.
        calibration: The calibration data.
        without_data: The same problem as if there were no data, or None.
        sequential: As for `compress`.
        verbose: As for `compress`.
        stacklevel: The frame that warnings name; 1 is the caller of this function.

    Returns:
        The plan. Without examples, with random outputs, or with a method that has its own factors,
        it is the only one.

    Raises:
        ValueError: As for `Selection.plan`.
    """
    inventory, records = selection.inventory, selection.inventory.candidates
    judging = calibration.judging()
    judged = judging and any(record.judged for record in records)
    if not judged or selection.method.factorize_with_bias is not None:
        return selection.plan()
    prober = judge(inventory.model, records, judging)
    if prober.reference.is_random:
        warnings.warn(
            f"The outputs of the model '{inventory.model.name}' differ each time for the same "
            "examples, so plans cannot be compared by them, and all layers count the same. Let "
            "layers of Keras such as `Dropout`, or a `SeedGenerator`, draw the random numbers, or "
            "compress the model without its random layers.",
            stacklevel=stacklevel + 1,
        )
        return selection.plan()
    trials, tables = _Trials(prober), selection.tables()
    for weighing in selection.weighings:
        trials.add(selection, tables, weighing, weighing)
    if len(selection.weighings) > 1:  # there are curves
        trials.exchange(selection, tables, calibration.probing(), verbose)
    near = {name: _pairs(selection, trials.plans[name]) for name in trials.nearest()}
    if sequential is None:
        every = [pair for some in near.values() for pair in some]
        if not can_be_sequential(inventory, every, stacklevel=stacklevel + 1):
            sequential = False
    if sequential is not False:
        for name, pairs in near.items():
            kernels = tried_one_by_one(inventory, pairs, calibration, verbose)
            plan = dataclasses.replace(trials.plans[name], sequential=True)
            trials.note(f"{name}, {SEQUENTIAL}", plan, kernels)
            if not trials.is_nearer(f"{name}, {SEQUENTIAL}", name):
                break  # the other plan is alike
    if sequential is True:
        trials.plans = {name: plan for name, plan in trials.plans.items() if plan.sequential}
    if without_data is not None:
        tables, weighing = without_data.tables(), without_data.weighings[0]
        trials.add(without_data, tables, WITHOUT_DATA, weighing)
    if calibration.examples is not None and replica_count(inventory.model) == 1:
        trials.normalize(inventory, calibration.examples.fitted(TRIED_EXAMPLES))
    return trials.best()


class _Trials:
    """Plans, and how far their outputs are from the original's."""

    def __init__(self, prober: Prober) -> None:
        self._prober = prober
        self.plans: dict[str, CompressionPlan] = {}
        self._rows: dict[str, tuple[int, ...]] = {}
        self._distances: dict[str, float] = {}
        self._discrepancies: dict[str, float] = {}
        # The best plan so far and its kernels, of those fitted at once and of the sequential ones.
        self._kernels: dict[bool, tuple[str, Kernels]] = {}

    def add(
        self, selection: Selection, tables: Sequence[ChoiceTable], name: str, weighing: str
    ) -> None:
        """Tries the plan that a way to weigh errors gives, fitted at once."""
        records = selection.inventory.candidates
        solution = selection.solve(weighed(tables, records, weighing))
        plan = selection.plan_of(tables, solution.indices, weighing)
        if any(other.choices == plan.choices for other in self.plans.values()):
            return
        chosen = [table[row] for table, row in zip(tables, solution.indices, strict=True)]
        self._rows[name] = solution.indices
        self.note(name, plan, approximations(records, chosen))

    def exchange(
        self,
        selection: Selection,
        tables: Sequence[ChoiceTable],
        probing: Sequence[Any],
        verbose: int,
    ) -> None:
        """Tries the best plan with cost exchanged between its layers."""
        name, inventory = self._best_name(), selection.inventory
        layers = [record.layer for record in inventory.candidates]
        prober, (_, kernels) = Prober(inventory.model, layers, probing), self._kernels[False]
        with progress_bar(verbose) as progress:
            task = progress.add_task("exchange", total=ROUNDS * len(layers))
            judges = prober, self._prober, lambda: progress.advance(task)
            exchange = CostExchange(selection, tables, name, *judges)
            rows, kernels = exchange.improved(self._rows[name], kernels)
        if rows != self._rows[name]:
            plan = selection.plan_of(tables, rows, name)
            self.note(f"{name}, {EXCHANGED}", plan, kernels)

    def note(self, name: str, plan: CompressionPlan, kernels: Kernels) -> None:
        """Measures how far the outputs are with the kernels of a plan."""
        self._measure(name, plan, self._prober.outputs(kernels))
        best, _ = self._kernels.setdefault(bool(plan.sequential), (name, kernels))
        if self._rank(name) < self._rank(best):
            self._kernels[bool(plan.sequential)] = name, kernels

    def _measure(self, name: str, plan: CompressionPlan, outputs: Sequence[Array]) -> None:
        self.plans[name] = plan
        self._distances[name] = self._prober.reference.distance(outputs)
        self._discrepancies[name] = self._prober.reference.discrepancy(outputs)

    def normalize(self, inventory: Inventory, examples: KeptExamples) -> None:
        """Tries the best plan with corrected moving statistics, from some examples."""
        drift, name = Drift(inventory.model), self._best_name()
        if name == WITHOUT_DATA:
            return
        best, kernels = self._kernels[bool(self.plans[name].sequential)]
        if not drift or best != name:
            return
        with replaced_calls(drift.original()):
            batches = [batch for batch, _ in examples]
            prober = judge(inventory.model, inventory.candidates, batches)
        with replaced_calls(drift.changed()):
            prober.outputs(kernels)
        with replaced_calls(drift.corrected()):
            outputs = self._prober.outputs(kernels)
        discrepancy = self._prober.reference.discrepancy(outputs)
        if math.isclose(discrepancy, self._discrepancies[name], rel_tol=1e-6):
            return  # no normalization is behind a changed layer
        plan = dataclasses.replace(self.plans[name], normalized=True)
        self._measure(f"{name}, {NORMALIZED}", plan, outputs)

    def is_nearer(self, name: str, other: str) -> bool:
        """Whether the outputs of one plan that was tried are nearer than those of another."""
        return self._discrepancies[name] < self._discrepancies[other]

    def nearest(self) -> list[str]:
        """The plans to try layer by layer: the best one, and one with equal weights.

        One after the other, layers make up for errors, and what each of them alone does to the
        outputs says less. If equal weights are too far, it is the second best plan.
        """
        names = [name for name in self.plans if f"{name}, {EXCHANGED}" not in self.plans]
        best, *others = sorted(names, key=self._expected)
        others.sort(key=lambda name: not name.startswith(EQUAL))
        near = [n for n in others if self._expected(n) <= _NEAR * self._expected(best)]
        return [best, *near[:1]]

    def best(self) -> CompressionPlan:
        """The best plan, and the first one among equals."""
        name = self._best_name()
        return dataclasses.replace(
            self.plans[name],
            sequential=bool(self.plans[name].sequential),
            normalized=bool(self.plans[name].normalized),
            distance=self._distances[name],
            trials={name: self._distances[name] for name in self.plans},
        )

    def _best_name(self) -> str:
        return min(self.plans, key=self._rank)

    def _rank(self, name: str) -> tuple[int, bool]:
        """The smaller, the better. Of plans that are nearly as near, equal weights come first."""
        return round(math.log(self._expected(name)) / _EQUAL), not name.startswith(EQUAL)

    def _expected(self, name: str) -> float:
        """How far the outputs are expected to be in the end."""
        weighing, *more = name.split(", ")
        power = WEIGHINGS.get(weighing, 1.0)
        part = (_WITH_MORE if SEQUENTIAL in more else 1.0) * (_WITHOUT_NOISE ** (1 - power))
        part *= _CORRECTED if NORMALIZED in more else 1.0
        return min(max(part * self._discrepancies[name], 1e-12), 1e12)  # it may be infinite


def _pairs(selection: Selection, plan: CompressionPlan) -> Pairs:
    """The layers that a plan factorizes, with second moments."""
    pairs = match(selection.inventory, plan)
    return [(record, choice) for record, choice in pairs if choice.factorized]

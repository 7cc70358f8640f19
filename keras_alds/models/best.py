"""Makes several plans, and returns the one whose outputs are nearest to the original's."""

from __future__ import annotations

import dataclasses
import math

from keras_alds.models.calibration import Calibration
from keras_alds.models.fit import can_be_sequential, tried_one_by_one
from keras_alds.models.matching import Pairs, match
from keras_alds.models.selection import Selection
from keras_alds.models.trials import WITHOUT_DATA, approximations, judge, weighed
from keras_alds.plan import CompressionPlan

# The best plans are also tried layer by layer: at most so many, with outputs at most so many
# times as far from the original's as the best ones.
_MOST, _NEAR = 2, 1.5
# How much nearer the sequential pass is expected to come with all examples than with those of the
# trial.
_WITH_MORE = 0.9
# Logarithms of divergences that differ by less are equal.
_EQUAL = 0.02


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
        The plan. Without examples, or with a method that has its own factors, it is the only one.

    Raises:
        ValueError: As for `Selection.plan`.
    """
    inventory, records = selection.inventory, selection.inventory.candidates
    judging = calibration.judging()
    judged = judging and any(record.judged for record in records)
    if not judged or selection.method.factorize_with_bias is not None:
        return selection.plan()
    prober = judge(inventory.model, records, judging)
    plans: dict[str, CompressionPlan] = {}
    found: dict[str, float] = {}

    def add(selection: Selection, name: str, weighing: str) -> None:
        tables = selection.tables()
        some = weighed(tables, selection.inventory.candidates, weighing)
        plan = selection.plan_of(tables, selection.solve(some), weighing)
        if any(other.choices == plan.choices for other in plans.values()):
            return
        kernels = approximations(selection.inventory.candidates, _choices(selection, plan))
        plans[name], found[name] = plan, prober.distance(kernels)

    for weighing in selection.weighings:
        add(selection, weighing, weighing)
    least = min(found.values())
    near = [name for name in sorted(found, key=found.__getitem__) if found[name] <= _NEAR * least]
    pairs = {name: _pairs(selection, plans[name]) for name in near[:_MOST]}
    if sequential is None:
        every = [pair for some in pairs.values() for pair in some]
        if not can_be_sequential(inventory, every, stacklevel=stacklevel + 1):
            sequential = False
    if sequential is not False:
        for name, some in pairs.items():
            kernels = tried_one_by_one(inventory, some, calibration, verbose)
            one_by_one = f"{name}, sequential"
            plans[one_by_one] = dataclasses.replace(plans[name], sequential=True)
            found[one_by_one] = _WITH_MORE * prober.distance(kernels)
    if sequential is True:
        plans = {name: plan for name, plan in plans.items() if plan.sequential}
    if without_data is not None:
        weighing = without_data.weighings[0]
        add(without_data, WITHOUT_DATA, weighing)
    # Among equals, the first: fitted at once.
    best = min(plans, key=lambda name: round(math.log(max(found[name], 1e-12)) / _EQUAL))
    plan = plans[best]
    trials = {name: found[name] for name in plans}
    return dataclasses.replace(plan, sequential=bool(plan.sequential), trials=trials)


def _choices(selection: Selection, plan: CompressionPlan) -> list:
    """The plan's choices of the candidates."""
    paths = {choice.layer: choice for choice in plan.choices}
    return [paths[record.path] for record in selection.inventory.candidates]


def _pairs(selection: Selection, plan: CompressionPlan) -> Pairs:
    """The layers that a plan factorizes, with second moments."""
    pairs = match(selection.inventory, plan)
    return [(record, choice) for record, choice in pairs if choice.factorized]

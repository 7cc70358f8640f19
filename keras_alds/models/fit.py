"""Makes the factors of a plan: from the kernels, from statistics, or layer by layer."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.methods import FactorizeWithBias
from keras_alds.kinds.base import observable
from keras_alds.methods import METHODS
from keras_alds.models.calibration import Calibration, CalibrationStats
from keras_alds.models.data import KeptExamples
from keras_alds.models.factorize import Replacement, replacement
from keras_alds.models.inventory import Inventory
from keras_alds.models.matching import Pairs
from keras_alds.models.sequential import Walk, most_reruns
from keras_alds.models.trials import Kernels, approximations, judge
from keras_alds.plan import CompressionPlan
from keras_alds.progress import progress_bar

#: The most layers for which sequential compression reruns one piece of Python code by default.
MOST_RERUNS = 8
#: The most examples on which sequential compression is tried.
TRIED_EXAMPLES = 256


def factors(
    inventory: Inventory,
    pairs: Pairs,
    plan: CompressionPlan,
    calibration: Calibration | None,
    sequential: bool | None,
    *,
    last: bool = False,
    verbose: int = 1,
    stacklevel: int = 1,
) -> list[Replacement]:
    """The factorized layers of a plan.

    Args:
        inventory: The model.
        pairs: Its layers to factorize, with their choices in the plan.
        plan: The plan.
        calibration: As for `apply`.
        sequential: As for `compress`.
        last: As for `apply`.
        verbose: As for `apply`.
        stacklevel: As for `apply`.
    """
    make = factorize_with_bias(plan.method)
    if calibration is None:
        return [replacement(record, choice, make=make) for record, choice in pairs]
    stats = calibration.collected(
        inventory, curves=False, verbose=verbose, stacklevel=stacklevel + 1
    )
    seen = {record.path: record for record in stats.match(inventory).records}
    pairs = [(seen[record.path], choice) for record, choice in pairs]
    if sequential is None:
        sequential = plan.sequential
    if calibration.examples is None or make is not None:
        sequential = False
    elif sequential is None:
        sequential = can_be_sequential(inventory, pairs, stacklevel=stacklevel + 1) and (
            _is_better(inventory, pairs, calibration, verbose)
        )
    if not sequential or calibration.examples is None:
        return [
            replacement(record, choice, moment=record.moment, make=make) for record, choice in pairs
        ]
    if last:  # statistics take memory
        calibration.stats = None
        pairs = [(record.forgotten(), choice) for record, choice in pairs]
        del stats, seen
    return one_by_one(inventory, pairs, calibration.examples, verbose)


def factorize_with_bias(method: str | None) -> FactorizeWithBias | None:
    """The function that makes factors and biases for a method; None if it keeps the biases."""
    known = METHODS.get(method or "")
    return None if known is None else known.factorize_with_bias


def can_be_sequential(inventory: Inventory, pairs: Pairs, *, stacklevel: int) -> bool:
    """Whether to try compression layer by layer; warns if that would take too long."""
    reruns = most_reruns(inventory.model, [record.layer for record, _ in pairs])
    if reruns > MOST_RERUNS:
        warnings.warn(
            "Sequential compression would run the Python code of the model "
            f"'{inventory.model.name}' again for each of {reruns} layers, and is not tried. The "
            "factors are fitted on the original network's activations instead. Pass "
            "sequential=True to do it, or sequential=False to silence this warning.",
            stacklevel=stacklevel + 1,
        )
    return reruns <= MOST_RERUNS


def _is_better(inventory: Inventory, pairs: Pairs, calibration: Calibration, verbose: int) -> bool:
    """Whether compression layer by layer brings the outputs on held-out examples nearer."""
    judging = calibration.judging()
    measured = [(record, choice) for record, choice in pairs if record.judged]
    if not judging or not measured:
        return True
    prober = judge(inventory.model, [record for record, _ in measured], judging)
    if prober.reference.is_random:
        return False
    at_once = approximations(*zip(*measured, strict=True))
    tried = tried_one_by_one(inventory, measured, calibration, verbose)
    return prober.discrepancy(tried) < prober.discrepancy(at_once)


def tried_one_by_one(
    inventory: Inventory, pairs: Pairs, calibration: Calibration, verbose: int
) -> Kernels:
    """The kernels of compression layer by layer, on some of the examples that are not held out."""
    if calibration.examples is None:
        raise ValueError("Expected examples. Received: none")
    some = calibration.examples.fitted(TRIED_EXAMPLES)
    made = one_by_one(inventory, pairs, some, verbose)
    return {r.layer: np.asarray(r.factorized.kernel) for r in made}


def one_by_one(
    inventory: Inventory, pairs: Pairs, examples: KeptExamples, verbose: int
) -> list[Replacement]:
    """The factors of every layer, fitted on the outputs of the compressed layers before it."""
    by_layer = {record.layer: (record, choice) for record, choice in pairs}
    made = {layer: replacement(*pair) for layer, pair in by_layer.items() if not observable(layer)}

    def decide(layer: Any, moment: SecondMoment, target: np.ndarray) -> Any:
        record, choice = by_layer[layer]
        if record.ridge is not None:
            moment = moment.with_ridge(record.ridge)
        made[layer] = replacement(record, choice, moment=moment, target=target)
        return made[layer].factorized

    given = [(r.layer, r.factorized) for r in made.values()]
    layers = [layer for layer in by_layer if layer not in made]
    with progress_bar(verbose) as progress:
        task = progress.add_task("compression", total=len(layers))
        walk = Walk(inventory.model, layers, examples, given=given)
        walk.run(decide, lambda part: progress.advance(task, part))
    # No example reaches the remaining layers.
    return [made.get(layer) or replacement(*pair) for layer, pair in by_layer.items()]


def check_sequential(sequential: object, data: object, method: str | None = None) -> None:
    """Raises a ValueError unless `sequential` is None or a boolean that fits data and method."""
    if sequential is not None and not isinstance(sequential, bool):
        raise ValueError(
            f"Expected `sequential` to be True, False or None. Received: sequential={sequential!r}"
        )
    if sequential and (data is None or isinstance(data, CalibrationStats)):
        raise ValueError(
            "Expected examples as `calibration_data` with sequential=True, to run the layers on "
            "them again. "
            f"Received: calibration_data of type {type(data).__name__}"
        )
    if sequential and factorize_with_bias(method):
        raise ValueError(
            f"Expected sequential=None or False with the method {method!r}, which fits the factors "
            "on the original outputs. Received: sequential=True"
        )

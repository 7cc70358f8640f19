"""Factorizes the layers of a model in place, keeping objects, names and graph."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from keras_alds._backend import Backend, wrappers
from keras_alds._backend.live import Holders, empty
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.methods import FactorizeWithBias
from keras_alds.kinds.base import observable, stock_kind
from keras_alds.methods import METHODS
from keras_alds.models.calibration import Calibration, CalibrationStats
from keras_alds.models.data import KeptExamples
from keras_alds.models.factorize import Replacement, replacement
from keras_alds.models.inventory import Inventory, made_by_code
from keras_alds.models.matching import Pairs, match
from keras_alds.models.optimizer import carry_optimizers
from keras_alds.models.sequential import Walk, most_reruns
from keras_alds.plan import CompressionPlan

#: The most layers for which sequential compression reruns one piece of Python code by default.
MOST_RERUNS = 8


def apply(
    inventory: Inventory,
    plan: CompressionPlan,
    calibration: Calibration | None = None,
    sequential: bool | None = None,
    *,
    last: bool = False,
    verbose: int = 1,
    stacklevel: int = 1,
) -> None:
    """Factorizes the layers of a model in place, as a plan says.

    If anything fails, the model is left unchanged.

    Args:
        inventory: The model.
        plan: A plan for this model.
        calibration: Statistics or examples of the layers' inputs. Defaults to None: the factors
            approximate the kernels.
        sequential: As for `compress`.
        last: Whether the statistics are not used again, so that they can be dropped.
        verbose: 0 prints nothing; otherwise a terminal shows a progress bar.
        stacklevel: The frame that warnings name; 1 is the caller of this function.

    Raises:
        ValueError: If the plan was made for another model, or a kernel is not finite.
    """
    pairs = [(record, choice) for record, choice in match(inventory, plan) if choice.factorized]
    wrappers.apply_masks(inventory.pruning)
    make = factorize_with_bias(plan.method)
    with inventory.backend.creation_scope(inventory.model):
        if calibration is None:
            made = [replacement(record, choice, make=make) for record, choice in pairs]
        elif calibration.examples is not None and _is_sequential(
            inventory, pairs, make, sequential, stacklevel=stacklevel + 1
        ):
            if last:
                calibration.stats = None
            made = _sequential(inventory, pairs, calibration.examples, verbose)
        else:
            stats = calibration.collected(inventory, verbose=verbose)
            moments = {r.path: r.moment for r in stats.match(inventory).records}
            made = [
                replacement(record, choice, moment=moments[record.path], make=make)
                for record, choice in pairs
            ]
    _warn_of_code(inventory, pairs, stacklevel=stacklevel + 1)
    _change(inventory, made, stacklevel=stacklevel + 1)


def _warn_of_code(inventory: Inventory, pairs: Pairs, *, stacklevel: int) -> None:
    """Warns of layers that a model's code creates dense again when it is loaded."""
    found = made_by_code(inventory, [record for record, _ in pairs])
    if found:
        names = ", ".join(f"'{item.name}' ({type(item).__name__})" for item in found[:3])
        warnings.warn(
            f"The code of {names}{', …' if len(found) > 3 else ''} creates dense layers when a "
            "saved model is loaded, and the saved factors do not fit them. Save the plan "
            "too: `plan.save(path)`, with the plan of `select` or the callback's `plan`. To load, "
            "create the model in code, build it, call `apply_plan(model, plan)`, then "
            "`load_weights`.",
            stacklevel=stacklevel + 1,
        )


def _change(inventory: Inventory, made: Sequence[Replacement], *, stacklevel: int) -> None:
    """Replaces layers, masks, optimizer state and graphs together; undoes all if a step fails.

    The optimizers and graphs of other models that hold a layer too are part of it.
    """
    backend, model = inventory.backend, inventory.model
    undo: list[Callable[[], None]] = []
    try:
        holders = Holders.of(backend, model)
        kernels = {r.layer: r.kind.variable(r.layer) for r in made}
        for r in made:  # one by one, so that a failure can undo the earlier ones
            undo.append(backend.transplant(r.layer, r.factorized, r.kind.kept))
            if r.bias is not None:
                undo.append(functools.partial(r.layer.bias.assign, backend.value(r.layer.bias)))
                r.layer.bias.assign(r.bias)
        # Cells come before the layers that run them.
        for _, layer in reversed(inventory.layers):
            if (step := stock_kind(layer).adopt(backend, layer)) is not None:
                undo.append(step)
        with backend.creation_scope(model):
            for wrapper in inventory.pruning:
                if wrapper.layer in kernels:
                    undo += [wrappers.renew_masks(backend, wrapper)]
            slots = carry_optimizers(backend, holders, kernels, undo)
        holders.forget_graphs([*kernels.values(), *slots], undo)
        tied = _tied(backend, holders, kernels)
        for layer, holder in tied.items():
            warnings.warn(
                f"The kernel of layer '{layer.name}' is also a weight of the layer "
                f"'{holder.name}' outside of the model, which goes on with the dense kernel: they "
                f"are not tied any more. Pass exclude=['{layer.name}'] to keep them tied.",
                stacklevel=stacklevel + 1,
            )
        for layer, kernel in kernels.items():
            if layer not in tied:
                undo.append(empty(kernel))
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _tied(backend: Backend, holders: Holders, kernels: dict[Any, Any]) -> dict[Any, Any]:
    """The factorized layers whose kernel is still a weight of another layer, and that layer."""
    layers = {id(kernel): layer for layer, kernel in kernels.items()}
    found: dict[Any, Any] = {}
    for holder, before in holders.layers.items():
        if any(id(variable) in layers for variable in before):
            for variable in backend.own_variables(holder):
                if id(variable) in layers:
                    found[layers[id(variable)]] = holder
    return found


# -- Factors ---------------------------------------------------------------------------------------


def factorize_with_bias(method: str | None) -> FactorizeWithBias | None:
    """The function that makes factors and biases for a method; None if it keeps the biases."""
    known = METHODS.get(method or "")
    return None if known is None else known.factorize_with_bias


def _is_sequential(
    inventory: Inventory,
    pairs: Pairs,
    make: FactorizeWithBias | None,
    sequential: bool | None,
    *,
    stacklevel: int,
) -> bool:
    """Whether to compress layer by layer; warns if that would take too long."""
    if make is not None:
        return False
    if sequential is not None:
        return sequential
    reruns = most_reruns(inventory.model, [record.layer for record, _ in pairs])
    if reruns > MOST_RERUNS:
        warnings.warn(
            "Sequential compression would run the Python code of the model "
            f"'{inventory.model.name}' again for each of {reruns} layers, and is skipped. The "
            "factors are fitted on the original network's activations instead. Pass "
            "sequential=True for better factors, or sequential=False to silence this warning.",
            stacklevel=stacklevel + 1,
        )
    return reruns <= MOST_RERUNS


def _sequential(
    inventory: Inventory, pairs: Pairs, examples: KeptExamples, verbose: int
) -> list[Replacement]:
    """The factors of every layer, fitted on the outputs of the compressed layers before it."""
    by_layer = {record.layer: (record, choice) for record, choice in pairs}
    made = {layer: replacement(*pair) for layer, pair in by_layer.items() if not observable(layer)}

    def decide(layer: Any, moment: SecondMoment, target: np.ndarray) -> Any:
        made[layer] = replacement(*by_layer[layer], moment=moment, target=target)
        return made[layer].factorized

    given = [(r.layer, r.factorized) for r in made.values()]
    layers = [layer for layer in by_layer if layer not in made]
    with Progress(transient=True, disable=not verbose) as progress:
        task = progress.add_task("compression", total=len(layers))
        walk = Walk(inventory.model, layers, examples, given=given)
        walk.run(decide, lambda: progress.advance(task))
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
            f"Received: calibration_data={data!r}"
        )
    if sequential and factorize_with_bias(method):
        raise ValueError(
            f"Expected sequential=None or False with the method {method!r}, which fits the factors "
            "on the original outputs. Received: sequential=True"
        )


def check_folded(plan: CompressionPlan, data: object) -> None:
    """Raises a ValueError if `plan` has fold schemes that do not support calibration data."""
    if data is not None and plan.folded:
        raise ValueError(
            "Expected no `calibration_data` with a plan of fold schemes other than 0: only factors "
            f"in scheme 0 can be fitted on data. Received: layer '{plan.folded[0].layer}' in "
            f"scheme {plan.folded[0].scheme}. Leave the data out, or make a plan with schemes=0."
        )

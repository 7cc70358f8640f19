"""Factorizes the layers of a model in place, keeping objects, names and graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds._backend.functions import forget_graphs
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.methods import FactorizeWithBias
from keras_alds.kinds.base import observable, stock_kind
from keras_alds.methods import METHODS
from keras_alds.models.calibration import Calibration, CalibrationStats
from keras_alds.models.data import KeptExamples
from keras_alds.models.factorize import Replacement, replacement
from keras_alds.models.inventory import Inventory, made_by_code
from keras_alds.models.matching import Pairs, match
from keras_alds.models.optimizer import Exchange, carried, carry_optimizers
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
    trainer: Any | None = None,
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
        trainer: Another model that trains these layers. Its optimizers and compiled functions
            follow the change. Defaults to None.
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
    _change(inventory, made, trainer)


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


def _change(inventory: Inventory, made: Sequence[Replacement], trainer: Any | None = None) -> None:
    """Replaces layers, masks and optimizer state together; undoes everything if a step fails."""
    backend = inventory.backend
    with surgery(inventory, trainer) as operation:
        undo = operation.undo
        kernels = [r.kind.variable(r.layer) for r in made]
        for r in made:  # one by one, so that a failure can undo the earlier ones
            undo.append(backend.transplant(r.layer, r.factorized, r.kind.kept))
            if r.bias is not None:
                undo.append(functools.partial(r.layer.bias.assign, backend.value(r.layer.bias)))
                r.layer.bias.assign(r.bias)
        # Cells come before the layers that run them.
        for _, layer in reversed(inventory.layers):
            if (step := stock_kind(layer).adopt(backend, layer)) is not None:
                undo.append(step)
        changed = {r.layer for r in made}
        for wrapper in inventory.pruning:
            if wrapper.layer in changed:
                undo += [wrappers.renew_masks(backend, wrapper)]
        operation.carry(
            [_factorized(backend, r.layer, kernel) for r, kernel in zip(made, kernels, strict=True)]
        )


def _factorized(backend: _backend.Backend, layer: Any, kernel: Any) -> Exchange:
    """A kernel in whose place are the factors of a layer."""

    def convert(meaning: str, states: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return carried(backend, meaning, states[0], layer)

    return Exchange((kernel,), (layer.encoder, layer.decoder), convert)


@dataclasses.dataclass
class Surgery:
    """A change of a model's layers that is under way.

    Attributes:
        backend: The model's backend.
        models: The one that trains the layers, and after it the one whose layers change.
        known: Their variables before the change.
        undo: Functions that undo the steps so far, the first step first.
        carried: Whether the optimizers have followed.
    """

    backend: _backend.Backend
    models: list[Any]
    known: list[Any]
    undo: list[Callable[[], None]]
    carried: bool = False

    def carry(self, exchanges: Sequence[Exchange]) -> None:
        """Makes optimizers and compiled functions follow the changed variables."""
        self.carried = True
        self.undo += [forget_graphs(model) for model in self.models]
        carry_optimizers(self.backend, self.models, self.known, exchanges, self.undo)

    def revert(self) -> None:
        """Undoes all steps."""
        while self.undo:
            self.undo.pop()()


@contextlib.contextmanager
def surgery(inventory: Inventory, trainer: Any | None = None) -> Iterator[Surgery]:
    """Undoes all steps if one fails inside; makes compiled functions follow them otherwise.

    Args:
        inventory: The model whose layers change.
        trainer: Another model that trains these layers, or None.
    """
    backend = inventory.backend
    # The one that trains them first: its order of variables is that of its optimizer.
    models = list(dict.fromkeys([inventory.model if trainer is None else trainer, inventory.model]))
    known = list({id(v): v for model in models for v in model.variables}.values())
    operation = Surgery(backend, models, known, [])
    try:
        with backend.creation_scope(models[0]):
            yield operation
    except BaseException:
        operation.revert()
        raise
    finally:
        for model in models:
            if operation.carried and backend.is_model(model):
                backend.reset_functions(model)


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

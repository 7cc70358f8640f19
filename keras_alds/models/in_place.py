"""Factorizes the layers of a model in place, keeping objects, names and graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds._backend.calls import Replacement as Call
from keras_alds._backend.calls import replaced_calls
from keras_alds._backend.functions import has_own_code
from keras_alds._backend.live import Holders, empty
from keras_alds._backend.strategies import Replicas
from keras_alds.kinds import holders
from keras_alds.kinds.base import below, stock_kind
from keras_alds.models import workers
from keras_alds.models.calibration import Calibration
from keras_alds.models.factorize import Replacement
from keras_alds.models.fit import TRIED_EXAMPLES, factors
from keras_alds.models.inventory import Inventory, has_weights, outermost_holders
from keras_alds.models.matching import match
from keras_alds.models.moving_statistics import correction
from keras_alds.models.optimizer import Exchange, carried, carry_optimizers
from keras_alds.plan import CompressionPlan


def apply(
    inventory: Inventory,
    plan: CompressionPlan,
    calibration: Calibration | None = None,
    sequential: bool | None = None,
    *,
    trainer: Any | None = None,
    fresh: bool = False,
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
        fresh: Whether the model was just made, so that nothing else holds its layers.
        last: Whether the statistics are not used again, so that they can be dropped.
        verbose: 0 prints nothing; otherwise a terminal shows a progress bar.
        stacklevel: The frame that warnings name; 1 is the caller of this function.

    Raises:
        ValueError: If the plan was made for another model, a kernel is not finite, or code of the
            user's own fails with factors in place of a kernel.
    """
    pairs = [(record, choice) for record, choice in match(inventory, plan) if choice.factorized]
    wrappers.apply_masks(inventory.pruning)
    first = inventory.model if trainer is None else trainer
    replicas = Replicas(first)
    make = functools.partial(
        factors,
        inventory,
        pairs,
        plan,
        calibration,
        sequential,
        last=last,
        verbose=verbose,
        stacklevel=stacklevel + 1,
    )
    workers.check_plans(replicas, plan)
    with inventory.backend.creation_scope(first):
        several = replicas.count > 1 and pairs
        made = workers.made_together(replicas, make, pairs, plan) if several else make()
        correct = None
        if plan.normalized and calibration and calibration.examples and replicas.count == 1:
            examples = calibration.examples.fitted(TRIED_EXAMPLES)
            correct = correction(inventory.model, examples)
        _change(inventory, made, trainer, correct, fresh=fresh, stacklevel=stacklevel + 1)
        workers.follow_chief(replicas, first)


def _warn_of_holders(inventory: Inventory, *, stacklevel: int) -> None:
    """Warns of the user's own layers and models that a saved file cannot bring back."""
    reasons = {
        f"'{path}' ({type(holder).__name__})": reason
        for path, holder in outermost_holders(inventory)
        if (reason := holders.does_not_load(holder)) is not None
    }
    if reasons:
        names = ", ".join([*reasons][:3]) + (", …" if len(reasons) > 3 else "")
        warnings.warn(
            f"A saved file will not load: Keras cannot make {names} again from the config, with "
            f"the factorized layers inside ({next(iter(reasons.values()))}). Save the plan too: "
            "`plan.save(path)`, with the plan of `select` or the callback's `plan`. To load, "
            "create the model in code, build it, call `apply_plan(model, plan)`, then "
            "`load_weights`.",
            stacklevel=stacklevel + 1,
        )


def _change(
    inventory: Inventory,
    made: Sequence[Replacement],
    trainer: Any | None = None,
    correct: Callable[[list[Callable[[], None]]], None] | None = None,
    *,
    fresh: bool,
    stacklevel: int,
) -> None:
    """Replaces layers, masks, optimizer state and graphs together; undoes all if a step fails.

    What corrects the moving statistics then runs the changed model.
    """
    backend = inventory.backend
    alive = Holders.inside(backend, inventory.model) if fresh else None
    passes = _passes_of_own_code([inventory.model, trainer or inventory.model])
    with surgery(inventory, trainer, alive) as operation:
        undo = operation.undo
        kernels = {r.layer: r.kind.variable(r.layer) for r in made}
        for r in made:  # one by one, so that a failure can undo the earlier ones
            undo.append(backend.transplant(r.layer, r.factorized, r.kind.kept))
            if r.bias is not None:
                undo.append(functools.partial(r.layer.bias.assign, backend.value(r.layer.bias)))
                r.layer.bias.assign(r.bias)
        # Cells come before the layers that run them.
        inside = dict.fromkeys(
            [*(layer for _, layer in reversed(inventory.layers)), inventory.model]
        )
        for layer in (*inside, *operation.alive.holding(kernels.values(), but=inside)):
            undo += filter(None, (stock_kind(layer).adopt(backend, layer), holders.adopt(layer)))
        _check_own_code(passes, inventory, [*kernels])
        _warn_of_holders(inventory, stacklevel=stacklevel + 1)
        for wrapper in inventory.pruning:
            if wrapper.layer in kernels:
                undo += [wrappers.renew_masks(backend, wrapper)]
        exchanges = [_factorized(backend, layer, kernel) for layer, kernel in kernels.items()]
        operation.carry(exchanges, stacklevel=stacklevel + 1)
        if correct is not None:
            correct(undo)


def _passes_of_own_code(models: Sequence[Any]) -> list[Any]:
    """The models that run code of the user's own, as far as their forward passes can be traced."""
    return [
        model
        for model in dict.fromkeys(models)
        if any(map(has_own_code, _backend.layers_of(model)))
        and has_weights(model)
        and not _failure(model)
    ]


def _failure(model: Any) -> tuple[Any, Exception] | None:
    """The innermost code of the user's own in which a forward pass fails, and the error; or None.

    The pass is only traced.
    """
    found: list[tuple[Any, Exception]] = []

    def noting(layer: Any) -> Call:
        def call(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except Exception as error:
                found.append((layer, error))
                raise

        return call

    own = {layer: noting(layer) for layer in _backend.layers_of(model) if has_own_code(layer)}
    try:
        with replaced_calls(own):
            _backend.backend_of(model).trace_shapes(model, [])
    except Exception as error:  # the user's code
        return found[0] if found else (model, error)
    return None


def _check_own_code(models: Sequence[Any], inventory: Inventory, changed: Sequence[Any]) -> None:
    """Raises a ValueError if code of the user's own fails with the changed layers.

    It may assign to a kernel, which is a product now, or take a weight by its place in `weights`.

    Args:
        models: Models whose forward passes could be traced before.
        inventory: The model as it was.
        changed: The layers that have factors in place of their kernels.
    """
    for model in models:
        if (failure := _failure(model)) is None:
            continue
        holder, error = failure
        own = holders.own_class(holder)
        alike = [layer for layer in _backend.layers_of(model) if holders.own_class(layer) is own]
        known = {child for layer in alike for child in inventory.backend.children(layer)}
        if known.isdisjoint(changed):
            known = {*below(holder)}
        if known.isdisjoint(changed):
            known = {*changed}
        named = [record.path for record in inventory.factorizable if record.layer in known]
        first = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"Expected the code of {own.__name__} to work with factors in place of "
            f"kernels. Received: {type(error).__name__}: {first[:200]}. Nothing was changed. Such "
            "code assigns to a kernel, or takes one from `layer.weights`. Pass "
            f"exclude={named}, the layers that it may use, so that they stay dense. Or let it only "
            "read the attribute of the weight, such as `layer.kernel`: that is the product of the "
            "factors."
        ) from error


def _factorized(backend: _backend.Backend, layer: Any, kernel: Any) -> Exchange:
    """A kernel in whose place are the factors of a layer."""

    def convert(meaning: str, states: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        return carried(backend, meaning, states[0], layer)

    return Exchange(layer, (kernel,), layer.factors, convert)


@dataclasses.dataclass
class Surgery:
    """A change of a model's layers that is under way.

    Attributes:
        backend: The model's backend.
        inside: All layers of the model, as it was before the change.
        alive: What may hold the layers, also then.
        undo: Functions that undo the steps so far, the first step first.
    """

    backend: _backend.Backend
    inside: set[Any]
    alive: Holders
    undo: list[Callable[[], None]]

    def carry(self, exchanges: Sequence[Exchange], *, stacklevel: int = 1) -> None:
        """Makes optimizers and graphs follow the exchanged variables, whoever holds them.

        Nothing can compute with the old variables afterwards.
        """
        gone = [variable for e in exchanges for variable in e.old]
        slots = carry_optimizers(self.backend, self.alive, exchanges, self.undo)
        self.alive.forget_graphs([*gone, *slots], self.undo)
        tied = self._tied(exchanges)
        for layer, holder in tied.items():
            warnings.warn(
                f"The kernel of layer '{layer.name}' is also a weight of the layer "
                f"'{holder.name}' outside of the model, which goes on with the dense kernel: they "
                f"are not tied any more. Pass exclude=['{layer.name}'] to keep them tied.",
                stacklevel=stacklevel + 1,
            )
        for e in exchanges:  # one by one, so that a failure can undo the earlier ones
            if e.layer not in tied:
                for variable in e.old:
                    self.undo.append(empty(variable))

    def _tied(self, exchanges: Sequence[Exchange]) -> dict[Any, Any]:
        """The changed layers whose old variable is still a weight of a layer outside the model.

        With that layer.
        """
        layers = {id(variable): e.layer for e in exchanges for variable in e.old}
        found: dict[Any, Any] = {}
        old = [variable for e in exchanges for variable in e.old]
        for holder in self.alive.holding(old, but=self.inside):
            for variable in self.backend.own_variables(holder):
                if id(variable) in layers:
                    found[layers[id(variable)]] = holder
        return found

    def revert(self) -> None:
        """Undoes all steps, the others too if one fails."""
        with contextlib.ExitStack() as steps:
            for step in self.undo:
                steps.callback(step)
        self.undo.clear()


@contextlib.contextmanager
def surgery(
    inventory: Inventory, trainer: Any | None = None, alive: Holders | None = None
) -> Iterator[Surgery]:
    """Undoes all steps if one fails inside.

    Args:
        inventory: The model whose layers change.
        trainer: Another model that trains these layers, or None.
        alive: What may hold the layers. Defaults to all that is found, which takes 0.1 to 0.2 s.
    """
    backend = inventory.backend
    # The one that trains them first: its order of variables is that of its optimizer.
    first = inventory.model if trainer is None else trainer
    alive = Holders.of(backend, first) if alive is None else alive
    inside = {layer for _, layer in inventory.layers} | {r.layer for r in inventory.records}
    operation = Surgery(backend, inside, alive, [])
    try:
        with backend.creation_scope(first):
            yield operation
            Replicas(first).renew_keys()
    except BaseException:
        operation.revert()
        raise

"""Makes the factorized layers of a model dense again in place, to choose anew.

The dense kernel of a factorized layer is the product of its factors, W = E D. So a compressed model
can be compressed further: its layers become dense, and slices and ranks are chosen as for any
model, against the parameters of the dense model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend.layers import Undo
from keras_alds._backend.live import Holders, empty
from keras_alds.kinds.base import factorized_kind, is_factorized, stock_kind
from keras_alds.models.in_place import surgery
from keras_alds.models.inventory import Inventory, LayerRecord, count_params, dense_params
from keras_alds.models.matching import is_applied
from keras_alds.models.memory import peak_entries
from keras_alds.models.optimizer import Exchange, Factors, gathered
from keras_alds.models.resources import Macs
from keras_alds.options import Options
from keras_alds.plan import CompressionPlan, Skip
from keras_alds.resources import MEMORY, RESOURCES, removed_fraction

#: What a compression is asked to reach.
Request = Options | CompressionPlan


def inspected(model: Any, request: Request) -> Inventory:
    """The inventory of a model, for a request."""
    return Inventory.of(model, request.exclude if isinstance(request, Options) else ())


def to_recompose(inventory: Inventory, request: Request) -> list[LayerRecord]:
    """The factorized layers for which a request asks to choose anew, or has chosen."""
    if isinstance(request, Options):
        return [record for record in inventory.factorized if not record.excluded]
    kept = Skip.FACTORIZED.value
    pairs = zip(inventory.records, request.choices, strict=False)
    return [r for r, choice in pairs if is_factorized(r.layer) and choice.reason_code != kept]


def already(inventory: Inventory, request: Request, *, strict: bool = True) -> str | None:
    """What is true of a model that meets a request already; None of one to compress.

    Fractions count against the model with dense kernels in place of all factors. A model never
    counts as meeting a limit of latency, as its dense form is not measured.

    Args:
        inventory: The model.
        request: What is asked for.
        strict: Whether another plan that keeps as many parameters as the model has, or more, is an
            error.

    Raises:
        ValueError: If a plan keeps more parameters than the model has left, and `strict` is True.
    """
    records = to_recompose(inventory, request)
    if not records:
        return None
    if isinstance(request, CompressionPlan):
        if is_applied(inventory, request):
            return f"already compressed to cr={request.cr:.2f} by this plan"
        if request.params_after < inventory.params:
            return None
        if not strict:
            return "already compressed as far as this plan asks, or further"
        raise ValueError(
            "Expected a plan that removes more than the model has lost already. Received: a plan "
            f"that keeps {request.params_after:,} parameters, for the model "
            f"'{inventory.model.name}' of {inventory.params:,}. Apply it to the original model."
        )
    if any(RESOURCES[name].measured for name in request.limits):
        return None
    limits = request.requested
    after = {name: _total(inventory, name) for name in limits}
    kept = [r.layer for r in inventory.factorized if r not in records]
    before = {"params": dense_params(inventory.model, kept)}
    if others := limits.keys() - before.keys():
        with recomposed(inventory, records) as dense:
            before |= {name: _total(dense, name) for name in others}
    if not all(after.values()):  # memory that is unknown: `select` says so
        return None
    reached = {name: removed_fraction(before[name], after[name]) for name in limits}
    if any(reached[name] < limit for name, limit in limits.items()):
        return None
    return "already compressed to " + ", ".join(
        f"{'cr' if len(reached) == 1 else name}={fraction:.2f}"
        for name, fraction in reached.items()
    )


def _total(inventory: Inventory, resource: str) -> int:
    counts = {
        "params": lambda: count_params(inventory.model, inventory.pruning),
        "macs": lambda: Macs(inventory).total,
        MEMORY: lambda: peak_entries(inventory) or 0,
    }
    return counts[resource]()


@contextlib.contextmanager
def recomposed(
    inventory: Inventory,
    records: Sequence[LayerRecord],
    *,
    keep: bool = False,
    trainer: Any | None = None,
) -> Iterator[Inventory]:
    """Makes factorized layers dense while inside.

    The layers stay the same objects, and so do biases and all other weights. If anything inside
    fails, the layers are factorized as before.

    Args:
        inventory: The model.
        records: The records of its layers to make dense. Of two kernels of one recurrent cell, both
            or none become dense.
        keep: Whether the layers stay dense afterwards. Then the model's optimizers follow. Defaults
            to False: the layers are factorized again, with their own factors.
        trainer: Another model that trains these layers, or None.

    Yields:
        The inventory of the model as it is inside.

    Raises:
        ValueError: If TF-MOT prunes one of the layers.
    """
    if not records:
        yield inventory
        return
    _check_pruning(inventory, records)
    nobody = None if keep else Holders({}, [], [])  # no need to know
    with surgery(inventory, trainer, nobody) as operation:
        exchanges = _recompose(inventory, records, operation.undo)
        made = [variable for e in exchanges for variable in e.new]
        operation.undo.insert(0, lambda: _forget(inventory, made))  # the last step of the undo
        if keep:
            operation.carry(exchanges)
        yield Inventory.of(inventory.model, inventory.exclude)
        if not keep:
            operation.revert()


def _forget(inventory: Inventory, kernels: Sequence[Any]) -> None:
    """Drops graphs that were traced while the layers were dense, such as that of `predict`."""
    Holders.of(inventory.backend, inventory.model).forget_graphs(list(kernels), [])
    for kernel in kernels:
        empty(kernel)


def _recompose(
    inventory: Inventory, records: Sequence[LayerRecord], undo: list[Undo]
) -> list[Exchange]:
    """Makes layers dense, and returns the kernels that took the places of factors."""
    backend = inventory.backend
    wanted = {record.layer for record in records}
    # Factorized kernels of cells count as layers. Those of one cell become dense together.
    in_cells = {x: some for _, x in inventory.layers if (some := _factorized_kernels(x))}
    cells = {cell: some for cell, some in in_cells.items() if wanted.issuperset(some.values())}
    parts = [
        (cell, name, kernel.factors, Factors.of(backend, kernel))
        for cell, kernels in cells.items()
        for name, kernel in kernels.items()
    ]
    inside = {kernel for kernels in in_cells.values() for kernel in kernels.values()}
    single = [record.layer for record in records if record.layer not in inside]
    exchanges = [_made_dense(backend, layer, undo) for layer in single]
    for layer in _holders(inventory, [*single, *cells]):
        if (step := stock_kind(layer).release(backend, layer)) is not None:
            undo += [step]
    return exchanges + [
        _exchange(cell, old, getattr(cell, name), factors) for cell, name, old, factors in parts
    ]


def _factorized_kernels(layer: Any) -> dict[str, Any]:
    """The factorized ones of a cell's kernels by name; none of any other layer."""
    kernels = stock_kind(layer).kernels(layer)
    return {name: kernel for name, kernel in kernels.items() if is_factorized(kernel)}


def _made_dense(backend: _backend.Backend, layer: Any, undo: list[Undo]) -> Exchange:
    """Makes a layer dense that is no kernel of a cell."""
    old, factors = layer.factors, Factors.of(backend, layer)
    kind = factorized_kind(layer)
    stock = kind.stock(layer)
    kind.variable(stock).assign(factors.product)
    undo.append(backend.transplant(layer, stock, kind.kept_back))
    return _exchange(layer, old, stock_kind(layer).variable(layer), factors)


def _exchange(layer: Any, old: tuple[Any, Any], kernel: Any, factors: Factors) -> Exchange:
    def convert(meaning: str, states: list[np.ndarray]) -> list[np.ndarray]:
        return [gathered(meaning, states, factors)]

    return Exchange(layer, old, (kernel,), convert)


def _holders(inventory: Inventory, layers: Collection[Any]) -> list[Any]:
    """The layers and all that hold one of them, inner ones first."""
    at = dict(inventory.layers)
    changed = {path for path, layer in inventory.layers if layer in set(layers)}
    return [
        at[path]
        for path, _ in reversed(inventory.layers)
        if path in changed or any(inner.startswith(f"{path}/") for inner in changed)
    ]


def _check_pruning(inventory: Inventory, records: Sequence[LayerRecord]) -> None:
    """Raises a ValueError if TF-MOT prunes a layer: new masks would cut the dense kernel."""
    layers = {record.layer for record in records}
    pruned = [wrapper.layer.name for wrapper in inventory.pruning if wrapper.layer in layers]
    if pruned:
        raise ValueError(
            "Expected no pruning of factorized layers of a model that is to be compressed "
            f"further. Received: '{pruned[0]}' in a PruneLowMagnitude. Remedy: `strip_pruning` "
            "first."
        )

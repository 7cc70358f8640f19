"""Ranks of the kernels of a model, and how much could be removed at a given error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_alds.core.ranks import Ranks, Settling, ranks_of
from keras_alds.core.spectra import Float64, spectra_many
from keras_alds.kinds.base import factorized_kind, is_factorized, is_own
from keras_alds.methods import get_method
from keras_alds.models.choices import singular_values
from keras_alds.models.inventory import Inventory, LayerRecord, dense_params
from keras_alds.models.optimizer import Factors
from keras_alds.models.resources import Params
from keras_alds.models.selection import Selection
from keras_alds.options import Options
from keras_alds.plan import Skip
from keras_alds.resources import removed_fraction


@dataclass(frozen=True)
class ModelRanks:
    """The ranks of a model's kernels.

    Attributes:
        layers: The ranks of each layer that can be factorized or is, by its path.
        removable: The fraction of a dense layer's own parameters that could be removed.
        reachable_cr: The fraction of the model's parameters that could be removed.
    """

    layers: dict[str, Ranks]
    removable: dict[str, float]
    reachable_cr: float


def measured_ranks(
    inventory: Inventory, options: Options, error: float, share: float
) -> ModelRanks:
    """The ranks of a model's kernels, and what could be removed with errors up to a limit.

    In each layer, the smallest choice counts whose error is within the limit. With the least
    `max_error` for every `cr`, as the method `"alds"` has it, this is the largest `cr` in reach.
    Layers that are factorized count as they are, against their dense form.

    Args:
        inventory: The model.
        options: The choices to look at.
        error: The largest allowed error of a layer, in the method's own measure.
        share: As for `ranks_of`.
    """
    method = get_method(options.method, options.error_measure)
    schemes = options.schemes_of(method)
    inventory = inventory.map(lambda record: record.folded(schemes))
    resource = Params(inventory, method)
    selection = Selection.of(inventory, [resource], options)
    # The tables come first: they decompose the kernels for all slices, and keep the spectra.
    least = [int(t.weights[t.error <= error].min()) for t in selection.tables()]
    removable = {
        record.path: float(selection.removed(record, np.array(weights)))
        for record, weights in zip(selection.inventory.candidates, least, strict=True)
    }
    layers = {path: ranks_of(s, share) for path, s in kernel_spectra(selection.inventory).items()}
    kept = [record.layer for record in inventory.factorized if record.excluded]
    before = dense_params(inventory.model, kept)
    after = selection.fixed_cost(resource) + sum(least)
    return ModelRanks(layers, removable, removed_fraction(before, after))


def kernel_spectra(inventory: Inventory) -> dict[str, Float64]:
    """The singular values of each kernel in fold scheme 0, dense or in two factors, by path."""
    dense = [r for r in inventory.records if r.skipped is None or _is_beside_factors(r)]
    found = dict(zip([r.path for r in dense], singular_values(dense), strict=True))
    factorized = [record for record in inventory.factorized if not record.excluded]
    products = [_product(inventory, record) for record in factorized]
    for record, spectra in zip(factorized, spectra_many(products, slices=[1]), strict=True):
        found[record.path] = spectra.slices[1].singular_values
    return {r.path: found[r.path] for r in inventory.records if r.path in found}


def _is_beside_factors(record: LayerRecord) -> bool:
    """Whether a kernel stayed dense in a recurrent or attention layer with factorized ones."""
    if record.skipped is None or record.skipped.code is not Skip.HOLDER or record.excluded:
        return False
    return is_own(record.inside[-1][1]) and not is_factorized(record.layer)


def _product(inventory: Inventory, record: LayerRecord) -> Any:
    """The dense kernel of a factorized layer, `[*spatial, c, f]`."""
    unfolding = factorized_kind(record.layer).unfolding(record.layer)
    return unfolding.read(Factors.of(inventory.backend, record.layer).product)


class SettlingTime:
    """When to compress with `at_epoch="auto"`: once the ranks have settled, see `Settling`.

    Attributes:
        latest: The last epoch to wait for: half of all, so that the other half trains the factors.
    """

    def __init__(self, epochs: int | None) -> None:
        if epochs is None or epochs < 2:
            raise ValueError(
                "Expected at least 2 epochs with at_epoch='auto', to train before the compression "
                f"and after it. Received: epochs={epochs}"
            )
        self.latest = epochs // 2
        self._settling = Settling()

    def has_come(self, inventory: Inventory) -> bool:
        """Whether the ranks have settled; to be called once before every epoch."""
        spectra = kernel_spectra(inventory)
        return self._settling.add({path: ranks_of(s).stable for path, s in spectra.items()})

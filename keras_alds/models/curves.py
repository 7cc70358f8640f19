"""Measures what an error of each layer does to the outputs of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds.core.calibration.curves import Curve
from keras_alds.core.calibration.refit import SWEEPS
from keras_alds.core.chains import chain_kernel, is_chain
from keras_alds.core.choices import Choice, ChoiceTable, offered_ranks
from keras_alds.core.costs import Costs, WeightCosts
from keras_alds.core.methods import ACTIVATION
from keras_alds.core.parallel import threads
from keras_alds.core.slicing import Array, recompose
from keras_alds.kinds.base import kernel_values
from keras_alds.models.choices import Spectrums, choice_tables
from keras_alds.models.factorize import factors
from keras_alds.models.inventory import LayerRecord
from keras_alds.models.probes import Prober

#: The errors of a layer at which the outputs are compared.
PROBED_ERRORS = (0.02, 0.1, 0.3)
#: The same for the errors of kernels, which are larger than those of outputs.
PROBED_KERNEL_ERRORS = (0.1, 0.3, 0.5, 0.7)


def measure_curves(
    model: Any,
    records: Sequence[LayerRecord],
    spectra: Spectrums,
    batches: Sequence[Any],
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Curve]:
    """The divergence of the model's outputs at some errors of every layer, the others being exact.

    Args:
        model: The model.
        records: The layers, with second moments that have held-out inputs, or with inputs that
            cannot be observed, such as embeddings.
        spectra: Computes the spectra of layers.
        batches: Batches of held-out examples.
        progress: Called once a layer.

    Returns:
        Curves by path, of the layers whose kernels have choices with errors; none if the outputs
        are random.
    """
    # What an error does is much alike in all forms; chains take long.
    records = [
        dataclasses.replace(record, schemes=(0,)) if is_chain(record.schemes[-1]) else record
        for record in records
    ]
    tables = choice_tables(records, ACTIVATION, _one_slice, spectra)
    prober = Prober(model, [record.layer for record in records], batches)
    curves: dict[str, Curve] = {}
    if prober.reference.is_random:
        return curves
    with threads() as pool:

        def prepared(pair: tuple[LayerRecord, ChoiceTable]) -> list[tuple[float, Array]]:
            record, table = pair
            return [(c.error, approximation(record, c, sweeps=0)) for c in _probed(table, record)]

        for start in range(0, len(records), 2):  # few at once, to save memory
            some = records[start : start + 2]
            pairs = zip(some, tables[start : start + 2], strict=True)
            for record, probes in zip(some, pool.map(prepared, pairs), strict=True):
                found = [prober.divergence({record.layer: kernel}) for _, kernel in probes]
                curve = Curve.of([error for error, _ in probes], found)
                if curve is not None:
                    curves[record.path] = curve
                progress()
    return curves


def approximation(record: LayerRecord, choice: Any, *, sweeps: int = SWEEPS) -> Array:
    """The kernel that the factors of a choice amount to, of the shape of the layer's own.

    They are fitted without the held-out inputs.
    """
    layer = record.layer
    kernel = kernel_values(layer, choice.scheme)
    moment = record.moment and record.moment.without_held_out()
    parts = factors(record, choice, kernel, moment, sweeps=sweeps)
    if is_chain(choice.scheme):
        unfolded = chain_kernel(parts, choice.scheme)
    else:
        encoder, decoder = parts
        unfolded = recompose(encoder, decoder, choice.slices)
    return record.kind.folded(layer, choice.scheme).write(unfolded, record.kind.shape(layer))


def _one_slice(record: LayerRecord, scheme: int) -> tuple[Mapping[int, range], list[Costs]]:
    shape = record.shape_in(scheme)
    blocks = 1 if record.moment is None else record.moment.block_count
    ranks = offered_ranks(shape, near_slices=blocks, blocks=blocks)
    return ranks, [WeightCosts(((scheme, shape, 1),))]


def _probed(table: ChoiceTable, record: LayerRecord) -> list[Choice]:
    """The cheapest choices whose errors are near the probed ones."""
    front = table.front()
    front = front.take((front.slices > 0) & (front.error > 0))
    if not len(front):
        return []
    probed = PROBED_KERNEL_ERRORS if record.moment is None else PROBED_ERRORS
    distances = np.abs(np.log(front.error)[:, None] - np.log(probed))
    return [front[row] for row in sorted(set(distances.argmin(axis=0).tolist()))]

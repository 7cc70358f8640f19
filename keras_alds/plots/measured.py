"""Measures how far the outputs of a compressed model's layers are from the original's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_alds._backend import tensors
from keras_alds._backend.calls import replaced_calls, watched
from keras_alds._backend.loops import passing
from keras_alds.kinds.base import factorized_kind, is_factorized, running
from keras_alds.models.data import DEFAULT_EXAMPLES, Examples
from keras_alds.models.inventory import Inventory, LayerRecord
from keras_alds.models.observe import when_known
from keras_alds.models.turns import alone
from keras_alds.tables import counted


def errors_of_outputs(model: Any, compressed: Any, data: Any) -> dict[str, float]:
    """The relative squared error of each factorized layer's outputs, by path.

    Raises:
        ValueError: If the models do not belong together, or the data do not fit.
    """
    layers = _pairs(Inventory.of(model), Inventory.of(compressed))
    theirs = {path: original for path, (original, _) in layers.items()}
    ours = {path: layer for path, (_, layer) in layers.items()}
    distance, energy = dict.fromkeys(ours, 0.0), dict.fromkeys(ours, 0.0)
    with alone(model, compressed):
        for batch, _ in Examples(model, data, DEFAULT_EXAMPLES, "data"):
            wanted, found = _outputs(model, theirs, batch), _outputs(compressed, ours, batch)
            for path in ours:
                for mine, other in zip(found[path], wanted[path], strict=True):
                    distance[path] += float(np.square(mine - other, dtype=np.float64).sum())
                    energy[path] += float(np.square(other, dtype=np.float64).sum())
    return {path: distance[path] / energy[path] for path in ours if energy[path]}


def _pairs(original: Inventory, compressed: Inventory) -> dict[str, tuple[Any, Any]]:
    """Each factorized layer after the layer that it was, by the path of that.

    Layers are matched by name, or else by order: names that Keras numbers differ in a copy.
    """
    by_path = {record.path: record for record in original.records}
    for found in ([by_path.get(record.path) for record in compressed.records], original.records):
        rows = list(zip(found, compressed.records, strict=False))
        pairs = [(before, after) for before, after in rows if is_factorized(after.layer)]
        if pairs and all(map(_fits, pairs)):
            return {before.path: (before.layer, after.layer) for before, after in pairs if before}
    factorized = len(compressed.factorized)
    raise ValueError(
        "Expected `compressed` to be the compressed form of `model`, with factorized layers. "
        f"Received: one with {counted(factorized, 'factorized layer')}"
        f"{', which are of another model' if factorized else ''}"
    )


def _fits(pair: tuple[LayerRecord | None, LayerRecord]) -> bool:
    """Whether both layers have the same kernel, dense or factorized."""
    before, after = pair
    return before is not None and _shape(before) == _shape(after)


def _shape(record: LayerRecord) -> tuple[int, ...] | None:
    if not is_factorized(record.layer):
        return record.kernel_shape
    return factorized_kind(record.layer).folded(record.layer, 0).shape(record.layer.kernel_shape)


def _outputs(model: Any, layers: Mapping[str, Any], batch: Any) -> dict[str, list[np.ndarray]]:
    """The outputs of every call of some layers."""
    kept: dict[str, list[np.ndarray]] = {path: [] for path in layers}
    paths = {layer: path for path, layer in layers.items()}

    def keep(layer: Any, _: Any, outputs: Any) -> Any:
        return when_known(tensors.flatten(outputs)[0], outputs, kept[paths[layer]].append)

    with passing(model), replaced_calls(running(model), watched(paths, keep)):
        model(batch, training=False)
    return kept

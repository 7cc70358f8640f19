"""Measures how far the outputs of a compressed model's layers are from the original's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_alds._backend import tensors
from keras_alds._backend.calls import replaced_calls, watched
from keras_alds._backend.loops import passing
from keras_alds.kinds.base import running
from keras_alds.models.data import DEFAULT_EXAMPLES, Examples
from keras_alds.models.inventory import Inventory
from keras_alds.models.observe import when_known
from keras_alds.models.turns import alone


def errors_of_outputs(model: Any, compressed: Any, data: Any) -> dict[str, float]:
    """The relative squared error of each factorized layer's outputs, by path.

    Args:
        model: The original model.
        compressed: The compressed model.
        data: Examples.

    Raises:
        ValueError: If the models do not belong together, or the data do not fit.
    """
    ours = {record.path: record.layer for record in Inventory.of(compressed).factorized}
    known = {record.path: record.layer for record in Inventory.of(model).records}
    if not ours or not ours.keys() <= known.keys():
        others = [path for path in ours if path not in known]
        raise ValueError(
            "Expected `compressed` to be the compressed form of `model`, with factorized layers. "
            f"Received: one without {f'its layer {others[0]!r}' if others else 'any'}"
        )
    theirs = {path: known[path] for path in ours}
    distance: dict[str, float] = dict.fromkeys(ours, 0.0)
    energy: dict[str, float] = dict.fromkeys(ours, 0.0)
    with alone(model), alone(compressed):
        for batch, _ in Examples(model, data, DEFAULT_EXAMPLES, "data"):
            wanted, found = _outputs(model, theirs, batch), _outputs(compressed, ours, batch)
            for path in ours:
                for mine, other in zip(found[path], wanted[path], strict=True):
                    distance[path] += float(np.square(mine - other, dtype=np.float64).sum())
                    energy[path] += float(np.square(other, dtype=np.float64).sum())
    return {path: distance[path] / energy[path] for path in ours if energy[path]}


def _outputs(model: Any, layers: Mapping[str, Any], batch: Any) -> dict[str, list[np.ndarray]]:
    """The outputs of every call of some layers."""
    kept: dict[str, list[np.ndarray]] = {path: [] for path in layers}
    paths = {layer: path for path, layer in layers.items()}

    def keep(layer: Any, _: Any, outputs: Any) -> Any:
        return when_known(tensors.flatten(outputs)[0], outputs, kept[paths[layer]].append)

    with passing(model), replaced_calls(running(model), watched(paths, keep)):
        model(batch, training=False)
    return kept

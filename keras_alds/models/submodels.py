"""Parts of a model: the one that a user names, and those that are frozen."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from keras_alds import _backend
from keras_alds._backend.live import variables_of
from keras_alds.kinds.base import below
from keras_alds.models.inventory import LayerRecord


def find_submodel(model: Any, submodel: Any) -> Any:
    """The part of a model that a user means.

    Args:
        model: The model.
        submodel: None for the model itself; the attribute path of a model or layer inside it, such
            as `"student"` or `"blocks.0"`; or this model or layer itself.

    Raises:
        ValueError: If there is no such part, or it holds no layers.
    """
    if submodel is None or submodel is model:
        return model
    backend = _backend.backend_of(model)
    found = backend.at(model, submodel) if isinstance(submodel, str) else submodel
    inside = isinstance(submodel, str) or any(found is layer for layer in below(model))
    if not isinstance(found, backend.keras.layers.Layer) or not inside:
        known = ", ".join(map(repr, backend.parts(model))) or "none"
        received = repr(submodel) if isinstance(submodel, str) else f"{submodel!r}, not inside it"
        raise ValueError(
            f"Expected `submodel` to be a model or layer inside '{model.name}', or its attribute "
            f"path. Received: submodel={received}. Its models: {known}"
        )
    if not backend.children(found):
        raise ValueError(
            "Expected `submodel` to be a model, or a layer that holds other layers. Received: "
            f"'{found.name}' of type {type(found).__name__}. To compress single layers, `exclude` "
            "the others."
        )
    return found


def twins(model: Any) -> tuple[str, str] | None:
    """The names of two models in a model whose weights have the same shapes, if any.

    A momentum encoder, for example. Twins that share weights are one model here.
    """
    parts = {name: getattr(model, name) for name in _backend.backend_of(model).parts(model)}
    for (first, a), (second, b) in itertools.combinations(parts.items(), 2):
        weights = variables_of(a), variables_of(b)
        shapes = [[tuple(w.shape) for w in some] for some in weights]
        shared = set(map(id, weights[0])) & set(map(id, weights[1]))
        if shapes[0] == shapes[1] and any(len(shape) > 1 for shape in shapes[0]) and not shared:
            return first, second
    return None


def frozen_part(model: Any, records: Sequence[LayerRecord]) -> str | None:
    """What is wrong if a frozen model inside a model is cut while other layers are trained.

    A teacher beside its student, for example: its factors could not be trained.

    Returns:
        A sentence that names such a part, and a model that is trained; None if all is well.
    """
    backend = _backend.backend_of(model)
    holders = [
        [(path, holder) for path, holder in record.inside if backend.is_model(holder)]
        for record in records
    ]
    frozen = [path for pairs in holders for path, holder in pairs if not holder.trainable_weights]
    if not frozen or not any(layer.trainable_weights for layer in backend.children(model)):
        return None
    parts = [name for name in backend.parts(model) if getattr(model, name).trainable_weights]
    trained = f", such as '{parts[0]}'" if parts else ""
    return (
        f"'{frozen[0]}', a frozen part of '{model.name}', beside layers that are trained{trained}"
    )

"""Finds TF-MOT's wrappers around the layers of a model, and renews pruning masks.

Nothing here imports TF-MOT: the model's own wrappers suffice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.layers import dtype_policy, pruning_mask

PRUNING = "PruneLowMagnitude"
QUANTIZED = "QuantizeWrapper"
#: TF-MOT's wrappers whose layers cannot be factorized, and what to do instead.
REFUSED = {
    "ClusterWeights": "strip the model with `strip_clustering` first, and cluster its factors",
    QUANTIZED: "compress and `expand` the model before it is annotated for quantization",
    "QuantizeAnnotate": "compress and `expand` the model before it is annotated for quantization",
}


def kind(layer: Any) -> str | None:
    """The class name of a TF-MOT wrapper, or None for other layers."""
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("tensorflow_model_optimization.") and cls.__name__ in (
            PRUNING,
            *REFUSED,
        ):
            return cls.__name__
    return None


def is_pruning(layer: Any) -> bool:
    """Whether `layer` is TF-MOT's `PruneLowMagnitude`."""
    return kind(layer) == PRUNING


def is_quantized(layer: Any) -> bool:
    """Whether TF-MOT's `quantize_model` or `quantize_apply` wrapped `layer`."""
    return kind(layer) == QUANTIZED


def check_stripped(model: Any, user: str, *, quantized: bool = False) -> None:
    """Raises a ValueError if a layer of `model` is wrapped by TF-MOT.

    Args:
        model: A model.
        user: The function that needs a model without wrappers, for the error.
        quantized: Whether the wrappers of `quantize_apply` may stay. Defaults to False.
    """
    remedies = {PRUNING: "`strip_pruning(model)`", "ClusterWeights": "`strip_clustering(model)`"}
    before = "`quantize_apply(model)`" if quantized else "do this before `quantize_annotate_model`"
    backend = _backend.backend_of(model)

    def visit(parent: Any) -> None:
        for layer in backend.children(parent):
            found = kind(layer)
            if found is not None and not (quantized and found == QUANTIZED):
                raise ValueError(
                    f"Expected a model without TF-MOT's wrappers, for `{user}`. Received: a model "
                    f"with '{layer.name}' of type {found}. Remedy: " + remedies.get(found, before)
                )
            visit(layer)

    visit(model)


def refusal(layer: Any) -> str | None:
    """Why the layer inside a TF-MOT wrapper cannot be factorized, or None."""
    found = kind(layer)
    return f"it is wrapped by TF-MOT's {found}; {REFUSED[found]}" if found in REFUSED else None


def pruning(model: Any) -> list[Any]:
    """The built pruning wrappers in `model`, at any depth."""
    backend = _backend.backend_of(model)
    found: dict[int, Any] = {}

    def visit(parent: Any) -> None:
        for layer in backend.children(parent):
            if is_pruning(layer) and layer.built:
                found[id(layer)] = layer
            visit(layer)

    visit(model)
    return list(found.values())


def masks(wrapper: Any) -> list[Any]:
    """The variables that a `PruneLowMagnitude` adds to its layer."""
    added = [variable for _, *pair in wrapper.pruning_vars for variable in pair]
    return [*added, wrapper.pruning_step]


def apply_masks(pruning: Iterable[Any]) -> None:
    """Multiplies all pruned weights by their masks, like every call of the model."""
    for wrapper in pruning:
        wrapper.pruning_obj.weight_mask_op()


def without_pruning(model: Any) -> Any:
    """A copy of `model` without pruning wrappers and with new weights; `model` if it has none.

    `strip_pruning` would return a copy that shares its layers with `model`.
    """
    backend = _backend.backend_of(model)
    if not pruning(model) or not backend.is_symbolic(model):
        return model

    def clone(layer: Any) -> Any:
        if backend.is_model(layer):
            return backend.keras.models.clone_model(layer, clone_function=clone)
        inner = layer.layer if is_pruning(layer) else layer
        return type(inner).from_config(inner.get_config())

    return clone(model)


def renew_masks(backend: _backend.Backend, wrapper: Any) -> Callable[[], None]:
    """Creates new masks in a `PruneLowMagnitude` for the current weights of its layer.

    The wrapper stays the same object, with its schedule and `pruning_step`. If any weights were
    pruned already, the new masks have the schedule's sparsity at this step and are applied.

    Args:
        backend: The model's backend.
        wrapper: A built `PruneLowMagnitude` whose layer was factorized in place.

    Returns:
        A function that undoes the change.
    """
    begun = any(not backend.value(mask).all() for _, mask, _ in wrapper.pruning_vars)
    renewed = type(wrapper)(
        wrapper.layer,
        pruning_schedule=wrapper.pruning_schedule,
        block_size=wrapper.block_size,
        block_pooling_type=wrapper.block_pooling_type,
        sparsity_m_by_n=wrapper.sparsity_m_by_n,
        dtype=dtype_policy(wrapper),
    )
    with backend.name_scope(wrapper), _names_apart(renewed):
        renewed.build(wrapper._build_input_shape)
    renewed.pruning_step.assign(wrapper.pruning_step)
    if begun:
        for weight, mask, threshold in renewed.pruning_vars:
            new_threshold, new_mask = pruning_mask(renewed, weight)
            threshold.assign(new_threshold)
            mask.assign(new_mask)
    undo = backend.transplant(wrapper, renewed)
    wrapper.pruning_obj.weight_mask_op()
    return undo


@contextlib.contextmanager
def _names_apart(wrapper: Any) -> Iterator[None]:
    # TF-MOT gives the masks of all weights of a layer one name, so that HDF5 files and summaries
    # keep only one of them. A scope separates them without changing checkpoints, which use the
    # name given to `add_weight`.
    add_weight = wrapper.add_weight
    weights = wrapper.layer.get_prunable_weights()
    parts = [weight.name.split("/")[-1].split(":")[0] for weight in weights]
    scopes = {"mask": iter(parts), "threshold": iter(parts)}

    def add(name: str, *args: Any, **kwargs: Any) -> Any:
        if name not in scopes:
            return add_weight(name, *args, **kwargs)
        with tf.name_scope(next(scopes[name])):
            return add_weight(name, *args, **kwargs)

    wrapper.__dict__["add_weight"] = add
    try:
        yield
    finally:
        del wrapper.__dict__["add_weight"]

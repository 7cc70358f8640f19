"""Pruning and weight clustering with TF-MOT, for whole models and for factors."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds.core.checks import int_at_least
from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import Inventory
from keras_alds.models.rebuild import check_symbolic
from keras_alds.naming import check_exclude
from keras_alds.tfmot.package import tfmot_package


def prune_low_magnitude(
    model: Any, pruning_schedule: Any = None, *, exclude: Any = (), **options: Any
) -> Any:
    """Returns a new model whose kernels and factors are pruned in training.

    `model` is not changed. This is `prune_low_magnitude` of
    `tensorflow_model_optimization.sparsity.keras` with the option `exclude`. Unlike TF-MOT's own
    function, it accepts models with layers that TF-MOT does not know. A factorized layer gets a
    mask for each factor. Layers without a kernel are not wrapped, and a warning lists the kernels
    that TF-MOT cannot prune.

    Train the new model with TF-MOT's `UpdatePruningStep`, and strip it with its `strip_pruning`.

    Args:
        model: A Functional or Sequential tf_keras model, compressed or not.
        pruning_schedule: A `PruningSchedule` of TF-MOT. Defaults to None: TF-MOT's default, half of
            the weights from the first step.
        exclude: Layers to skip, as for `select`. Defaults to none.
        **options: Further arguments of TF-MOT's function, such as `block_size`.

    Returns:
        A new tf_keras model, not compiled.

    Raises:
        ImportError: If TF-MOT is not installed.
        ValueError: If `model` is a Keras 3 or subclassed model or already wrapped by TF-MOT; if
            `pruning_schedule` is invalid; or if there is no layer to wrap.

    Example:
    ```python
    small = keras_alds.to_tf_keras(keras_alds.compress(model, cr=0.5))
    pruned = keras_alds.tfmot.prune_low_magnitude(small, exclude="head")
    ```
    """
    sparsity = tfmot_package().sparsity.keras
    if pruning_schedule is not None:
        if not callable(pruning_schedule):
            raise ValueError(
                "Expected `pruning_schedule` to be a `PruningSchedule` of TF-MOT, such as "
                "`ConstantSparsity(0.5, 0)`. "
                f"Received: pruning_schedule={pruning_schedule!r}"
            )
        options["pruning_schedule"] = pruning_schedule

    def wrap(layer: Any) -> Any:
        return sparsity.prune_low_magnitude(layer, **options)

    def weights(layer: Any) -> list[Any]:
        try:
            sparsity.prune_low_magnitude(layer)  # raises for layers that it does not know
        except ValueError:
            return []
        return layer.get_prunable_weights()

    return _wrapped(model, exclude, wrap, weights, "prune_low_magnitude")


def cluster_weights(
    model: Any, number_of_clusters: int, *, exclude: Any = (), **options: Any
) -> Any:
    """Returns a new model whose kernels and factors are clustered.

    `model` is not changed. This is `cluster_weights` of
    `tensorflow_model_optimization.clustering.keras` with the option `exclude` and support for
    factorized layers: each factor gets its own centroids. Layers without a kernel are not wrapped,
    and a warning lists the kernels that TF-MOT cannot cluster or that have too few weights.

    Train the new model, and strip it with TF-MOT's `strip_clustering`.

    Args:
        model: A trained Functional or Sequential tf_keras model, compressed or not.
        number_of_clusters: Integer > 1. Number of distinct values in a kernel or factor.
        exclude: Layers to skip, as for `select`. Defaults to none.
        **options: Further arguments of TF-MOT's function, such as `cluster_centroids_init`, and of
            its experimental version: `preserve_sparsity`, and `cluster_per_channel`, which works
            only for stock convolutions.

    Returns:
        A new tf_keras model, not compiled.

    Raises:
        ImportError: If TF-MOT is not installed.
        ValueError: If `model` is a Keras 3 or subclassed model or already wrapped by TF-MOT; if
            `number_of_clusters` is invalid; or if there is no layer to wrap.

    Example:
    ```python
    small = keras_alds.to_tf_keras(keras_alds.compress(model, cr=0.5))
    clustered = keras_alds.tfmot.cluster_weights(small, 16, exclude="head")
    ```
    """
    int_at_least(number_of_clusters, "number_of_clusters", 2)
    clustering = tfmot_package().clustering.keras
    experimental = importlib.import_module(f"{clustering.experimental.__name__}.cluster")

    def wrap(layer: Any) -> Any:
        return experimental.cluster_weights(layer, number_of_clusters, **options)

    def weights(layer: Any) -> list[Any]:
        if is_factorized(layer):
            clustering.ClusterableLayer.register(type(layer))
        try:
            clustering.cluster_weights(layer, 2)
        except ValueError:
            return []
        found = [weight for _, weight in layer.get_clusterable_weights()]
        return found if all(_size(weight) > number_of_clusters for weight in found) else []

    return _wrapped(model, exclude, wrap, weights, "cluster_weights")


def _size(variable: Any) -> int:
    return int(variable.shape.num_elements())


def _wrapped(
    model: Any,
    exclude: Any,
    wrap: Callable[[Any], Any],
    weights: Callable[[Any], list[Any]],
    name: str,
) -> Any:
    """A copy of `model` in which the layers with any `weights` are wrapped."""
    if _backend.backend_of(model) is not _backend.tf_keras_backend():
        raise ValueError(
            f"Expected a tf_keras model for `{name}`, as TF-MOT requires. Received: "
            f"'{model.name}' of Keras 3. Remedy: keras_alds.to_tf_keras(model)"
        )
    backend = check_symbolic(model, name)
    wrappers.check_stripped(model, name)
    copy = backend.copy_model(model, stacklevel=3)
    inventory = Inventory.of(copy, check_exclude(exclude))
    inventory.warn_of_unmatched(stacklevel=3)
    excluded = {record.layer for record in inventory.records if record.excluded}
    reached: set[int] = set()

    def clone(layer: Any) -> Any:
        if backend.is_model(layer):
            return backend.keras.models.clone_model(layer, clone_function=clone)
        found = [] if layer in excluded else weights(layer)
        reached.update(map(id, found))
        return wrap(layer) if found else layer

    new = backend.keras.models.clone_model(copy, clone_function=clone)
    left = [
        f"'{record.path}' ({record.class_name})"
        for record in inventory.records
        if not record.excluded
        and any(
            len(variable.shape) > 1 and id(variable) not in reached
            for variable in backend.own_variables(record.layer)
        )
    ]
    if not reached:
        raise ValueError(
            f"Expected the model '{model.name}' to hold a kernel for TF-MOT's `{name}`, outside of "
            f"`exclude`. Received: none ({', '.join(left[:5]) or 'no kernels at all'})"
        )
    if left:
        warnings.warn(
            f"TF-MOT's `{name}` skips these layers: {', '.join(left)}. It does not know their "
            "class, or they have too few weights.",
            stacklevel=3,
        )
    return new

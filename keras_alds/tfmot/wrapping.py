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
    """Returns a new model whose kernels and factors training prunes; `model` is untouched.

    It is `tensorflow_model_optimization.sparsity.keras.prune_low_magnitude` for a whole model, with
    layers left out by `exclude`, and without its refusal of models that hold any layer it does not
    know. A factorized layer gets a mask for each factor. What holds no kernel is not wrapped; a
    warning names kernels that TF-MOT cannot prune.

    Train the new model with TF-MOT's `UpdatePruningStep`, and strip it with its `strip_pruning`.

    Args:
        model: A Functional or Sequential tf_keras model, compressed or not.
        pruning_schedule: A `PruningSchedule` of TF-MOT, or None for TF-MOT's default, half of the
            weights from the first step. Defaults to None.
        exclude: Layers that stay as they are, as for `select`. Defaults to none.
        **options: Further arguments of TF-MOT's function, such as `block_size`.

    Returns:
        A new tf_keras model, not compiled.

    Raises:
        ImportError: If TF-MOT is not installed.
        ValueError: If `model` is of Keras 3, is a subclassed one, or is wrapped by TF-MOT
            already; if `pruning_schedule` is none; or if nothing is left to be wrapped.

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
            sparsity.prune_low_magnitude(layer)  # refuses layers that it does not know
        except ValueError:
            return []
        return layer.get_prunable_weights()

    return _wrapped(model, exclude, wrap, weights, "prune_low_magnitude")


def cluster_weights(
    model: Any, number_of_clusters: int, *, exclude: Any = (), **options: Any
) -> Any:
    """Returns a new model whose kernels and factors are clustered; `model` is untouched.

    It is `tensorflow_model_optimization.clustering.keras.cluster_weights` for a whole model, with
    layers left out by `exclude`, and it knows factorized layers: each factor gets centroids of its
    own. What holds no kernel is not wrapped; a warning names kernels that TF-MOT cannot cluster,
    and those of fewer weights than clusters.

    Train the new model, and strip it with TF-MOT's `strip_clustering`.

    Args:
        model: A trained Functional or Sequential tf_keras model, compressed or not.
        number_of_clusters: Integer > 1. Number of values that a kernel or factor may have.
        exclude: Layers that stay as they are, as for `select`. Defaults to none.
        **options: Further arguments of TF-MOT's function, such as `cluster_centroids_init`, and of
            its experimental one: `preserve_sparsity`, and `cluster_per_channel`, which works for
            stock convolutions only.

    Returns:
        A new tf_keras model, not compiled.

    Raises:
        ImportError: If TF-MOT is not installed.
        ValueError: If `model` is of Keras 3, is a subclassed one, or is wrapped by TF-MOT
            already; if `number_of_clusters` is not as above; or if nothing is left to be wrapped.

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
    """A copy of `model` with the layers wrapped of which `weights` names some."""
    if _backend.backend_of(model) is not _backend.tf_keras_backend():
        raise ValueError(
            f"Expected a model of tf_keras, for `{name}`: TF-MOT takes no other. Received: "
            f"'{model.name}' of Keras 3. Remedy: keras_alds.to_tf_keras(model)"
        )
    backend = check_symbolic(model, name)
    wrappers.check_stripped(model, name)
    copy = backend.copy_model(model)
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
            f"TF-MOT's `{name}` leaves these layers as they are: {', '.join(left)}. It does not "
            "know their class, or they hold too few weights.",
            stacklevel=3,
        )
    return new

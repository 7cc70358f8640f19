"""Converts optimizer state from a kernel W to its factors E and D, W ≈ E D.

If G is the gradient of the loss with respect to W, those with respect to the factors are G Dᵀ and
Eᵀ G. State that is linear in past gradients (momentum, first moments, accumulated gradients) is
converted by these products. Averages of squared gradients are converted by the products with the
squared factors, their expectation for uncorrelated entries of G. An average of weights starts at
the factor itself, and any other state at its initial value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend.training import AVERAGE, SQUARED, slot_meaning
from keras_alds.core.slicing import fold_encoder, unfold, unfold_encoder


def carry_optimizers(
    backend: _backend.Backend,
    model: Any,
    known: list[Any],
    factorized: dict[int, Any],
    undo: list[Callable[[], None]],
) -> None:
    """Rebuilds every optimizer of `model` for its current variables and converts its state.

    Args:
        backend: The model's backend.
        model: A model whose layers were just factorized in place.
        known: The model's variables before that.
        factorized: The factorized layer by the id of the kernel variable that it replaces.
        undo: A list to which functions are appended that restore the optimizers.
    """
    for optimizer in reversed(backend.optimizers(model)):  # wrappers after what they wrap
        for target in known:
            layer = factorized.get(id(target))
            if layer is not None:
                undo += _carry_settings(backend, optimizer, target, [layer.encoder, layer.decoder])
        if not backend.is_optimizer_built(optimizer):
            continue
        old = backend.optimizer_targets(optimizer, known)
        if not any(id(target) in factorized for target in old):
            continue
        new = []
        for target in old:
            layer = factorized.get(id(target))
            new += [target] if layer is None else [layer.encoder, layer.decoder]
        before = backend.slots(optimizer, old)
        in_order = all(a is b for a, b in zip(_in_order(old, known), old, strict=True))
        built = _in_order(new, model.variables) if in_order else new
        backend.rebuild_optimizer(optimizer, old, built, undo)
        places = {id(variable): place for place, variable in enumerate(built)}
        after = {
            name: [slot[places[id(variable)]] for variable in new]
            for name, slot in backend.slots(optimizer, built).items()
        }
        for name, slot in after.items():
            if name in before:
                _carry(backend, slot_meaning(optimizer, name), old, before[name], slot, factorized)


def _carry_settings(
    backend: _backend.Backend, optimizer: Any, kernel: Any, factors: list[Any]
) -> list[Callable[[], None]]:
    """Gives the factors what an optimizer's settings say of their kernel; returns the undo."""
    if backend.inner_optimizers(optimizer):
        return [backend.assign_like(optimizer, kernel, factors)]
    if backend.is_excluded_from_weight_decay(optimizer, kernel):
        return [backend.exclude_from_weight_decay(optimizer, factors)]
    return []


def _in_order(targets: list[Any], variables: list[Any]) -> list[Any]:
    """Variables of an optimizer in the model's order, others last.

    A loaded model builds its optimizer, and reads its state, in that order.
    """
    places = {id(variable): place for place, variable in enumerate(variables)}
    return sorted(targets, key=lambda variable: places.get(id(variable), len(places)))


def _carry(
    backend: _backend.Backend,
    meaning: str | None,
    old: list[Any],
    before: list[Any],
    after: list[Any],
    factorized: dict[int, Any],
) -> None:
    index = 0
    for target, state in zip(old, before, strict=True):
        layer = factorized.get(id(target))
        places = after[index : index + (1 if layer is None else 2)]
        index += len(places)
        if state is None or any(place is None for place in places):
            continue
        if layer is None:
            places[0].assign(state)
        elif meaning is not None:
            for place, value in zip(
                places, carried(backend, meaning, backend.value(state), layer), strict=True
            ):
                place.assign(np.reshape(value, tuple(place.shape)))


def carried(
    backend: _backend.Backend, meaning: str, state: np.ndarray, layer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The state of encoder and decoder, converted from the state of the dense kernel.

    Args:
        backend: The layer's backend.
        meaning: `"linear"` in past gradients, `"squared"` gradients, or weight `"average"`.
        state: The optimizer's state for the kernel, in the kernel's shape.
        layer: The factorized layer.

    Returns:
        Arrays in the shapes of `layer.encoder` and `layer.decoder`.
    """
    encoder, decoder = backend.value(layer.encoder), backend.value(layer.decoder)
    if meaning == AVERAGE:
        return encoder, decoder
    slices, rank = layer.slices, layer.rank
    unfolding, shape = layer.unfolding, layer.kernel_shape
    *spatial, channels, _ = unfolding.shape(shape)
    folded = encoder.astype(np.float64).reshape(*spatial, channels // slices, slices * rank)
    E = unfold_encoder(folded, slices)
    D = unfolding.read_decoder(decoder.astype(np.float64), shape).reshape(slices, rank, -1)
    G = unfold(unfolding.read(state.astype(np.float64)), slices)
    if meaning == SQUARED:
        E, D = E**2, D**2
    d_encoder = G @ D.transpose(0, 2, 1)
    d_decoder = E.transpose(0, 2, 1) @ G
    d_decoder = unfolding.write_decoder(d_decoder.reshape(slices * rank, -1), shape)
    folded = fold_encoder(d_encoder, spatial)
    return folded.reshape(encoder.shape), d_decoder.reshape(decoder.shape)

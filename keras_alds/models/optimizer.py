"""Converts optimizer state between a kernel W and its factors E and D, W ≈ E D.

If G is the gradient of the loss with respect to W, those with respect to the factors are G Dᵀ and
Eᵀ G. State that is linear in past gradients (momentum, first moments, accumulated gradients) is
converted by these products. Averages of squared gradients are converted by the products with the
squared factors, their expectation for uncorrelated entries of G. An average of weights starts at
the factor itself, and any other state at its initial value.

`gathered` converts the other way, where factors become a dense kernel again.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend.live import Holders, live_variables, variables_of
from keras_alds._backend.training import AVERAGE, SQUARED, slot_meaning
from keras_alds.core.chains import CP, EQUATIONS, chain_kernel, is_chain
from keras_alds.core.slicing import Unfolding, fold_encoder, unfold, unfold_encoder
from keras_alds.kinds.base import scheme_of


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """Variables that take the place of others.

    Attributes:
        layer: The layer that they belong to.
        old: A kernel, or an encoder and a decoder.
        new: What replaces it.
        convert: `convert(meaning, values)` returns the optimizer's state of the new variables from
            the values of the old variables' state. `meaning` is one of `slot_meaning`.
    """

    layer: Any
    old: tuple[Any, ...]
    new: tuple[Any, ...]
    convert: Callable[[str, list[np.ndarray]], Sequence[np.ndarray]]


def carry_optimizers(
    backend: _backend.Backend,
    holders: Holders,
    exchanges: Sequence[Exchange],
    undo: list[Callable[[], None]],
) -> list[Any]:
    """Rebuilds every optimizer that updates an exchanged variable, and converts its state.

    Args:
        backend: The backend of the layers.
        holders: What was alive before the layers were changed in place.
        exchanges: The variables that were replaced.
        undo: A list to which functions are appended that restore the optimizers.

    Returns:
        The optimizers' variables that are not used any more.

    Raises:
        ValueError: If tf_keras cannot tell which other variables an optimizer updates.
    """
    models = [layer for layer in holders.layers if backend.is_model(layer)]
    owners = {optimizer: m for m in reversed(models) for optimizer in backend.optimizers(m)}
    replaced = {id(variable): variable for e in exchanges for variable in e.old}
    everything = [variable for held in holders.layers.values() for variable in held]
    gone = []
    # Wrappers after what they wrap.
    for optimizer in sorted(holders.optimizers, key=lambda item: _depth(backend, item)):
        owner = owners.get(optimizer)
        known = [] if owner is None else holders.layers[owner]
        ours = set(map(id, known))
        for e in exchanges:
            if owner is None or not ours.isdisjoint(map(id, e.old)):
                undo += _carry_settings(backend, optimizer, e)
        if backend.is_optimizer_built(optimizer):
            targets = backend.optimizer_targets(optimizer, list(replaced.values()))
            if not any(id(variable) in replaced for variable in targets):
                continue
            now = [] if owner is None else variables_of(owner)
            unique = {id(variable): variable for variable in [*known, *everything]}
            old = backend.optimizer_targets(optimizer, list(unique.values()))
            if any(target is None for target in old):  # tf_keras keeps keys of variables only
                old = backend.optimizer_targets(optimizer, [*live_variables(), *unique.values()])
            gone += _carry_one(backend, optimizer, old, known, now, exchanges, undo)
    return gone


def _carry_one(
    backend: _backend.Backend,
    optimizer: Any,
    old: list[Any],
    known: list[Any],
    now: list[Any],
    exchanges: Sequence[Exchange],
    undo: list[Callable[[], None]],
) -> list[Any]:
    """Rebuilds one optimizer, whose model had the variables `known` and has those in `now`."""
    kept = set(map(id, now))  # a kernel may be a weight of another layer too
    exchange_of = {id(v): e for e in exchanges for v in e.old if id(v) not in kept}
    if not any(id(target) in exchange_of for target in old):
        return []
    if lost := sum(target is None for target in old):
        raise ValueError(
            f"Expected the optimizer '{optimizer.name}' to update only variables of layers. "
            f"Received: an optimizer that was also built for {lost} other variables. Give the "
            "model an optimizer of its own."
        )
    before = backend.slots(optimizer, old)
    if backend.other_state(optimizer, before):
        warnings.warn(
            f"The state of the optimizer '{optimizer.name}' ({type(optimizer).__name__}) is reset "
            "for all variables. Only state in a list or dictionary with one variable for each "
            "weight can be carried over.",
            stacklevel=2,
        )
    new = _exchanged(old, exchange_of)
    if all(a is b for a, b in zip(_in_order(old, known), old, strict=True)):
        new = _in_order(new, now)
    backend.rebuild_optimizer(optimizer, old, new, undo)
    after = backend.slots(optimizer, new)
    changed = list(dict.fromkeys(exchange_of.values()))
    for name, slot in after.items():
        if name in before:
            states = {id(t): state for t, state in zip(old, before[name], strict=True)}
            places = {id(t): place for t, place in zip(new, slot, strict=True)}
            _carry(backend, slot_meaning(optimizer, name), states, places, changed)
    used = {id(v) for slot in after.values() for v in slot}
    return [v for slot in before.values() for v in slot if v is not None and id(v) not in used]


def _exchanged(variables: list[Any], exchange_of: dict[int, Exchange]) -> list[Any]:
    """Variables, each once, with the new ones in the places of the old ones."""
    found: dict[int, Any] = {}
    for variable in variables:
        exchange = exchange_of.get(id(variable))
        found.update((id(v), v) for v in ([variable] if exchange is None else exchange.new))
    return [*found.values()]


def _depth(backend: _backend.Backend, optimizer: Any) -> int:
    """How many optimizers are around each other."""
    inner = backend.inner_optimizers(optimizer)
    return 1 + max((_depth(backend, item) for item in inner), default=0)


def _carry_settings(
    backend: _backend.Backend, optimizer: Any, e: Exchange
) -> list[Callable[[], None]]:
    """Gives new variables what an optimizer's settings say of the old ones; returns the undo."""
    if backend.inner_optimizers(optimizer):
        return [backend.assign_like(optimizer, e.old[0], list(e.new))]
    if any(backend.is_excluded_from_weight_decay(optimizer, v) for v in e.old):
        return [backend.exclude_from_weight_decay(optimizer, list(e.new))]
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
    states: dict[int, Any],
    places: dict[int, Any],
    exchanges: Sequence[Exchange],
) -> None:
    """Assigns one slot's state, by the ids of its variables."""
    for key in states.keys() & places.keys():
        if states[key] is not None and places[key] is not None:
            places[key].assign(states[key])
    for e in exchanges:
        old = [states[id(v)] for v in e.old if states.get(id(v)) is not None]
        new = [places[id(v)] for v in e.new if places.get(id(v)) is not None]
        if meaning is None or len(old) < len(e.old) or len(new) < len(e.new):
            continue
        values = e.convert(meaning, [backend.value(state) for state in old])
        for place, value in zip(new, values, strict=True):
            place.assign(np.reshape(value, tuple(place.shape)))


def carried(
    backend: _backend.Backend, meaning: str, state: np.ndarray, layer: Any
) -> tuple[np.ndarray, ...]:
    """The state of a layer's factors, converted from the state of the dense kernel.

    Args:
        backend: The layer's backend.
        meaning: `"linear"` in past gradients, `"squared"` gradients, or weight `"average"`.
        state: The optimizer's state for the kernel, in the kernel's shape.
        layer: The factorized layer.

    Returns:
        Arrays in the shapes of `layer.factors`.
    """
    factors = Factors.of(backend, layer)
    if isinstance(factors, ChainFactors):
        return factors.carried(meaning, state)
    if meaning == AVERAGE:
        return factors.encoder, factors.decoder
    E, D = factors.matrices(factors.encoder, factors.decoder)
    G = unfold(factors.unfolding.read(state.astype(np.float64)), factors.slices)
    if meaning == SQUARED:
        E, D = E**2, D**2
    return factors.written(G @ D.transpose(0, 2, 1), E.transpose(0, 2, 1) @ G)


@dataclasses.dataclass(frozen=True)
class Factors:
    """The values of a factorized layer's factors, and how they are read as matrices."""

    encoder: np.ndarray
    decoder: np.ndarray
    slices: int
    rank: int
    unfolding: Unfolding
    kernel_shape: tuple[int, ...]

    @classmethod
    def of(cls, backend: _backend.Backend, layer: Any) -> Any:
        """Those of a factorized layer; `ChainFactors` of a chain."""
        if is_chain(scheme := scheme_of(layer)):
            return ChainFactors(tuple(backend.value(part) for part in layer.factors), scheme)
        values = backend.value(layer.encoder), backend.value(layer.decoder)
        return cls(*values, layer.slices, layer.rank, layer.unfolding, tuple(layer.kernel_shape))

    def matrices(self, encoder: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Arrays in the factors' shapes as `[k, (c/k)·κ, j]` and `[k, j, f]` in float64."""
        *spatial, channels, _ = self.unfolding.shape(self.kernel_shape)
        hidden = self.slices * self.rank
        folded = encoder.astype(np.float64).reshape(*spatial, channels // self.slices, hidden)
        read = self.unfolding.read_decoder(decoder.astype(np.float64), self.kernel_shape)
        return unfold_encoder(folded, self.slices), read.reshape(self.slices, self.rank, -1)

    def written(self, encoder: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `matrices`."""
        *spatial, _, _ = self.unfolding.shape(self.kernel_shape)
        rows = decoder.reshape(self.slices * self.rank, -1)
        written = self.unfolding.write_decoder(rows, self.kernel_shape)
        folded = fold_encoder(encoder, spatial)
        return folded.reshape(self.encoder.shape), written.reshape(self.decoder.shape)

    def kernel(self, matrices: np.ndarray) -> np.ndarray:
        """Matrices `[k, (c/k)·κ, f]` as a kernel in the layer's own layout."""
        *spatial, channels, filters = self.unfolding.shape(self.kernel_shape)
        dense = np.moveaxis(matrices.reshape(channels, *spatial, filters), 0, -2)
        return self.unfolding.write(dense, self.kernel_shape)

    @property
    def product(self) -> np.ndarray:
        """The dense kernel that they stand for."""
        E, D = self.matrices(self.encoder, self.decoder)
        return self.kernel(E @ D).astype(self.encoder.dtype)


@dataclasses.dataclass(frozen=True)
class ChainFactors:
    """The values of the factors of a chain, and what they are a product of; see `core.chains`."""

    values: tuple[np.ndarray, ...]
    scheme: int

    def _arrays(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The arrays of the decomposition, without the axes of length 1 that a convolution adds."""
        outer = ((0, 1), *(((1, 2), (0, 2)) if self.scheme == CP else ((),)), (0, 1))
        pairs = zip(values, outer, strict=True)
        return [np.squeeze(value.astype(np.float64), axes) for value, axes in pairs]

    @property
    def product(self) -> np.ndarray:
        """The dense kernel that they stand for."""
        kernel = chain_kernel(self._arrays(self.values), self.scheme)
        return kernel.astype(self.values[0].dtype)

    def carried(self, meaning: str, state: np.ndarray) -> tuple[np.ndarray, ...]:
        """As the function of this name."""
        if meaning == AVERAGE:
            return self.values
        arrays = self._arrays(self.values)
        if meaning == SQUARED:
            arrays = [array**2 for array in arrays]
        sources, _, kernel = EQUATIONS[self.scheme].partition("->")
        terms, found = sources.split(","), []
        for i, term in enumerate(terms):
            others = [
                state.astype(np.float64) if n == i else array for n, array in enumerate(arrays)
            ]
            given = ",".join(kernel if n == i else other for n, other in enumerate(terms))
            found.append(np.einsum(f"{given}->{term}", *others, optimize=True))
        return tuple(found)

    def gathered(self, meaning: str, states: Sequence[np.ndarray]) -> np.ndarray:
        """As the function of this name; what is known from the last factor's state."""
        if meaning == AVERAGE:
            return self.product
        *arrays, last = self._arrays(self.values)
        first = chain_kernel([*arrays, np.eye(len(last))], self.scheme)
        E, shape = first.reshape(-1, len(last)), (*first.shape[:-1], last.shape[-1])
        state = self._arrays(states)[-1]
        if meaning == SQUARED:
            scale = np.square(E).sum()
            rows = np.broadcast_to(state.sum(0) / (scale if scale > 0 else np.inf), shape)
            return np.array(rows)
        return (np.linalg.pinv(E).T @ state).reshape(shape)


def gathered(
    meaning: str, states: Sequence[np.ndarray], factors: Factors | ChainFactors
) -> np.ndarray:
    """The state of a dense kernel, converted from the states of its encoder and decoder.

    The inverse of `carried`, as far as there is one. Of gradients G, the states G Dᵀ and Eᵀ G of
    the factors hold the part that lies in the column space of E or in the row space of D; this
    part is returned. Squared gradients are taken to be products of a row and a column, as in
    Adafactor.

    Args:
        meaning: As for `carried`.
        states: The optimizer's states for encoder and decoder, in their shapes.
        factors: The factors.

    Returns:
        An array in the shape of the dense kernel.
    """
    if isinstance(factors, ChainFactors):
        return factors.gathered(meaning, states)
    if meaning == AVERAGE:
        return factors.product
    E, D = factors.matrices(factors.encoder, factors.decoder)
    of_encoder, of_decoder = factors.matrices(*states)
    if meaning == SQUARED:
        rows = of_encoder.sum(2)[:, :, None]
        columns = of_decoder.sum(1)[:, None, :]
        scale = (columns * np.square(D).sum(1)[:, None, :]).sum(2, keepdims=True)
        return factors.kernel(rows * columns / np.where(scale > 0, scale, np.inf))
    left, right = np.linalg.pinv(E), np.linalg.pinv(D)
    from_decoder = of_decoder - E.transpose(0, 2, 1) @ of_encoder @ right.transpose(0, 2, 1)
    return factors.kernel(
        of_encoder @ right.transpose(0, 2, 1) + left.transpose(0, 2, 1) @ from_decoder
    )

"""`Inventory`: the layers of a model with weights, inspected in one walk.

It has a record of every layer with weights, which says why a layer is skipped. Later steps use
the inventory instead of walking through the model again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from keras_alds import _backend
from keras_alds._backend import wrappers
from keras_alds._backend.calls import replaced_calls
from keras_alds._backend.functions import has_own_code
from keras_alds._backend.live import assigned_in
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.chains import is_chain
from keras_alds.core.checks import did_you_mean
from keras_alds.core.choices import RankRule
from keras_alds.core.slicing import decoder_axes
from keras_alds.kinds.base import (
    KernelKind,
    below,
    is_factorized,
    kind_of,
    known_kind,
    running,
    skipped_by_kind,
    stock_kind,
    unfolded_shape,
)
from keras_alds.kinds.holders import WithFactorizedLayers
from keras_alds.naming import Bound, described, matches
from keras_alds.plan import Skip, Skipped
from keras_alds.tables import counted
from keras_alds.targets import Target

#: The shapes of the inputs and the outputs of every call of a layer.
Calls = list[tuple[tuple[int, ...], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRecord:
    """One layer with weights.

    Attributes:
        path: Names from the model to the layer, joined by `/`; unique in the model.
        layer: The layer itself.
        params: Number of the layer's parameters, without those of layers inside it.
        kernel_shape: The shape of its kernel as `(*spatial, channels, filters)`; None if its class
            has no factorized form.
        skipped: Why it is skipped; None if it can be factorized.
        factorizable: Whether it can be factorized, regardless of the user's options.
        excluded: Whether the user's `exclude` names it.
        inside: The layers and models that contain it, with their paths, outermost first.
        schemes: The allowed fold schemes of its kernel.
        bounds: The least and the greatest fraction of its parameters to remove.
        moment: The second moment of its unfolded inputs; None without calibration data.
        ridge: The ρ that fits its inputs, as a part of the mean eigenvalue of their second moment.
        curve: What its error does to the model's outputs; None if this was not measured.
    """

    path: str
    layer: Any
    params: int
    kernel_shape: tuple[int, ...] | None
    skipped: Skipped | None
    factorizable: bool = False
    excluded: bool = False
    inside: tuple[tuple[str, Any], ...] = ()
    schemes: tuple[int, ...] = (0,)
    bounds: tuple[float, float] = (0.0, 1.0)
    moment: SecondMoment | None = None
    ridge: float | None = None
    curve: Curve | None = None

    @property
    def class_name(self) -> str:
        """The layer's class name."""
        return type(self.layer).__name__

    @functools.cached_property
    def kind(self) -> KernelKind:
        """The kind of a layer that can be factorized."""
        return known_kind(self.layer)

    @property
    def dense_weights(self) -> int:
        """Number of weights of the kernel; 0 if it has no kernel to factorize."""
        return math.prod(self.kernel_shape) if self.kernel_shape else 0

    @property
    def judged(self) -> bool:
        """Whether its errors are those on held-out examples."""
        return self.moment is not None and self.moment.held_out is not None

    def forgotten(self) -> LayerRecord:
        """The same record without its second moment, which takes memory."""
        return dataclasses.replace(self, moment=None)

    def is_named_by(self, item: Any) -> bool:
        """Whether an item of `exclude` or `bounds` names the layer, or one that contains it."""
        return any(
            matches(item, path, layer) for path, layer in ((self.path, self.layer), *self.inside)
        )

    def shape_in(self, scheme: int) -> tuple[int, ...]:
        """The shape of its kernel as `(*spatial, c, f)` in a fold scheme."""
        return unfolded_shape(self.layer, scheme) if scheme else (self.kernel_shape or ())

    @property
    def window(self) -> tuple[int, ...]:
        """The kernel size of a convolution; empty for other layers."""
        return (self.kernel_shape or ())[:-2]

    def rule_of(self, target: Target, scheme: int, blocks: int = 1) -> RankRule:
        """The ranks that a target allows in a fold scheme, as a function for `offered_ranks`."""
        strides = tuple(getattr(self.layer, "strides", ()))
        axes = decoder_axes(scheme, len(self.window)) if scheme else ()
        return functools.partial(
            target.ranks,
            depthwise=len(set(strides)) <= 1,
            blocks=blocks,
            positions=math.prod(self.window[axis] for axis in axes),
            strides=math.prod(strides[axis] for axis in axes),
        )

    def fold(self, moment: SecondMoment, scheme: int) -> SecondMoment:
        """A second moment of its unfolded inputs, for one of its fold schemes."""
        if not scheme or is_chain(scheme):
            return moment
        return moment.folded(self.window, decoder_axes(scheme, len(self.window)))

    def skip(self, code: Skip, detail: str) -> LayerRecord:
        """The same record, skipped for a reason."""
        return dataclasses.replace(self, skipped=Skipped(code, detail))

    def folded(self, schemes: Sequence[int]) -> LayerRecord:
        """The same record with only the given fold schemes, as far as the kernel has them."""
        if self.skipped is not None:
            return self
        known = {**self.kind.schemes(self.layer), **self.kind.chain_schemes(self.layer)}
        # Schemes that are equal for this kernel count once.
        found = tuple(sorted({known[scheme] for scheme in schemes if scheme in known}))
        if not found:
            detail = f"its kernel {self.kernel_shape} cannot be unfolded in schemes={schemes}"
            return self.skip(Skip.SETTINGS, detail)
        if not self.kind.can_shrink(self.layer, found):
            detail = f"no factorization of its kernel {self.kernel_shape} is smaller"
            return self.skip(Skip.TOO_SMALL, detail)
        return dataclasses.replace(self, schemes=found)

    def bounded(self, bounds: Iterable[Bound]) -> LayerRecord:
        """The same record with the intersection of all bounds that name the layer."""
        if self.skipped is not None:
            return self
        least, greatest = self.bounds
        for bound in bounds:
            if self.is_named_by(bound.item):
                least, greatest = max(least, bound.least), min(greatest, bound.greatest)
        return dataclasses.replace(self, bounds=(least, greatest))


@dataclasses.dataclass(frozen=True, eq=False)
class Inventory:
    """The layers of a model.

    Attributes:
        model: The model.
        layers: Every layer at any depth with its path, depth first. TF-MOT's pruning wrappers are
            left out, also from the paths of the layers inside them.
        pruning: The built pruning wrappers.
        records: A record of every layer with weights.
        params: All parameters of the model, without the masks of pruning.
        unmatched: The items of `exclude` that name no layer with weights.
        exclude: All items that name layers to skip.
    """

    model: Any
    layers: tuple[tuple[str, Any], ...]
    pruning: tuple[Any, ...]
    records: tuple[LayerRecord, ...]
    params: int
    unmatched: tuple[Any, ...] = ()
    exclude: tuple[Any, ...] = ()

    @classmethod
    def of(cls, model: Any, exclude: Sequence[Any] = ()) -> Inventory:
        """Inspects a model.

        Args:
            model: A model with weights.
            exclude: Items that name layers to skip, with everything inside them.

        Raises:
            ValueError: If `model` is not a Keras model, or has no weights yet.
        """
        check_model(model)
        layers, pruning = scan(model)
        unmatched = dict(enumerate(exclude))
        inspected = [*_records(model, layers, pruning)]
        items = [_meant(item, model, inspected) for item in exclude]
        records = []
        for record in inspected:
            naming = [index for index, item in enumerate(items) if record.is_named_by(item)]
            for index in naming:
                unmatched.pop(index, None)
            if naming and record.skipped is None:
                detail = f"excluded by exclude={described(exclude[naming[0]])}"
                record = record.skip(Skip.EXCLUDED, detail)
            records.append(dataclasses.replace(record, excluded=bool(naming)))
        params = count_params(model, pruning)
        left = tuple(unmatched.values())
        return cls(model, layers, pruning, tuple(records), params, left, tuple(exclude))

    @property
    def backend(self) -> _backend.Backend:
        """The model's backend, Keras 3 or tf_keras."""
        return _backend.backend_of(self.model)

    @property
    def candidates(self) -> tuple[LayerRecord, ...]:
        """The records of the layers that can be factorized."""
        return tuple(record for record in self.records if record.skipped is None)

    @property
    def factorizable(self) -> tuple[LayerRecord, ...]:
        """The records of the layers that can be factorized, regardless of the user's options."""
        return tuple(record for record in self.records if record.factorizable)

    @property
    def factorized(self) -> list[LayerRecord]:
        """The records of the layers that are already factorized."""
        return [record for record in self.records if is_factorized(record.layer)]

    @functools.cached_property
    def calls(self) -> dict[Any, Calls]:
        """The shapes of every call in one forward pass of one example, by layer.

        Raises:
            ValueError: If the shapes of the model's inputs are unknown.
        """
        return {layer: calls for layer, (calls, _) in self._pass().items()}

    def without_assigned(self) -> Inventory:
        """The same inventory, with layers skipped to whose kernels code of the model assigns.

        Factors cannot be assigned to as one kernel. Models without code of a user's own, and those
        whose forward pass cannot be traced, stay as they are.
        """
        assigned: set[Any] = set()
        if any(map(has_own_code, _backend.layers_of(self.model))):
            with contextlib.suppress(Exception):  # the user's code
                assigned = {layer for layer, (_, found) in self._pass().items() if found}

        def checked(record: LayerRecord) -> LayerRecord:
            if record.skipped is not None or record.layer not in assigned:
                return record
            detail = f"the code of '{_own_holder(self.model, record.inside)}' assigns to its kernel"
            return record.skip(Skip.SHARED, detail)

        return self.map(checked)

    def _pass(self) -> dict[Any, tuple[Calls, bool]]:
        """The calls of each layer in a forward pass, and whether that assigns to its kernel."""
        layers = [record.layer for record in self.records]
        known = _PASSES.get(self.model, [])
        if [(ref(), cls) for ref, cls, *_ in known] != [(layer, type(layer)) for layer in layers]:
            shapes = running(self.model, values=False)
            with replaced_calls(shapes):
                calls, graph = self.backend.trace_shapes(self.model, layers)
            is_assigned = assigned_in(graph)
            able = {record.layer: record.kind for record in self.factorizable}
            known = [
                (
                    weakref.ref(layer),
                    type(layer),
                    calls[layer],
                    layer in able and is_assigned(able[layer].variable(layer)),
                )
                for layer in layers
            ]
            _PASSES[self.model] = known
        return {layer: found[2:] for layer, found in zip(layers, known, strict=True)}

    def map(self, change: Callable[[LayerRecord], LayerRecord]) -> Inventory:
        """The same inventory with changed records."""
        return dataclasses.replace(self, records=tuple(map(change, self.records)))

    def of_copy(self, copy: Any) -> Inventory:
        """The inventory of a copy of the model, with the same records for the copy's layers."""
        layers, pruning = scan(copy)
        ours = dict(self.backend.pairs_inside(self.model, copy))
        for layer, other in list(ours.items()):
            ours.update(zip(_kernels(layer).values(), _kernels(other).values(), strict=True))
        records = [dataclasses.replace(r, layer=ours[r.layer]) for r in self.records]
        return dataclasses.replace(
            self, model=copy, layers=layers, pruning=pruning, records=tuple(records)
        )

    def meant(self, item: Any) -> Any:
        """An item of `exclude` or `bounds`; the layer if it is an attribute path."""
        return _meant(item, self.model, self.records)

    def warn_of_unmatched(self, *, stacklevel: int) -> None:
        """Warns of items of `exclude` that match no layer."""
        for item in self.unmatched:
            warnings.warn(
                f"`exclude` entry {item!r} matches no layer with weights of the model "
                f"'{self.model.name}'{self.nearest(item) or '.'}",
                stacklevel=stacklevel + 1,
            )

    def nearest(self, item: Any) -> str:
        """The end of a message about an item of `exclude` or `bounds` that matches no layer."""
        named = [(r.path, r.layer) for r in self.records]
        named += [holder for record in self.records for holder in record.inside]
        names = [name for path, layer in named for name in (path, layer.name)]
        return did_you_mean(item, [*names, *self.backend.parts(self.model)])


# Cached forward passes, by layer: (the layer, its class, its calls, whether its kernel is assigned
# to). Tracing a large network takes a second.
_PASSES: weakref.WeakKeyDictionary[Any, list[tuple[weakref.ref[Any], type, Calls, bool]]] = (
    weakref.WeakKeyDictionary()
)


def check_is_model(model: Any) -> None:
    """Raises a ValueError unless `model` is a Keras model."""
    backend = _backend.backend_of(model)
    if not backend.is_model(model):
        raise ValueError(
            f"Expected `model` to be a `{backend.name}.Model`. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )


def check_model(model: Any) -> None:
    """Raises a ValueError unless `model` is a Keras model, or a layer of layers, with weights.

    A model with its own `train_step` need not be built or have a `call`.
    """
    if not _backend.backend_of(model).children(model):
        check_is_model(model)
    if not has_weights(model):
        raise ValueError(
            f"Expected the model '{model.name}' to be built. Received: a model without weights. "
            "Call it once on a batch."
        )


def has_weights(model: Any) -> bool:
    """Whether a model has all its weights.

    The model itself need not be built: one with a `train_step` and no `call` never is.
    """
    backend = _backend.backend_of(model)
    layers = [layer for layer in below(model) if not backend.children(layer)]
    ready = model.built or (layers and all(map(backend.has_its_weights, layers)))
    return bool(ready and model.weights)


def already_compressed(records: Sequence[LayerRecord]) -> ValueError:
    """The error for a model with factorized layers."""
    shown = ", ".join(record.path for record in records[:3]) + (", …" if len(records) > 3 else "")
    return ValueError(
        "Expected a model that is not compressed yet. Received: a model with "
        f"{counted(len(records), 'factorized layer')} ({shown}). Compress the original model with "
        "a larger `cr` instead. If these layers are part of its design, skip them with "
        "`exclude=[type(layer), …]`."
    )


def count_params(model: Any, pruning: Sequence[Any] | None = None) -> int:
    """Parameters of a model, without the masks that TF-MOT's `strip_pruning` removes.

    This also works for a model that was never called, unlike its own `count_params`.
    """
    wrapped = scan(model)[1] if pruning is None else pruning
    masks = {id(mask) for wrapper in wrapped for mask in wrappers.masks(wrapper)}
    counted = {id(w): math.prod(tuple(w.shape)) for w in _backend.backend_of(model).weights(model)}
    return sum(size for key, size in counted.items() if key not in masks)


def dense_params(model: Any, kept: Sequence[Any] = ()) -> int:
    """Parameters of a model with dense kernels in place of factors, except in the layers `kept`."""
    layers, pruning = scan(model)
    factorized = [layer for _, layer in layers if is_factorized(layer) and layer not in kept]
    more = sum(math.prod(layer.kernel_shape) - factor_weights(layer) for layer in factorized)
    return count_params(model, pruning) + more


def contains_factorized(layer: Any) -> bool:
    """Whether a layer is factorized or contains a factorized layer at any depth."""
    return any(is_factorized(inner) for inner in (layer, *below(layer)))


def factor_weights(layer: Any) -> int:
    """Weights of both factors of a factorized layer."""
    return sum(math.prod(tuple(factor.shape)) for factor in layer.factors)


def walk(model: Any) -> tuple[tuple[str, Any], ...]:
    """Every layer below `model` once with its path, depth first.

    TF-MOT's pruning wrappers are left out.
    """
    return scan(model)[0]


def scan(model: Any) -> tuple[tuple[tuple[str, Any], ...], tuple[Any, ...]]:
    """The result of `walk`, and the built pruning wrappers."""
    backend = _backend.backend_of(model)
    seen, paths = {model}, set()
    layers: list[tuple[str, Any]] = []
    pruning: list[Any] = []

    def visit(parent: Any, prefix: str) -> None:
        for layer in backend.children(parent):
            if layer in seen:
                continue
            seen.add(layer)
            if wrappers.is_pruning(layer):
                pruning.append(layer)
                visit(layer, prefix)
                continue
            path = prefix + layer.name
            names = itertools.chain([path], (f"{path}#{count}" for count in itertools.count(2)))
            unique = next(name for name in names if name not in paths)
            paths.add(unique)
            layers.append((unique, layer))
            visit(layer, unique + "/")

    visit(model, "")
    return tuple(layers), tuple(wrapper for wrapper in pruning if wrapper.built)


def outermost_holders(inventory: Inventory) -> list[tuple[str, Any]]:
    """The outermost models or layers of a user's own classes that save what is factorized in them.

    Each comes with its path, the model itself with its name.
    """
    found: list[tuple[str, Any]] = []
    for path, layer in ((inventory.model.name, inventory.model), *inventory.layers):
        within = any(path.startswith(f"{outer}/") for outer, _ in found)
        if isinstance(layer, WithFactorizedLayers) and not within:
            found.append((path, layer))
            if layer is inventory.model:
                break
    return found


def _meant(item: Any, model: Any, records: Sequence[LayerRecord]) -> Any:
    """An item that names layers; the layer if it is an attribute path, and no name or pattern."""
    if not isinstance(item, str) or any(record.is_named_by(item) for record in records):
        return item
    backend = _backend.backend_of(model)
    found = backend.at(model, item)
    return found if isinstance(found, backend.keras.layers.Layer) else item


def _kernels(layer: Any) -> dict[str, Any]:
    """Kernels of a layer that are treated as layers."""
    return stock_kind(layer).kernels(layer)


def _records(
    model: Any, layers: Sequence[tuple[str, Any]], pruning: Sequence[Any]
) -> Iterator[LayerRecord]:
    """A record of every layer with weights, regardless of `exclude`."""
    backend = _backend.backend_of(model)
    at = dict(layers)
    users = _users_of_weights(model, layers)
    for path, layer, own, apart in _holders_of_weights(backend, layers):
        above = itertools.accumulate(path.split("/")[:-1], "{}/{}".format)
        inside = tuple((name, at[name]) for name in above if name in at)
        kind = kind_of(layer)
        owner = at[path.rpartition("/")[0]] if apart else layer
        shape = None
        if kind is not None and kind.refusal(layer) is None:
            shape = unfolded_shape(layer)
        around = [holder for _, holder in reversed(inside)]
        skipped = _skipped(layer, around)
        if skipped is None and apart and any(wrapper.layer in around for wrapper in pruning):
            detail = "TF-MOT prunes its cell; `strip_pruning` first, or compress before pruning"
            skipped = Skipped(Skip.WRAPPED, detail)
        # Of a cell, all kernels or none: a factorized cell keeps those that stay dense as weights.
        parts = _kernels(owner).values() if apart else [layer]
        if skipped is None and any(id(known_kind(x).variable(x)) not in users for x in parts):
            by = _own_holder(model, inside)
            detail = f"the code of '{by}' puts a tensor in the place of a kernel"
            skipped = Skipped(Skip.SHARED, detail)
        if skipped is None and kind is not None:
            found = users[id(kind.variable(layer))]
            others = [name for name, user in found if user is not owner and user is not layer]
            if others:
                skipped = Skipped(Skip.SHARED, f"its kernel is shared with '{others[0]}'")
        params = sum(math.prod(tuple(variable.shape)) for variable in own)
        able = skipped is None
        yield LayerRecord(path, layer, int(params), shape, skipped, able, inside=inside)


def _own_holder(model: Any, inside: Sequence[tuple[str, Any]]) -> str:
    """The path of the innermost layer around another one that is custom code, or the model."""
    return next((path for path, holder in reversed(inside) if has_own_code(holder)), model.name)


def _users_of_weights(
    model: Any, layers: Sequence[tuple[str, Any]]
) -> dict[int, list[tuple[str, Any]]]:
    """The paths and layers that use each weight, by the weight's `id`.

    A layer uses its own weights, and those of other layers that it keeps in an attribute. So does
    the model. `SpectralNormalization`, for example, changes the kernel of the layer in it.
    """
    backend = _backend.backend_of(model)
    users: dict[int, list[tuple[str, Any]]] = {}
    for path, layer in layers:
        for variable in backend.own_variables(layer):
            users.setdefault(id(variable), []).append((path, layer))
    for path, user in (*layers, (model.name, model)):
        for value in list(vars(user).values()):  # copies: other threads may use the model
            if isinstance(value, dict):
                held = list(value.values())
            else:
                held = list(value) if isinstance(value, (list, tuple)) else [value]
            for item in held:
                if id(item) in users:
                    users[id(item)].append((path, user))
    return users


def _skipped(layer: Any, around: Sequence[Any]) -> Skipped | None:
    """Why a layer cannot be factorized where it is, or None."""
    for holder in (layer, *around):
        if (refusal := wrappers.refusal(holder)) is not None:
            return Skipped(Skip.WRAPPED, refusal)
    for holder in around:
        obstacle = stock_kind(holder).obstacle(holder, layer, around)
        if obstacle is not None:
            return Skipped(Skip.HOLDER, obstacle)
    return skipped_by_kind(layer)


def _holders_of_weights(
    backend: _backend.Backend, layers: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Any, list[Any], bool]]:
    """The layers with weights: path, layer, weights, and whether it is a kernel of another layer.

    Some layers, such as recurrent cells, have kernels that count as separate layers.
    """
    seen = set()
    for path, layer in layers:
        if layer in seen:
            continue
        kernels = _kernels(layer)
        apart = {id(v) for kernel in kernels.values() for v in backend.own_variables(kernel)}
        own = [v for v in backend.own_variables(layer) if id(v) not in apart]
        if own:
            yield path, layer, own, False
        for name, kernel in kernels.items():
            seen.add(kernel)
            yield f"{path}/{name}", kernel, backend.own_variables(kernel), True

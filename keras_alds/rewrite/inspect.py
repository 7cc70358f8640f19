"""A model as a list of `LayerSpec`: what could be factorized, and why the rest cannot."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from keras_alds import _backend
from keras_alds.core.slicing import divisors, weights
from keras_alds.rewrite import recurrent, wrappers
from keras_alds.rewrite.functions import run_as_code
from keras_alds.rewrite.kinds import (
    KINDS,
    REASONS,
    Kind,
    attention_class,
    factorized_kind,
    kind_of,
    known_kind,
    projections,
    unfolded_shape,
)
from keras_alds.rewrite.kinds import kernel_values as kernel_values
from keras_alds.rewrite.kinds import observable as observable

Exclude = Sequence[Any]

#: Stock layer classes that have a factorized form, `Factorized` + the name.
FACTORIZED_KINDS = tuple(KINDS)
_CONVOLUTIONS = tuple(f"Conv{n}D{t}" for n in (1, 2, 3) for t in ("", "Transpose"))


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer that holds weights.

    Attributes:
        path: Names from the model to the layer, joined by `/`; unique in the model.
        layer: The layer itself.
        params: Number of parameters that the layer holds itself.
        kernel_shape: The shape `(*spatial, channels, filters)` that its kernel is read as, if its
            class has a factorized form.
        reason: Why it cannot be factorized, or None if it can.
        excluded: Whether the user's `exclude` names it.
        bounds: The least and the greatest fraction of its parameters that may go.
        inside: The layers and models that hold it, with their paths.
        schemes: The fold schemes that its kernel may be unfolded in.
    """

    path: str
    layer: Any
    params: int
    kernel_shape: tuple[int, ...] | None
    reason: str | None
    excluded: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    inside: tuple[tuple[str, Any], ...] = ()
    schemes: tuple[int, ...] = (0,)

    @property
    def kind(self) -> str:
        """The layer's class name."""
        return type(self.layer).__name__

    @property
    def known_kind(self) -> Kind:
        """What its class is as a stock layer that can be factorized."""
        return known_kind(self.layer)

    def is_named_by(self, item: Any) -> bool:
        """Whether an entry of `exclude` or `bounds` names the layer, or one that holds it."""
        return any(
            _matches(item, path, layer) for path, layer in ((self.path, self.layer), *self.inside)
        )

    def shape_in(self, scheme: int) -> tuple[int, ...]:
        """The shape `(*spatial, c, f)` that its kernel is read as in a fold scheme."""
        return (self.kernel_shape or ()) if not scheme else unfolded_shape(self.layer, scheme)

    def folded(self, schemes: Iterable[int]) -> LayerSpec:
        """The same spec with those of some fold schemes that it has; left alone without any.

        Args:
            schemes: Fold schemes; those that are the same for its kernel count once.
        """
        if self.reason is not None:
            return self
        known = self.known_kind.schemes(self.layer)
        asked = tuple(schemes)
        found = tuple(sorted({known[scheme] for scheme in asked if scheme in known}))
        if not found:
            reason = f"its kernel {self.kernel_shape} cannot be unfolded in schemes={asked}"
        elif not _can_shrink(self.layer, found):
            reason = f"no factorization of its kernel {self.kernel_shape} is smaller"
        else:
            return dataclasses.replace(self, schemes=found)
        return dataclasses.replace(self, reason=reason)


def schemes(layer: Any) -> set[int]:
    """The fold schemes of a layer's kernel that differ; none of a layer without a form."""
    kind = kind_of(layer)
    return set() if kind is None else set(kind.schemes(layer).values())


def _can_shrink(layer: Any, schemes: Iterable[int]) -> bool:
    """Whether a layer has a factorization that is smaller, in some fold schemes."""
    most = known_kind(layer).max_slices
    for scheme in schemes:
        shape = unfolded_shape(layer, scheme)
        slices = [k for k in divisors(shape[-2]) if most is None or k <= most]
        if any(weights(shape, k, 1) < math.prod(shape) for k in slices):
            return True
    return False


def inspect_model(model: Any, exclude: Exclude = ()) -> tuple[list[LayerSpec], list[Any]]:
    """Every layer of `model` that holds weights, at any depth, in creation order.

    A layer that is used in several places is listed once, under its first path.

    Args:
        model: A built model.
        exclude: Layers to leave alone, with all that they hold: names or paths, regular
            expressions that match one as a whole, compiled patterns, or layer classes.

    Returns:
        The specs, and the entries of `exclude` that matched nothing.
    """
    backend = _backend.backend_of(model)
    unmatched = {index: item for index, item in enumerate(exclude)}
    specs = []
    layers = list(walk(model))
    holders: dict[int, list[str]] = {}
    owners = {id(dense): owner for _, owner in layers for dense in projections(owner).values()}
    refused: dict[int, Any] = {}
    for _, layer in layers:
        if wrappers.is_refused(layer):
            refused |= {id(layer): layer, id(layer.layer): layer}
    for path, layer in layers:
        for variable in backend.own_variables(layer):
            holders.setdefault(id(variable), []).append(path)
    at = dict(layers)
    pruned = {id(wrapper.layer) for wrapper in wrappers.pruning(model)}
    for path, layer, own in _holders_of_weights(backend, layers):
        above = itertools.accumulate(path.split("/")[:-1], "{}/{}".format)
        inside = tuple((name, at[name]) for name in above if name in at)
        within = [layer, *(holder for _, holder in inside)]
        wrapper = next((refused[id(item)] for item in within[::-1] if id(item) in refused), None)
        reason = _reason(backend, layer) if wrapper is None else wrappers.reason(wrapper)
        owner = owners.get(id(layer))
        if reason is None and owner is not None and attention_class(owner) is None:
            reason = f"{type(owner).__name__} makes it in code of its own, as it is, when loaded"
        held = [path]
        if isinstance(layer, recurrent.CellKernel):
            held = [name for name, holder in inside if holder is layer.cell]
            reason = reason or recurrent.obstacle(layer, within[1:])
            if reason is None and any(id(item) in pruned for item in within):
                reason = "TF-MOT prunes its cell; `strip_pruning` first, or compress before pruning"
        kind = kind_of(layer)
        if reason is None and kind is not None:
            others = [name for name in holders[id(kind.variable(layer))] if name not in held]
            if others:
                reason = f"its kernel is held by '{others[0]}' too"
        shape = None
        if kind is not None and kind.refusal(layer) is None:
            shape = unfolded_shape(layer)
        params = sum(math.prod(tuple(variable.shape)) for variable in own)
        spec = LayerSpec(path, layer, int(params), shape, reason, inside=inside)
        matching = [index for index, item in enumerate(exclude) if spec.is_named_by(item)]
        for index in matching:
            unmatched.pop(index, None)
        if matching and reason is None:
            reason = f"excluded by {_describe(exclude[matching[0]])}"
        specs.append(dataclasses.replace(spec, reason=reason, excluded=bool(matching)))
    return specs, list(unmatched.values())


def _holders_of_weights(
    backend: _backend.Backend, layers: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Any, list[Any]]]:
    """The layers that hold weights, with their paths and those weights; kernels of cells apart."""
    seen: set[int] = set()
    for path, layer in layers:
        if id(layer) in seen:
            continue
        kernels = recurrent.all_kernels(layer)
        apart = {id(v) for kernel in kernels.values() for v in backend.own_variables(kernel)}
        own = [v for v in backend.own_variables(layer) if id(v) not in apart]
        if own:
            yield path, layer, own
        for name, kernel in kernels.items():
            seen.add(id(kernel))
            yield f"{path}/{name}", kernel, backend.own_variables(kernel)


def walk(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields `(path, layer)` for every layer below `model` once, depth first.

    TF-MOT's pruning wrappers are passed over: the layers inside them have the paths that they have
    without them.
    """
    backend = _backend.backend_of(model)
    seen: set[int] = {id(model)}
    paths: set[str] = set()

    def visit(parent: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for layer in backend.children(parent):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            if wrappers.is_pruning(layer):
                yield from visit(layer, prefix)
                continue
            path = unique = prefix + layer.name
            count = 1
            while unique in paths:
                count += 1
                unique = f"{path}#{count}"
            paths.add(unique)
            yield unique, layer
            yield from visit(layer, unique + "/")

    yield from visit(model, "")


def made_by_code(model: Any, specs: Iterable[LayerSpec]) -> list[Any]:
    """The outermost holders of some layers of `model` that make them in code when loaded."""
    backend = _backend.backend_of(model)
    chains = [[model, *(holder for _, holder in spec.inside), spec.layer] for spec in specs]
    held: dict[int, tuple[Any, dict[int, Any]]] = {}
    for chain in chains:
        for holder, layer in itertools.pairwise(chain):
            held.setdefault(id(holder), (holder, {}))[1][id(layer)] = layer
    by_code = {
        key for key, (holder, layers) in held.items() if not backend.saves(holder, layers.values())
    }
    found = [next((item for item in chain if id(item) in by_code), None) for chain in chains]
    return list({id(item): item for item in found if item is not None}.values())


def is_factorized(layer: Any) -> bool:
    """Whether `layer` is one of this package's factorized layers, of either Keras."""
    return hasattr(layer, "encoder_form")


def contains_factorized(layer: Any) -> bool:
    """Whether `layer` is factorized or holds a factorized layer at any depth."""
    return is_factorized(layer) or any(is_factorized(inner) for _, inner in walk(layer))


def _own_code(backend: _backend.Backend, layer: Any, kind: Kind) -> list[str]:
    """What a user's subclass of a stock layer adds, that a factorized layer would not have."""
    stock = getattr(backend.keras.layers, kind.name, type(layer))
    if type(layer) is stock:
        return []
    classes = type(layer).__mro__[: type(layer).__mro__.index(stock)]
    harmless = {"get_config", "from_config"}
    methods = {
        name
        for cls in classes
        for name in vars(cls)
        if not name.startswith("_") and name not in harmless
    }
    plain = stock(*kind.sample)
    attributes = {name for name in vars(layer) if not name.startswith("_")}
    built = {"built", "full_output_shape", kind.kernel, "bias", *kind.kept}
    return sorted(methods | (attributes - set(vars(plain)) - built))


def _reason(backend: _backend.Backend, layer: Any) -> str | None:
    """Why `layer` cannot be factorized, or None."""
    kind = type(layer).__name__
    if is_factorized(layer):
        return "already factorized"
    if recurrent.is_cell(layer):
        return "its kernels have lines of their own"
    stock = kind_of(layer)
    if stock is None:
        if all(len(variable.shape) <= 1 for variable in backend.own_variables(layer)):
            return f"{kind} has no kernel to factorize"
        # Not all stock cells are public.
        if kind in REASONS and type(layer) is getattr(backend.keras.layers, kind, type(layer)):
            return REASONS[kind]
        for known in FACTORIZED_KINDS:
            if isinstance(layer, getattr(backend.keras.layers, known)):
                return f"{kind} changes the forward pass of {known}"
        return f"{kind} has no factorized form"
    own = _own_code(backend, layer, stock)
    if own:
        return f"{kind} adds {', '.join(own[:3])} to {stock.name}, which would be lost"
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled on it; merge the adapter first"
    if getattr(layer, "quantization_mode", None):
        return f"it is quantized ({layer.quantization_mode})"
    refusal = stock.refusal(layer)
    if refusal is not None:
        return refusal
    constraint = stock.setting(layer, "constraint")
    if constraint is not None:
        name = f"{stock.part}_constraint"
        return (
            f"its {name} {type(constraint).__name__} cannot be kept by two factors; set "
            f"`layer.{name} = None` to have it factorized"
        )
    if not _can_shrink(layer, set(stock.schemes(layer).values())):
        return f"no factorization of its kernel {unfolded_shape(layer)} is smaller"
    return None


def warn_of_unmatched(model: Any, unmatched: list[Any], *, stacklevel: int) -> None:
    """Warns of the entries of `exclude` that matched nothing; see `inspect_model`."""
    for item in unmatched:
        warnings.warn(
            f"`exclude` entry {item!r} matches no layer with weights of the model '{model.name}'.",
            stacklevel=stacklevel,
        )


def _matches(item: Any, path: str, layer: Any) -> bool:
    """Whether an entry of `exclude` or `bounds` names a layer."""
    if isinstance(item, type):
        return isinstance(layer, item)
    if isinstance(item, re.Pattern):
        return any(item.search(name) for name in (path, layer.name))
    return item in (path, layer.name) or any(
        re.fullmatch(item, name) for name in (path, layer.name)
    )


def _describe(item: Any) -> str:
    if isinstance(item, type):
        return f"exclude={item.__name__}"
    return f"exclude={item.pattern if isinstance(item, re.Pattern) else item!r}"


def check_exclude(exclude: Any, name: str = "exclude") -> Exclude:
    """Returns `exclude` as a list, or raises a ValueError that says what it may be."""
    items = (
        [exclude]
        if isinstance(exclude, (str, re.Pattern, type)) or not isinstance(exclude, Iterable)
        else list(exclude)
    )
    for item in items:
        if isinstance(item, str):
            try:
                re.compile(item)
            except re.error as error:
                raise ValueError(
                    f"Expected a string in `{name}` to be a layer's name or a regular expression. "
                    f"Received: {item!r} ({error})"
                ) from error
        elif not isinstance(item, (re.Pattern, type)):
            raise ValueError(
                f"Expected `{name}` to hold layer names, regular expressions or layer classes. "
                f"Received: {item!r} of type {type(item).__name__}"
            )
    return items


# -- Multiply–accumulates ------------------------------------------------------------------------


#: The shapes of the inputs and the outputs of every call of a layer.
Calls = list[tuple[tuple[int, ...], tuple[int, ...]]]

# The layers that were counted in a model, as (layer, its class, its calls); the trace takes a
# second for a large network.
_CALLS: weakref.WeakKeyDictionary[Any, list[tuple[weakref.ref[Any], type, Calls]]] = (
    weakref.WeakKeyDictionary()
)


def layer_macs(model: Any) -> dict[int, int]:
    """Multiply–accumulates of every layer in one forward pass of one example.

    Counted are convolutions of every kind, Dense and EinsumDense layers, the kernels of LSTM, GRU
    and SimpleRNN layers, once for every time step, and their factorized forms; all other layers
    count as zero. A shared layer counts once for every call.

    Args:
        model: A built model whose input shape is known.

    Returns:
        `{id(layer): macs}` for every layer that holds weights.

    Raises:
        ValueError: If an input or feature map has an unknown size.
    """
    return {
        id(layer): sum(_macs_of_call(layer, *shapes) for shapes in calls)
        for layer, calls in _calls(model)
    }


def encoder_positions(model: Any) -> dict[int, dict[int, int]]:
    """How often the encoder of every fold scheme would be applied in one forward pass.

    Args:
        model: A built model whose input shape is known.

    Returns:
        `{id(layer): {scheme: positions}}` for every layer that has several schemes.

    Raises:
        ValueError: If an input or feature map has an unknown size.
    """
    found = {}
    for layer, calls in _calls(model):
        kind = None if is_factorized(layer) else kind_of(layer)
        if kind is not None and kind.refusal(layer) is None:
            found[id(layer)] = {
                scheme: sum(
                    _size(layer, kind.encoder_positions(layer, scheme, *shapes)) for shapes in calls
                )
                for scheme in set(kind.schemes(layer).values())
                if scheme
            }
    return found


def _calls(model: Any) -> list[tuple[Any, Calls]]:
    """The layers of `model` that hold weights, with the shapes of their calls."""
    backend = _backend.backend_of(model)
    layers = [layer for _, layer, _ in _holders_of_weights(backend, walk(model))]
    known = _CALLS.get(model, [])
    if [(ref(), kind) for ref, kind, _ in known] != [(layer, type(layer)) for layer in layers]:
        with run_as_code(model), recurrent.calling_kernels(model, layers, values=False):
            traced = backend.trace_shapes(model, layers)
        known = [(weakref.ref(layer), type(layer), list(traced[layer])) for layer in layers]
        _CALLS[model] = known
    return [(layer, calls) for layer, (_, _, calls) in zip(layers, known, strict=True)]


def count_macs(model: Any) -> int:
    """Multiply–accumulates of one forward pass of `model` on one example; see `layer_macs`.

    Args:
        model: A built Keras 3 or tf_keras model whose input shape is known.

    Returns:
        The number of multiply–accumulates (half the number of floating-point operations).

    Raises:
        ValueError: If `model` is not a model, or its input shape has unknown dimensions.

    Example:
    >>> import keras
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    >>> count_macs(model)  # 6·6 positions × 3·3·3 × 4
    3888
    """
    return sum(layer_macs(model).values())


def positions(layer: Any, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    """How often one call applies the layer's kernel: MACs = positions × kernel weights."""
    kind = factorized_kind(layer) if is_factorized(layer) else kind_of(layer)
    if kind is not None:
        return _size(layer, kind.positions(layer, inputs, outputs))
    shape = inputs if "Transpose" in type(layer).__name__ else outputs
    if getattr(layer, "data_format", None) == "channels_first":
        return _size(layer, (shape[0], *shape[2:]))
    return _size(layer, shape[:-1])


def without_macs(spec: LayerSpec) -> str:
    """Why a layer that could be factorized has no multiply–accumulates."""
    if spec.known_kind.lookup:
        return "it looks rows of a table up, which takes no multiply–accumulates"
    return "the forward pass does not call it"


def applied_weights(layer: Any) -> int:
    """Weights that a layer that can be factorized multiplies by at every position of a call."""
    return known_kind(layer).applied(layer)


def _size(layer: Any, shape: tuple[int | None, ...]) -> int:
    if None in shape:
        raise ValueError(
            "Expected a known input size, to count multiply–accumulates. Received: layer "
            f"'{layer.name}' works on the shape {shape}. Make the model anew on inputs of a fixed "
            'shape (`Input(shape)` without None) and set its weights, or use objective="params".'
        )
    return math.prod(int(n or 0) for n in shape)


def _macs_of_call(layer: Any, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    kind = type(layer).__name__
    if is_factorized(layer):
        factorized = factorized_kind(layer)
        applied, scheme = factorized.applied_factors(layer), getattr(layer, "scheme", 0)
        everywhere = positions(layer, inputs, outputs)
        if not scheme:
            return everywhere * applied
        first = _size(layer, factorized.encoder_positions(layer, scheme, inputs, outputs))
        encoder = math.prod(layer.encoder.shape)
        return everywhere * (applied - encoder) + first * encoder
    if hasattr(layer, "depthwise_kernel") and hasattr(layer, "pointwise_kernel"):
        return positions(layer, inputs, outputs) * (
            math.prod(layer.depthwise_kernel.shape) + math.prod(layer.pointwise_kernel.shape)
        )
    if "Depthwise" in kind:
        kernel = getattr(layer, "depthwise_kernel", None)
        kernel = layer.kernel if kernel is None else kernel
        return positions(layer, inputs, outputs) * math.prod(kernel.shape)
    if hasattr(layer, "equation") and hasattr(layer, "kernel"):
        terms, result = re.sub(r"\s", "", layer.equation).replace("...", "").split("->")
        contracted = set(terms.split(",")[1]) - set(result)
        sizes = dict(zip(terms.split(",")[1], layer.kernel.shape, strict=True))
        return _size(layer, outputs) * math.prod(int(sizes[axis]) for axis in contracted)
    stock = _backend.backend_of(layer).keras.layers
    dense = (getattr(stock, name) for name in (*_CONVOLUTIONS, "Dense"))
    counted: Any = (*dense, recurrent.CellKernel)
    if isinstance(layer, counted):
        return positions(layer, inputs, outputs) * math.prod(layer.kernel.shape)
    return 0


def dense_params(model: Any) -> int:
    """Parameters of `model` with every factorized kernel multiplied out."""
    layers = [layer for _, layer in walk(model) if is_factorized(layer)]
    more = sum(math.prod(layer.kernel_shape) - kernel_weights(layer) for layer in layers)
    return count_params(model) + more


def count_params(model: Any) -> int:
    """Parameters of `model`, without the masks that `strip_pruning` takes away.

    The weights are counted, each once: a model that was never called cannot be asked.
    """
    masks = [mask for wrapper in wrappers.pruning(model) for mask in wrappers.masks(wrapper)]
    counted = {id(weight): math.prod(tuple(weight.shape)) for weight in model.weights}
    return sum(counted.values()) - sum(math.prod(tuple(mask.shape)) for mask in masks)


def has_weights(model: Any) -> bool:
    """Whether the weights of `model` are made: it has some, and so has every layer that will.

    A model of built layers need not be built: one with a `train_step` and no `call` never is.
    """
    backend = _backend.backend_of(model)
    layers = [layer for _, layer in walk(model) if not backend.children(layer)]
    ready = model.built or (layers and all(map(backend.has_its_weights, layers)))
    return bool(ready and model.weights)


def kernel_weights(layer: Any) -> int:
    """Weights of both factors of a factorized layer."""
    return math.prod(layer.encoder.shape) + math.prod(layer.decoder.shape)

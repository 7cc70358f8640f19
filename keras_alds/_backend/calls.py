"""Other `call`s of layers, for one thread and for a limited time.

Calls of layers are watched, or computed in another way, while a model runs. Only the thread inside
`replaced_calls` sees that. For every other thread, the layers stay what they are: what it computes
is right and is not recorded, and the graphs that it traces meanwhile are those of the layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

#: Computes a layer's call: `replacement(call, *args, **kwargs)`, where `call` is what it replaces.
Replacement = Callable[..., Any]


class _Thread(threading.local):
    """What replaces the calls of layers in this thread, the innermost replacement first."""

    def __init__(self) -> None:
        self.stacks: dict[Any, tuple[Replacement, ...]] = {}


class _Hook:
    """The attribute `call` of a layer while any thread replaces it.

    Attributes:
        own: The user's attribute `call` of the layer, if there is one.
        users: What each of the contexts that need the hook is known by.
    """

    def __init__(self, layer: Any) -> None:
        self.own = layer.__dict__.get("call")
        self.users: set[object] = set()

    def attribute(self, layer: Any) -> types.MethodType:
        own = self.own

        # A bound method: a copy of the layer, deep copies included, computes with its own weights.
        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            run = functools.partial(type(layer).call, layer) if own is None else own
            for replacement in _thread.stacks.get(layer, ()):
                run = functools.partial(replacement, run)
            return run(*args, **kwargs)

        signature = inspect.signature(layer.call)
        itself = inspect.Parameter("layer", inspect.Parameter.POSITIONAL_ONLY)
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[itself, *signature.parameters.values()]
        )
        return types.MethodType(call, layer)


_thread = _Thread()
_lock = threading.Lock()
_hooks: dict[Any, _Hook] = {}


@contextlib.contextmanager
def replaced_calls(*replacements: Mapping[Any, Replacement]) -> Iterator[None]:
    """Replaces the calls of layers inside the context, in this thread.

    Args:
        *replacements: Replacements by layer; later ones are around earlier ones. Contexts nest in
            the same way.
    """
    before = _thread.stacks
    stacks = dict(before)
    for some in replacements:
        for layer, replacement in some.items():
            stacks[layer] = (*stacks.get(layer, ()), replacement)
    user = object()
    try:
        with _lock:
            for layer in stacks:
                if layer not in _hooks:
                    _hooks[layer] = _Hook(layer)
                    layer.__dict__["call"] = _hooks[layer].attribute(layer)
                _hooks[layer].users.add(user)
        _thread.stacks = stacks
        yield
    finally:
        _thread.stacks = before
        with _lock:
            for layer in stacks:
                _remove(layer, user)


def _remove(layer: Any, user: object) -> None:
    hook = _hooks.get(layer)
    if hook is None:
        return  # interrupted before it was there
    hook.users.discard(user)
    if not hook.users:
        layer.__dict__.pop("call", None)
        if hook.own is not None:
            layer.__dict__["call"] = hook.own
        del _hooks[layer]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A replacement that calls another layer instead. Two for the same layer are equal."""

    layer: Any

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Not by its attribute, which may be the hook of the layer that it was made from.
        return type(self.layer).call(self.layer, *args, **kwargs)


def replacements_of(layers: Iterable[Any]) -> tuple[tuple[Replacement, ...], ...]:
    """What replaces the calls of some layers in this thread."""
    return tuple(_thread.stacks.get(layer, ()) for layer in layers)


def watched(layers: Iterable[Any], watch: Callable[[Any, Any, Any], Any]) -> dict[Any, Replacement]:
    """Replacements that watch calls.

    Args:
        layers: The layers, at any depth of a model.
        watch: `watch(layer, inputs, outputs)` is called after every call with its first argument
            and its result, and returns the result to pass on.
    """

    def watching(layer: Any) -> Replacement:
        def inner(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            return watch(layer, args[0] if args else next(iter(kwargs.values())), outputs)

        return inner

    return {layer: watching(layer) for layer in layers}

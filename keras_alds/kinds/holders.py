"""Layers and models of the user's own that hold factorized layers, and save them in their config.

The code of such a holder makes its stock layers again when a saved model is loaded. So the holder
gets a subclass of its own class, whose config also has the configs of the factorized layers, and
whose `from_config` puts them where the code has made the stock ones. The weights in the file then
fit, and `load_model`, `clone_model`, `copy` and `pickle` work as for the original class.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import keras

from keras_alds import _backend
from keras_alds.kinds.base import below, is_own, stock_kind

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

Undo = Callable[[], None]

#: What the config of a holder has beside the arguments of its class.
KEY = "keras_alds"
#: The package and the name under which all holders are registered.
REGISTERED = ("keras_alds", "WithFactorizedLayers")


class WithFactorizedLayers(_Base):
    """What the class of every holder inherits from, before the user's own class.

    It makes any holder from its config. The config names the user's class, which has to be
    registered or in `custom_objects`, as for a model that is not compressed.
    """

    _keras: ClassVar[Any] = keras
    _own: ClassVar[Any] = None  # the user's class

    def get_config(self) -> dict[str, Any]:
        """Return the config of the user's class and those of the factorized layers."""
        own, saving = self._own, self._keras.saving
        carried = {
            "module": own.__module__,
            "class_name": own.__name__,
            "registered_name": saving.get_registered_name(own),
            "build_config": self.get_build_config(),
            "layers": {
                path: saving.serialize_keras_object(layer)
                for path, layer in layers_in(self)
                if is_own(layer)
            },
        }
        return {**own.get_config(self), KEY: carried}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make the user's layer or model, with the factorized layers in their places.

        Raises:
            ValueError: If the user's class is unknown, or does not make a layer in the place of
                every factorized one.
        """
        if KEY not in config:  # a user's code calls it with arguments of its own class
            return cls._own.from_config(config)
        carried = config[KEY]
        arguments = {key: value for key, value in config.items() if key != KEY}
        named = {key: carried[key] for key in ("module", "class_name", "registered_name")}
        with cls._keras.saving.custom_object_scope(custom_objects or {}):
            try:
                made = cls._keras.saving.deserialize_keras_object({**named, "config": arguments})
            except TypeError as error:  # Keras would print the whole config
                reason = str(error).partition("config")[0].strip()
                raise ValueError(
                    f"Expected the class '{carried['class_name']}' of module {carried['module']} "
                    "to be known and to take its own config, to load a layer that holds "
                    f"factorized ones. Received: {reason[:300]} … Import the module that registers "
                    "it, or pass `custom_objects`."
                ) from error
            lost = _put(made, carried["layers"])
            if lost and carried["build_config"] and not made.built:  # `build` makes them
                made.build_from_config(carried["build_config"])
                lost = _put(made, {path: carried["layers"][path] for path in lost})
        if lost:
            raise ValueError(
                f"Expected {carried['class_name']} to make layers in `__init__` or `build`, which "
                f"become the factorized ones. Received: no such layers as {', '.join(lost[:3])}. "
                "Create the model in code, build it, call `apply_plan` with the saved plan, then "
                "`load_weights`."
            )
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # `pickle` finds the user's class by its name, but not one that is made here.
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or getattr(reduced[0], "__self__", None) is not type(self):
            return reduced
        return getattr(self._own, reduced[0].__name__), *reduced[1:]


keras.saving.register_keras_serializable(*REGISTERED)(WithFactorizedLayers)

#: What the classes of holders inherit from, by the name of their Keras.
BASES: dict[str, type] = {keras.__name__: WithFactorizedLayers}


def adopt(layer: Any) -> Undo | None:
    """Lets a layer or model of a user's own class save the factorized layers in it.

    Returns:
        A function that undoes this, or None if there is nothing to do: nothing in it is
        factorized, or its config has it all.
    """
    if isinstance(layer, WithFactorizedLayers):
        return None
    backend = _backend.backend_of(layer)
    changed = [
        child
        for child in backend.children(layer)
        if any(is_own(inner) for inner in (child, *below(child)))
    ]
    if not changed or backend.saves(layer, changed):
        return None
    return backend.reclass(layer, _class_of_holder(type(layer), BASES[backend.name]))


def does_not_load(holder: Any) -> str | None:
    """Why a holder cannot be made again from its config, with the factorized layers; or None."""
    inside = [layer for layer in (holder, *below(holder)) if isinstance(layer, WithFactorizedLayers)]
    classes = {layer._own.__name__: layer._own for layer in inside}
    backend = _backend.backend_of(holder)
    with backend.keras.saving.custom_object_scope(classes):
        return backend.trial(lambda: holder.from_config(holder.get_config()))


def layers_in(holder: Any) -> Iterator[tuple[str, Any]]:
    """The layers at any depth of a holder, each once, with the attributes that lead to it.

    Layers of this package are not entered: their configs have what is inside them.
    """
    seen = {id(holder): holder}  # kept, so that no other object gets the same id

    def visit(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, dict):
            parts = [(str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            parts = [(str(index), item) for index, item in enumerate(value)]
        elif isinstance(value, backend.keras.layers.Layer):
            yield path, value
            parts = [] if is_own(value) else backend.attributes(value)
        else:
            return
        for name, item in parts:
            yield from visit(f"{path}/{name}", item)

    backend = _backend.backend_of(holder)
    for name, value in backend.attributes(holder):
        yield from visit(name, value)


def _put(made: Any, configs: dict[str, Any]) -> list[str]:
    """Puts factorized layers in their places in a layer; returns the paths where there is none."""
    backend = _backend.backend_of(made)
    there = dict(layers_in(made))
    lost = []
    for path, config in configs.items():
        old = there.get(path)
        if old is not None and is_own(old):
            continue  # a holder inside has loaded it
        build_config = config.get("build_config")
        unbuilt = {key: value for key, value in config.items() if key != "build_config"}
        new = backend.keras.saving.deserialize_keras_object(unbuilt)
        if old is None or stock_kind(old) is not stock_kind(new):
            lost.append(path)
            continue
        if old.built and build_config:
            with backend.name_scope(old):
                new.build_from_config(build_config)
        backend.transplant(old, new)
    for layer in reversed(list(dict.fromkeys(below(made)))):
        stock_kind(layer).adopt(backend, layer)
        adopt(layer)
    adopt(made)
    return lost


@functools.cache
def _class_of_holder(own: type, base: Any) -> type:
    """The class of holders of a user's class."""
    # Keras asks whether `get_config` is its own.
    get_config = functools.wraps(own.get_config)(lambda self: base.get_config(self))
    namespace = {
        "_own": own,
        "get_config": get_config,
        "__doc__": own.__doc__,
        "__module__": base.__module__,
        "__qualname__": own.__qualname__,
    }
    made = types.new_class(own.__name__, (base, own), exec_body=lambda body: body.update(namespace))
    for cls in (made, base):  # the name stands for the last one, and any of them loads all holders
        base._keras.saving.register_keras_serializable(*REGISTERED)(cls)
    return made

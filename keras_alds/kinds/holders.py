"""Layers and models of the user's own that hold factorized layers, and save them in their config.

The code of such a holder makes its stock layers again when a saved model is loaded. So the holder
gets a subclass of its own class, whose config also has the configs of the factorized layers, and
whose `from_config` puts them where the code has made the stock ones. The weights in the file then
fit, and `load_model`, `clone_model`, `copy` and `pickle` work as for the original class.
"""

from __future__ import annotations

import functools
import itertools
import json
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import keras

from keras_alds import _backend
from keras_alds._backend.live import retire, variables_of
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
    registered or in `custom_objects`, as for a model that is not compressed. The holders of one
    class make others of it without that.
    """

    _keras: ClassVar[Any] = keras
    _own: ClassVar[Any] = None  # the user's class

    def get_config(self) -> dict[str, Any]:
        """Return the config of the user's class and those of the factorized layers."""
        own, saving = self._own, self._keras.saving
        carried = {
            **_named(saving, own),
            "layers": {
                path: {
                    **_named(saving, type(layer)),
                    "config": layer.get_config(),
                    "build_config": layer.get_build_config(),
                }
                for path, layer in layers_in(self)
                if is_own(layer)
            },
        }
        return {**own.get_config(self), KEY: carried}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make the user's layer or model, with the factorized layers in their places.

        Raises:
            ValueError: If the user's class is unknown, or does not make a layer for every
                factorized one. For layers made in `build`, the error comes there.
        """
        if KEY not in config:  # a user's code calls it with arguments of its own class
            return cls._own.from_config(config)
        arguments = {key: value for key, value in config.items() if key != KEY}
        saving, carried = cls._keras.saving, config[KEY]
        if cls._own is not None and _named(saving, cls._own).items() <= carried.items():
            made = cls._own.from_config(arguments)  # a copy: the class need not be registered
        else:
            made = _made(saving, {**carried, "config": arguments})
        _put(made, carried["layers"])
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # `pickle` finds the user's class by its name, but not one that is made here.
        function, arguments, *rest = super().__reduce_ex__(protocol)
        if getattr(function, "__self__", None) is type(self):  # Keras 3
            function = getattr(self._own, function.__name__)
        elif arguments[:1] == (type(self),):  # layers of tf_keras
            arguments = (function, self._own, BASES[self._keras.__name__], *arguments[1:])
            function = _with_class_of_holder
        return function, arguments, *rest


keras.saving.register_keras_serializable(*REGISTERED)(WithFactorizedLayers)

#: What the classes of holders inherit from, by the name of their Keras.
BASES: dict[str, type] = {keras.__name__: WithFactorizedLayers}


def own_class(layer: Any) -> type:
    """A layer's class, that of the user for a holder."""
    return layer._own if isinstance(layer, WithFactorizedLayers) else type(layer)


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
    own: Any = type(layer)
    return backend.reclass(layer, _class_of_holder(own, BASES[backend.name]))


def abandon(layer: Any) -> None:
    """Gives a holder in which nothing is factorized any more the user's class back."""
    if isinstance(layer, WithFactorizedLayers) and not any(map(is_own, below(layer))):
        _backend.backend_of(layer).reclass(layer, layer._own)


#: Why holders of a class do not load, or None: by the rest of the config and the build config, and
#: then by the places of the factorized layers.
_known: weakref.WeakKeyDictionary[type, dict[str, dict[frozenset[Any], str | None]]]
_known = weakref.WeakKeyDictionary()


def does_not_load(holder: Any) -> str | None:
    """Why a holder cannot be made again from its config, with the factorized layers; or None.

    This makes it once. The answer is kept for the next holder of the same class and arguments,
    since a user's code may do much, such as load pretrained weights.
    """
    if missing := _out_of_reach(holder):
        return (
            f"Expected an attribute, list, tuple or dict that leads to each layer. Received: "
            f"{type(holder).__name__} holds {', '.join(missing)} in other ways, such as in a set"
        )
    backend = _backend.backend_of(holder)
    inside = [
        layer for layer in (holder, *below(holder)) if isinstance(layer, WithFactorizedLayers)
    ]
    saving = backend.keras.saving
    classes = {saving.get_registered_name(layer._own): layer._own for layer in inside}

    saved: dict[str, Any] = {}

    def describe() -> None:
        saved.update(config=holder.get_config(), build_config=holder.get_build_config())
        saved["key"] = _key(saving, saved["config"], saved["build_config"])

    def make() -> None:
        made, wanted = holder.from_config(saved["config"]), saved["config"][KEY]["layers"]
        if _places(made, wanted)[1] and saved["build_config"] and not made.built:
            made.build_from_config(saved["build_config"])
        _places(made, wanted)

    if (reason := backend.trial(describe)) is not None:
        return reason
    layers = saved["config"][KEY]["layers"]
    places = frozenset((path, layer["class_name"]) for path, layer in layers.items())
    known = _known.setdefault(holder._own, {}).setdefault(saved["key"], {})
    for others, reason in known.items():
        if places == others or (reason is None and places <= others):
            return reason
    # `load_model` is given classes that are not registered.
    with saving.custom_object_scope(classes):
        reason = backend.trial(make)
    if saved["key"]:
        known[places] = reason
    return reason


def _key(saving: Any, config: dict[str, Any], build_config: Any) -> str:
    """What a holder is made from, without its name and the factorized layers; "" if unknown."""
    arguments = {name: value for name, value in config.items() if name not in (KEY, "name")}
    try:
        return json.dumps([arguments, build_config], default=saving.serialize_keras_object)
    except (TypeError, ValueError):  # objects that Keras cannot save
        return ""


def _out_of_reach(holder: Any) -> list[str]:
    """The names of the factorized layers in a holder that `layers_in` does not find."""
    reached: set[Any] = set()
    for _, layer in layers_in(holder):
        reached.update((layer, *below(layer)) if is_own(layer) else (layer,))
    left = (layer for layer in below(holder) if is_own(layer) and layer not in reached)
    return sorted({f"'{layer.name}'" for layer in left})


def layers_in(holder: Any) -> Iterator[tuple[str, Any]]:
    """The layers at any depth of a holder, each once, with the attributes that lead to it.

    Layers of this package are not entered: their configs have what is inside them.
    """
    seen = {id(holder): holder}  # kept, so that no other object gets the same id

    def visit(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if id(value) in seen:
            return
        seen[id(value)] = value
        parts: Iterable[tuple[Any, Any]]
        if isinstance(value, layer_class):
            yield path, value
            parts = () if is_own(value) else backend.attributes(value)
        elif isinstance(value, dict):
            parts = value.items()
        else:
            parts = enumerate(value)
        for name, item in parts:
            if isinstance(item, entered):  # vocabularies have millions of others
                yield from visit(f"{path}/{name}", item)

    backend = _backend.backend_of(holder)
    layer_class = backend.keras.layers.Layer
    entered = (layer_class, dict, list, tuple)
    for name, value in backend.attributes(holder):
        if isinstance(value, entered):
            yield from visit(name, value)


def _named(saving: Any, cls: type) -> dict[str, Any]:
    """What a class is found by."""
    names = {"module": cls.__module__, "class_name": cls.__name__}
    return {**names, "registered_name": saving.get_registered_name(cls)}


def _made(saving: Any, saved: dict[str, Any]) -> Any:
    """A new layer or model, not built, of a class that `_named` has described.

    Raises:
        ValueError: If the class is unknown.
    """
    for name in ("registered_name", "class_name"):
        if (cls := saving.get_registered_object(saved[name])) is not None:
            return cls.from_config(saved["config"])
    names = ("module", "class_name", "registered_name", "config")
    try:  # Keras imports the modules of KerasHub by itself
        return saving.deserialize_keras_object({name: saved[name] for name in names})
    except (TypeError, ValueError) as error:  # Keras prints the whole config
        raise ValueError(
            f"Expected the class '{saved['class_name']}' of the module {saved['module']} to be "
            "registered, or in `custom_objects`, to load a layer that holds factorized ones. "
            f"Received: an unknown class. Import the module before loading."
        ) from error


def _put(made: Any, configs: dict[str, Any]) -> None:
    """Puts factorized layers in their places in a layer, now or once the places are built."""
    backend = _backend.backend_of(made)
    places, later = _places(made, configs)
    replaced: list[Any] = []
    for path, old in places.items():
        new = _made(backend.keras.saving, configs[path])
        if stock_kind(old) is not stock_kind(new):
            raise _no_place(made, path, f"a {type(old).__name__}")
        if old.built:
            with backend.name_scope(old):
                new.build_from_config(configs[path]["build_config"])
        replaced += [v for v in variables_of(old) if len(v.shape) > 1]  # kernels
        backend.transplant(old, new)
    for layer, paths in later.items():
        backend.after_build(layer, functools.partial(_put, made, {p: configs[p] for p in paths}))
    kept = {id(v) for layer in (made, *below(made)) for v in variables_of(layer)}
    if retire([variable for variable in replaced if id(variable) not in kept]):
        warnings.warn(
            f"The code of {type(made).__name__} traces its layers into graphs, such as in "
            "`Dataset.map` or a concrete function. Those that cannot be traced again read dense "
            f"kernels, which are factorized in '{made.name}', and fail from now on: make them "
            "again.",
            stacklevel=2,
        )
    for layer in (*reversed(list(dict.fromkeys(below(made)))), made):
        stock_kind(layer).adopt(backend, layer)
        adopt(layer)


def _places(made: Any, paths: Iterable[str]) -> tuple[dict[str, Any], dict[Any, list[str]]]:
    """Where factorized layers go: the layers that are there, and those to be built before that.

    Raises:
        ValueError: If there is no place for one, and everything around it is built.
    """
    there = dict(layers_in(made))
    now: dict[str, Any] = {}
    later: dict[Any, list[str]] = {}
    for path in paths:
        above = itertools.accumulate(path.split("/")[:-1], "{}/{}".format)
        if path not in there:
            around = [made, *(there[name] for name in above if name in there)]
            if around[-1].built:
                raise _no_place(made, path, "no layer")
            later.setdefault(around[-1], []).append(path)
        elif not is_own(there[path]):  # else a holder inside has loaded it
            now[path] = there[path]
    return now, later


def _no_place(made: Any, path: str, found: str) -> ValueError:
    return ValueError(
        f"Expected {type(made).__name__} to make the stock layer '{path}', which becomes a "
        f"factorized one, in `__init__` or `build`. Received: {found}, in the layer '{made.name}'. "
        "Create the model in code, build it, call `apply_plan` with the saved plan, then "
        "`load_weights`."
    )


def _with_class_of_holder(function: Callable[..., Any], own: Any, base: Any, *args: Any) -> Any:
    """Calls a function of `pickle` that makes an object of a class."""
    return function(_class_of_holder(own, base), *args)


@functools.cache
def _class_of_holder(own: Any, base: Any) -> type:
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

"""The weights and children of layers, and the replacement of layers in place."""

from __future__ import annotations

import contextlib
import functools
import random
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from keras_alds._backend.quiet import ignored_warnings


class KerasModel(Protocol):
    """The part of `keras.Model` and `tf_keras.Model` that this package's type hints use."""

    name: Any
    built: Any
    weights: Any
    inputs: Any

    def count_params(self) -> Any:
        """The number of parameters."""


Layer = Any  # a keras.layers.Layer or a tf_keras.layers.Layer
Model = Any
Optimizer = Any
Variable = Any
Undo = Callable[[], None]
Pairs = Iterable[tuple[Variable, Variable]]


def dtype_policy(layer: Layer) -> Any:
    """A layer's dtype policy."""
    return layer.dtype_policy


def called_function(layer: Layer) -> str | None:
    """The function that a layer of tf_keras calls, such as `"math.multiply"`; None for others.

    tf_keras makes such a layer of every function and operator between symbolic tensors.
    """
    return getattr(layer, "symbol", None)


def projections(layer: Layer, names: Iterable[str]) -> dict[str, Layer | None]:
    """The projections of an attention layer, such as `query`; None for those that do not exist."""
    return {name: getattr(layer, f"_{name}_dense", None) for name in names}


def pruning_mask(wrapper: Layer, weight: Variable) -> tuple[Any, Any]:
    """The threshold and mask of a weight at the current step of TF-MOT's pruning `wrapper`.

    `conditional_mask_update` would assign them only at the schedule's next update.
    """
    return wrapper.pruning_obj._maybe_update_block_mask(weight)


#: Layers whose state others have got, as long as they are alive.
_spent: weakref.WeakSet[Any] = weakref.WeakSet()


# What draws the numbers of tf_keras's layers while they are to have a seed.
_seeded: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Layers:
    """Layers: the code that Keras 3 and tf_keras share."""

    name: str
    keras: ModuleType
    # Attributes of a layer's place in the model, which stay when the layer is replaced.
    _place: tuple[str, ...]
    # Attributes with bound methods of the old object.
    _bound: tuple[str, ...] = ()

    def is_model(self, obj: object) -> bool:
        """Whether `obj` is a model."""
        return isinstance(obj, self.keras.Model)

    def parts(self, model: Model) -> list[str]:
        """The attributes of `model` that are models."""
        return [n for n, v in vars(model).items() if self.is_model(v) and not n.startswith("_")]

    def at(self, model: Model, path: str) -> Any:
        """What lies at a path of attributes, items and layer names; None if there is nothing."""
        found: Any = model
        try:
            for step in path.split("."):
                if isinstance(found, Mapping):
                    found = found[step]
                elif isinstance(found, Sequence):
                    found = found[int(step)]
                else:
                    found = getattr(found, step, None) or self._child(found, step)
        except (KeyError, IndexError, ValueError):
            return None
        return found

    def _child(self, layer: Layer, name: str) -> Layer | None:
        return next((child for child in self.children(layer) if child.name == name), None)

    def seeds(self, model: Model) -> list[Variable]:
        """The variables that say which random numbers the layers draw next, inside of `seeded`."""
        raise NotImplementedError

    def seeded(self, model: Model) -> contextlib.AbstractContextManager[None]:
        """Gives a seed to every layer that draws random numbers and has none."""
        return contextlib.nullcontext()

    def reset_seed(self, seed: Variable, number: int) -> None:
        """Lets a seed give the numbers that belong to `number`, from the first one on."""
        raise NotImplementedError

    def layers_of(self, model: Model) -> list[Layer]:
        """A model and all layers in it, the model first."""
        found: dict[int, Layer] = {}
        waiting = [model]
        while waiting:
            layer = waiting.pop()
            if id(layer) not in found:
                found[id(layer)] = layer
                waiting += self.children(layer)
        return list(found.values())

    def children(self, layer: Layer) -> list[Layer]:
        """The layers directly inside `layer`, in creation order (no metrics)."""
        return list(layer._flatten_layers(include_self=False, recursive=False))

    def attributes(self, layer: Layer) -> list[tuple[str, Any]]:
        """The attributes that may hold layers, in the order in which Keras saves their weights.

        First come the `layers` of a Functional or Sequential model, then what its code has set,
        private names last.
        """
        own = vars(layer).keys() - self._of_every_layer
        names = sorted(own, key=lambda name: (name.startswith("_"), name))
        found = [(name, vars(layer)[name]) for name in names]
        return [("layers", layer.layers), *found] if self.is_symbolic(layer) else found

    @functools.cached_property
    def _of_every_layer(self) -> set[str]:
        # With names, so that those of the user's next layers do not count on.
        return {*vars(self.keras.layers.Layer(name="any")), *vars(self.keras.Model(name="any"))}

    def is_symbolic(self, model: Model) -> bool:
        """Whether `model` is Functional or Sequential, and so has a graph of layers."""
        raise NotImplementedError

    def own_variables(self, layer: Layer) -> list[Variable]:
        """The weights of `layer`, without those of the layers inside it."""
        inside = {id(v) for child in self.children(layer) for v in child.weights}
        return [v for v in layer.weights if id(v) not in inside]

    def weights(self, model: Model) -> list[Variable]:
        """The weights of a model, without the vocabularies that tf_keras lists among them."""
        return [weight for weight in model.weights if hasattr(weight, "shape")]

    def has_its_weights(self, layer: Layer) -> bool:
        """Whether a layer is built, or has no `build` that creates weights."""
        layers = self.keras.layers  # in tf_keras, random layers only build their generator
        stateless = (layers.Layer.build, layers.Dropout.build)
        return bool(layer.built or type(layer).build in stateless)

    def value(self, variable: Variable) -> np.ndarray:
        """The values of a variable as a NumPy array."""
        tensor = tf.convert_to_tensor(variable)
        if tensor.dtype == tf.bfloat16:
            tensor = tf.cast(tensor, tf.float32)
        return tensor.numpy()  # one copy; `ops.convert_to_numpy` makes two

    def copy_trainable(self, old: Variable, new: Variable) -> None:
        """Freezes `new` if `old` is frozen individually, which only Keras 3 supports."""

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        """The name scope for a layer's new variables."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def creation_scope(self, model: Model) -> Iterator[None]:
        """The scope in which to create variables of `model` (its distribution strategy)."""
        strategy = getattr(model, "distribute_strategy", None)
        with strategy.scope() if strategy is not None else contextlib.nullcontext():
            yield

    def transplant(self, old: Layer, new: Layer, kept: Mapping[Any, str] | None = None) -> Undo:
        """Gives the layer object `old` the class and state of `new`; do not use `new` afterwards.

        The object itself, its name and its place in every graph stay, so references to the layer
        remain valid. The kept variables also stay the same objects, so optimizers keep their state.

        Args:
            old: A layer, built if `new` is.
            new: A layer with the same inputs and outputs. If it is not built, `old` builds itself
                as the new layer later.
            kept: Variables of `old` to keep, as `{attribute of old: attribute of new}`, in the
                order of the last variables of `new`. The key None stands for a variable that `new`
                has of its own, at this place in the order. Defaults to none.

        Returns:
            A function that undoes the change.
        """
        if not new.built:
            self._build_later(old, new)
        for theirs, ours in (kept or {}).items():
            variable = getattr(new, ours) if theirs is None else getattr(old, theirs, None)
            if variable is not None and getattr(new, ours, None) is not None:
                self._share(variable, new, ours)
        before, before_class = dict(old.__dict__), type(old)
        state = self._unbound(new) if new.built else dict(new.__dict__)
        state.update({key: before[key] for key in self._place if key in before})
        state.update(self._losses_of(old, new))

        become(old, type(new), state)
        _spent.add(new)
        return lambda: become(old, before_class, before)

    def is_spent(self, layer: Layer) -> bool:
        """Whether another layer has got the state of `layer` by `transplant`."""
        return layer in _spent

    def _unbound(self, layer: Layer) -> dict[str, Any]:
        """The attributes of a layer that another object may have too."""
        return {key: value for key, value in layer.__dict__.items() if key not in self._bound}

    def _build_later(self, old: Layer, new: Layer) -> None:
        """Lets `old`, which is about to get the class and state of `new`, be built like it."""

    def after_build(self, layer: Layer, act: Callable[[], None]) -> None:
        """Calls `act` once `layer` has been built."""
        build = layer.build
        before = layer.__dict__.get("build")

        @functools.wraps(build)
        def build_and_act(*args: Any, **kwargs: Any) -> None:
            build(*args, **kwargs)
            if layer.__dict__.get("build") is build_and_act:
                del layer.__dict__["build"]
                if before is not None:
                    layer.__dict__["build"] = before
            act()

        layer.__dict__["build"] = build_and_act

    def reclass(self, layer: Layer, cls: type) -> Undo:
        """Changes the class of `layer` to a subclass or a base of it.

        Returns:
            A function that undoes the change.
        """
        before = type(layer)
        object.__setattr__(layer, "__class__", cls)
        return lambda: object.__setattr__(layer, "__class__", before)

    def trial(self, make: Callable[[], Any]) -> str | None:
        """Why `make` cannot make a layer or a model, in short; or None.

        Seeds of Python and NumPy are left as they were.
        """
        states = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            with tf.device("CPU:0"), ignored_warnings():
                make()
        except Exception as error:  # the user's code
            first = next(iter(str(error).strip().splitlines()), "")
            return f"{type(error).__name__}: {first[:200]}"
        finally:  # initializers draw their seeds from them
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
        return None

    def renew_bidirectional(self, layer: Layer) -> Undo:
        """Updates the configs of its two layers in a `Bidirectional`, for saving and copying.

        Returns:
            A function that undoes the change.
        """
        return lambda: None

    def adopt(
        self, layer: Layer, cls: type, attributes: dict[str, Any], forget: Collection[str] = ()
    ) -> Undo:
        """Changes the class of `layer` to a sub- or superclass, with and without some attributes.

        Returns:
            A function that undoes the change.
        """
        before, before_class = dict(layer.__dict__), type(layer)
        kept = {name: value for name, value in before.items() if name not in forget}
        become(layer, cls, {**kept, **attributes})
        return lambda: become(layer, before_class, before)

    def _losses_of(self, old: Layer, new: Layer) -> dict[str, Any]:
        """Attributes with the regularization losses of the layer's new weights."""
        return {}

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        raise NotImplementedError

    def use_plain_convolutions(self, layers: Sequence[Layer]) -> None:
        """Runs stock grouped convolutions without XLA, whose gradient is very slow on CPUs.

        Outputs and saved files stay the same. Does nothing in Keras 3, which has no such switch.
        """


class Keras3Layers(Layers):
    """The implementation for Keras 3."""

    _place = (
        "_inbound_nodes",
        "name",
        "_path",
        "_build_shapes_dict",
    )
    _bound = ("build", "quantize")

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        # Where its weights are: h5 files need the names to differ within a layer of the user's own.
        scope = getattr(layer, "scope", None) or getattr(layer, "path", None)
        if scope is None:  # before Keras 3.5
            scope = next((v.path.rpartition("/")[0] for v in self.own_variables(layer)), "")
        scopes = contextlib.ExitStack()
        for depth, name in enumerate(scope.split("/")[:-1]):  # the last is the layer's own
            outside = {"override_parent": ""} if depth == 0 else {}
            scopes.enter_context(keras.name_scope(name, **outside))
        return scopes

    def seeds(self, model: Model) -> list[Variable]:
        layers = self.layers_of(model)
        return [g.state for layer in layers for g in getattr(layer, "_seed_generators", ())]

    def reset_seed(self, seed: Variable, number: int) -> None:
        seed.assign([number, 0])

    def copy_trainable(self, old: Variable, new: Variable) -> None:
        if new.trainable != old.trainable:
            new.trainable = old.trainable

    def _build_later(self, old: Layer, new: Layer) -> None:
        # Keras puts a function that builds `new` itself among its attributes.
        build = new.build

        @functools.wraps(build)
        def build_both(*args: Any, **kwargs: Any) -> None:
            new.__dict__.update(self._unbound(old))
            build(*args, **kwargs)
            become(old, type(new), self._unbound(new))

        new.name = old.name
        new.__dict__["build"] = build_both

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        trainable = variable.trainable
        tracker = new._tracker
        locked = tracker.locked
        tracker.unlock()
        tracker.untrack(getattr(new, name))
        variable.trainable = True  # lists it among the variables that `layer.trainable = …` sets
        setattr(new, name, variable)
        variable.trainable = trainable
        if locked:
            tracker.lock()


@functools.cache
def _plain_convolutions_train() -> bool:
    """Whether grouped convolutions have a gradient; on CPUs this requires oneDNN."""
    kernel = tf.ones((1, 1, 1, 2))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        try:
            outputs = tf.nn.conv2d(tf.ones((1, 2, 2, 2)), kernel, 1, "VALID")
            return tape.gradient(outputs, kernel) is not None
        except tf.errors.OpError:
            return False


class TfKerasLayers(Layers):
    """The implementation for tf_keras."""

    _place = (
        "_inbound_nodes_value",
        "_outbound_nodes_value",
        "_name",
        "_build_input_shape",
    )

    def value(self, variable: Variable) -> np.ndarray:
        # Not `np.asarray`, which some variables with a copy per replica refuse.
        return tf.convert_to_tensor(variable).numpy()

    def seeds(self, model: Model) -> list[Variable]:
        return [g._generator.state for g in self._generators(model) if _is_seeded(g)]

    @contextlib.contextmanager
    def seeded(self, model: Model) -> Iterator[None]:
        generators = [g for g in self._generators(model) if not _is_seeded(g)]
        before = [dict(vars(generator)) for generator in generators]
        try:
            for number, generator in enumerate(generators):
                if generator not in _seeded:
                    with tf.init_scope():
                        _seeded[generator] = tf.random.Generator.from_seed(number)
                vars(generator).update(
                    _rng_type=generator.RNG_STATEFUL, _generator=_seeded[generator], _built=True
                )
            yield
        finally:
            for generator, old in zip(generators, before, strict=True):
                vars(generator).update(old)
                for name in vars(generator).keys() - old.keys():
                    del vars(generator)[name]

    def _generators(self, model: Model) -> list[Any]:
        found = [getattr(layer, "_random_generator", None) for layer in self.layers_of(model)]
        return [g for g in found if hasattr(g, "RNG_STATEFUL")]  # not of the user's own

    def reset_seed(self, seed: Variable, number: int) -> None:
        seed.assign([0, 0, number])

    def use_plain_convolutions(self, layers: Sequence[Layer]) -> None:
        if not _plain_convolutions_train():
            return
        for layer in layers:
            if getattr(layer, "groups", 1) > 1 and hasattr(layer, "_jit_compiled_convolution_op"):
                layer._jit_compiled_convolution_op = layer.convolution_op

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        if hasattr(layer, "scope"):
            return tf.name_scope(layer.scope)
        scope = next((v.name.rpartition("/")[0] for v in self.own_variables(layer)), "")
        return tf.name_scope(f"{scope}/" if scope else layer.name)

    def renew_bidirectional(self, layer: Layer) -> Undo:
        # It saves the config of the given layer, and creates both of its layers from that.
        forward, backward = layer.forward_layer, layer.backward_layer
        given = type(forward).from_config({**forward.get_config(), "name": layer.layer.name})
        config = self.keras.saving.serialize_keras_object(backward)
        config["config"]["name"] = backward.name.removeprefix("backward_")
        return self.adopt(layer, type(layer), {"layer": given, "_backward_layer_config": config})

    def own_variables(self, layer: Layer) -> list[Variable]:
        # Without vocabularies, which tf_keras lists among the weights.
        return [v for v in super().own_variables(layer) if hasattr(v, "shape")]

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        delattr(new, name)
        setattr(new, name, variable)

    def _losses_of(self, old: Layer, new: Layer) -> dict[str, Any]:
        # Losses are functions: those of weights come from `new`, others stay.
        held = {id(variable) for variable in self.own_variables(new)}
        losses = [
            loss
            for layer in (old, new)
            for loss in layer._callable_losses
            if (weight := _regularized(loss)) is None or id(weight) in held
        ]
        return {"_callable_losses": losses}


def _is_seeded(generator: Any) -> bool:
    return bool(generator._rng_type == generator.RNG_STATEFUL and generator._built)


def become(obj: Any, cls: type, attributes: dict[str, Any]) -> None:
    """Gives an object another class and other attributes."""
    object.__setattr__(obj, "__class__", cls)
    obj.__dict__.clear()
    obj.__dict__.update(attributes)


def like(obj: Any, **attributes: Any) -> Any:
    """A second object with the attributes of `obj`, except for those given."""
    other = object.__new__(type(obj))
    other.__dict__.update({**vars(obj), **attributes})
    return other


def static_shape(value: Any) -> tuple[int | None, ...] | None:
    """The shape of a tensor or variable, or None if it has none."""
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _regularized(loss: Callable[..., Any]) -> Variable | None:
    """The weight that a regularization loss belongs to, or None for other losses."""
    (inner,) = loss.args if isinstance(loss, functools.partial) else (None,)
    if not isinstance(inner, functools.partial) or inner.func.__name__ != "_loss_for_variable":
        return None
    return inner.args[0]

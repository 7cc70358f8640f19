"""What this package needs of a Keras: `Backend`, with what both Kerases do alike."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

Layer = Any  # a keras.layers.Layer or a tf_keras.layers.Layer
Model = Any
Optimizer = Any
Variable = Any
Undo = Callable[[], None]
Pairs = Iterable[tuple[Variable, Variable]]


@dataclasses.dataclass(frozen=True)
class GraphCall:
    """One call in the graph of a symbolic model: `layer(*args, **kwargs)` gave `outputs`.

    Attributes:
        layer: The layer, or in Keras 3 the operation.
        args: The arguments, with the symbolic tensors of the graph.
        kwargs: The keyword arguments.
        outputs: The symbolic tensors that came out, flattened.
    """

    layer: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]


class Backend:
    """What this package needs of a Keras and what the two Kerases do differently."""

    name: str
    keras: ModuleType
    # Attributes of a layer that belong to its place in the graph, not to its kind.
    _identity: tuple[str, ...]
    # Attributes that bind methods of the object they were made for.
    _bound: tuple[str, ...] = ()

    # -- What a thing is ---------------------------------------------------------------------

    def is_model(self, obj: object) -> bool:
        """Whether `obj` is a model of this Keras."""
        return isinstance(obj, self.keras.Model)

    def is_symbolic(self, model: Model) -> bool:
        """Whether `model` is Functional or Sequential, that is, holds its graph of layers."""
        return isinstance(model, (self.keras.Sequential, self._functional))

    @functools.cached_property
    def _functional(self) -> type:
        # Neither Keras names the class publicly; a model of one tensor is an instance of it.
        tensor = self.keras.Input((1,))
        return type(self.keras.Model(tensor, self.keras.layers.Activation("linear")(tensor)))

    def children(self, layer: Layer) -> list[Layer]:
        """The layers that `layer` directly holds, in creation order (no metrics)."""
        return list(layer._flatten_layers(include_self=False, recursive=False))

    def own_variables(self, layer: Layer) -> list[Variable]:
        """The weights that `layer` holds itself, without those of its sublayers."""
        raise NotImplementedError

    def weights(self, model: Model) -> list[Variable]:
        """The weights of a model; tf_keras lists vocabularies among them, which are none."""
        return [weight for weight in model.weights if hasattr(weight, "shape")]

    def has_its_weights(self, layer: Layer) -> bool:
        """Whether the weights of a layer are made, or it has no `build` that could make some."""
        layers = self.keras.layers  # in tf_keras, random layers build their generator only
        stateless = (layers.Layer.build, layers.Dropout.build)
        return bool(layer.built or type(layer).build in stateless)

    def check_call(self, model: Model) -> None:
        """Raises a ValueError for a model that has a `train_step` and no `call`."""
        if type(model).call is self.keras.Model.call:
            raise ValueError(
                f"Expected the model '{model.name}' to have a `call`, to be run on examples or "
                f"have its multiply–accumulates counted. Received: {type(model).__name__} without "
                'one. Write one, or use objective="params" without calibration data.'
            )

    def is_compiled(self, model: Model) -> bool:
        """Whether `compile()` was called on `model`."""
        raise NotImplementedError

    def value(self, variable: Variable) -> np.ndarray:
        """The values of a variable as a NumPy array."""
        tensor = tf.convert_to_tensor(variable)
        if tensor.dtype == tf.bfloat16:
            tensor = tf.cast(tensor, tf.float32)
        return tensor.numpy()  # one copy, where `ops.convert_to_numpy` holds two for a while

    def copy_trainable(self, old: Variable, new: Variable) -> None:
        """Freezes `new` if `old` is frozen by itself, which only Keras 3 allows."""

    # -- Looking into a forward pass ---------------------------------------------------------

    def input_specs(self, model: Model) -> Any:
        """The structure of `tf.TensorSpec` that `model` is called on (batch of one).

        Raises:
            ValueError: If the shapes are not known.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def watching_calls(
        self, layers: Sequence[Layer], watch: Callable[[Layer, Any, Any], Any]
    ) -> Iterator[None]:
        """Watches every call of `layers` while inside.

        Args:
            layers: The layers, at any depth of a model.
            watch: `watch(layer, inputs, outputs)` is called after every call with its first
                argument and its result, and returns what is handed on in place of the result.
        """

        def watched(layer: Layer, call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)
            def inner(*args: Any, **kwargs: Any) -> Any:
                outputs = call(*args, **kwargs)
                inputs = args[0] if args else next(iter(kwargs.values()))
                return watch(layer, inputs, outputs)

            return inner

        before = [(layer, layer.__dict__.get("call")) for layer in layers]
        try:
            for layer in layers:
                layer.__dict__["call"] = watched(layer, layer.call)
            yield
        finally:
            for layer, call in before:
                layer.__dict__.pop("call", None)
                if call is not None:
                    layer.__dict__["call"] = call

    def trace_shapes(self, model: Model, layers: Sequence[Layer]) -> dict[Layer, list[tuple]]:
        """Input and output shapes of every call of `layers` in one forward pass of `model`.

        The pass is traced, not run: nothing is computed and no state changes.

        Args:
            model: The model.
            layers: The layers to watch, at any depth.

        Returns:
            `{layer: [(input_shape, output_shape), ...]}`, shapes with a batch of one.
        """
        self.check_call(model)
        calls: dict[Layer, list[tuple]] = {layer: [] for layer in layers}
        specs = self.input_specs(model)

        def watch(layer: Layer, inputs: Any, outputs: Any) -> Any:
            calls[layer].append((_static_shape(inputs), _static_shape(outputs)))
            return outputs

        try:
            with self.watching_calls(layers, watch):
                tf.function(
                    lambda inputs: model(inputs, training=False), autograph=False
                ).get_concrete_function(specs)
        finally:
            if hasattr(model, "_clear_losses"):
                model._clear_losses()
        return calls

    # -- Copies ------------------------------------------------------------------------------

    def copy_model(self, model: Model) -> Model:
        """A new model of the same class, architecture, weights and compile state.

        Functional and Sequential models are cloned layer by layer, nested models included;
        subclassed ones are made again by `from_config(get_config())`.

        Raises:
            ValueError: If a subclassed model cannot be made again from its config.
        """
        if self.is_symbolic(model) and _is_plain_constructor(self.keras, type(model)):
            try:
                copy = self._clone(model)
            except Exception as error:
                raise ValueError(
                    f"A copy of the model '{model.name}' could not be made from the configs of its "
                    f"layers ({type(error).__name__}: {error}). Expected every layer, function and "
                    "initializer to be one that can be made again. Remedy: register your own with "
                    f"`{self.name}.saving.register_keras_serializable`, or compress in training "
                    "with `ALDSCompress`, or in place with `apply_plan`."
                ) from error
            if type(copy) is not type(model):
                copy = type(model)(copy.inputs, copy.outputs, name=model.name)
        else:
            copy = self._copy_subclassed(model)
        if _shapes(copy) != _shapes(model):
            raise ValueError(
                f"Expected a copy of the model '{model.name}', made from its config, to have the "
                f"same weights. Received: {len(copy.weights)} weights in the copy, "
                f"{len(model.weights)} in the model, or other shapes. Make `get_config()` of "
                f"{type(model).__name__} and of its layers return every constructor argument."
            )
        copy.set_weights(model.get_weights())
        for old, new in zip(self._flatten(model), self._flatten(copy), strict=True):
            self._copy_layer_state(old, new)
        if self.is_compiled(model):
            pairs = zip(model.weights, copy.weights, strict=True)
            self._copy_compile_state(model, copy, pairs)
        return copy

    def _copy_layer_state(self, old: Layer, new: Layer) -> None:
        """Copies what a layer holds besides its config and the values of its weights."""
        if self.children(old):
            new._trainable = old._trainable  # the setter would reach the layers inside
        elif new.trainable != old.trainable:
            new.trainable = old.trainable
        if hasattr(new, "finalize_state") and new.weights:
            new.finalize_state()  # adapted layers compute with constants made of the weights
        keeps_assets = getattr(type(old), "load_assets", None) is not getattr(
            self.keras.layers.Layer, "load_assets", None
        )
        if keeps_assets:
            with tempfile.TemporaryDirectory() as folder:  # vocabularies are not weights
                old.save_assets(folder)
                new.load_assets(folder)

    def _flatten(self, layer: Layer) -> list[Layer]:
        return list(layer._flatten_layers(include_self=False))

    def _clone(self, model: Model) -> Model:
        raise NotImplementedError

    def _copy_subclassed(self, model: Model) -> Model:
        try:
            copy = type(model).from_config(model.get_config())
            if copy.built and len(copy.weights) == len(model.weights):
                return copy
            specs = self.input_specs(model)
            tf.function(
                lambda inputs: copy(inputs, training=False), autograph=False
            ).get_concrete_function(specs)
        except Exception as error:
            raise ValueError(
                f"A copy of the subclassed model '{model.name}' could not be made from its config "
                f"({type(error).__name__}: {error}). Expected `get_config()` of "
                f"{type(model).__name__} to return every constructor argument, and `from_config` "
                "to build the model from them. Remedy: implement both, or compress your own "
                "second instance with `apply_plan(instance, plan)`, or compress in training with "
                "`ALDSCompress`, which works on the model object itself."
            ) from error
        return copy

    def _compile_arguments(self, model: Model) -> dict[str, Any]:
        raise NotImplementedError

    def _copy_compile_state(self, model: Model, copy: Model, pairs: Pairs) -> None:
        if type(model).compile is not self.keras.Model.compile:
            config = model.get_compile_config()
            try:
                copy.compile_from_config(config)
            except Exception as error:
                warnings.warn(
                    f"{type(model).__name__} overrides `compile()`, and its compile state could "
                    f"not be copied ({error}): call `compile()` on the new model.",
                    stacklevel=4,
                )
            return
        arguments = self._compile_arguments(model)
        arguments["optimizer"] = self._copy_optimizer(arguments["optimizer"])
        for name in ("metrics", "weighted_metrics"):
            arguments[name] = self._copy_metrics(arguments[name])
        copy.compile(**arguments)
        self._copy_weight_decay_exclusions(model, copy, pairs)

    def _copy_optimizer(self, optimizer: Optimizer) -> Optimizer:
        # A schedule has no state: the same object serves both, also if it cannot be serialized.
        inner = self.inner_optimizer(optimizer) or optimizer
        schedule = getattr(inner, "_learning_rate", None)
        if not isinstance(schedule, self.keras.optimizers.schedules.LearningRateSchedule):
            copy = self._copy_config(optimizer)
        else:
            inner.__dict__["_learning_rate"] = self.keras.optimizers.schedules.ExponentialDecay(
                1.0, 1, 1.0
            )
            try:
                copy = self._copy_config(optimizer)
            finally:
                inner.__dict__["_learning_rate"] = schedule
            (self.inner_optimizer(copy) or copy)._learning_rate = schedule
        return copy

    def _copy_weight_decay_exclusions(self, model: Model, copy: Model, pairs: Pairs) -> None:
        # Not part of an optimizer's config: name patterns, and keys of variables.
        theirs, ours = (self.inner_optimizer(m.optimizer) or m.optimizer for m in (model, copy))
        for name in ("_exclude_from_weight_decay_pattern", "_exclude_from_weight_decay_names"):
            if getattr(theirs, name, None):
                setattr(ours, name, getattr(theirs, name))
        for old, new in pairs:
            if self.is_excluded_from_weight_decay(theirs, old):
                self.exclude_from_weight_decay(ours, [new])

    def is_excluded_from_weight_decay(self, optimizer: Optimizer, variable: Variable) -> bool:
        """Whether `exclude_from_weight_decay(var_list=…)` was given this variable."""
        excluded = getattr(optimizer, "_exclude_from_weight_decay", ())
        return bool(excluded) and optimizer._var_key(variable) in excluded

    def exclude_from_weight_decay(self, optimizer: Optimizer, variables: list[Variable]) -> Undo:
        """Adds variables to those that are not decayed; also for an optimizer that is built.

        Returns:
            A function that puts everything back.
        """
        known = getattr(optimizer, "_exclude_from_weight_decay", ())
        optimizer._exclude_from_weight_decay = [*known, *map(optimizer._var_key, variables)]
        return lambda: setattr(optimizer, "_exclude_from_weight_decay", known)

    def _copy_config(self, obj: Any) -> Any:
        return type(obj).from_config(obj.get_config())

    def _copy_metrics(self, metrics: Any) -> Any:
        # Metric objects hold state; names and functions do not.
        if isinstance(metrics, self.keras.metrics.Metric):
            return self._copy_config(metrics)
        if isinstance(metrics, dict):
            return {key: self._copy_metrics(value) for key, value in metrics.items()}
        if isinstance(metrics, (list, tuple)):
            return [self._copy_metrics(value) for value in metrics]
        return metrics

    def saves(self, holder: Layer, layers: Collection[Layer]) -> bool:
        """Whether a saved `holder` holds `layers` as they are.

        What Keras and this package make do, and what has their configs in its own; anything else
        makes them again in its code.
        """
        cls = type(holder)
        if cls.__module__.startswith((f"{self.keras.__name__}.", "keras_alds.")):
            return True
        if cls.get_config in (self.keras.Model.get_config, self.keras.layers.Layer.get_config):
            return False  # the arguments of its constructor, at most
        try:
            config = holder.get_config()
        except Exception:  # a user's own code
            return False
        return all(_holds_config(config, layer) for layer in layers)

    # -- Graphs of symbolic models -----------------------------------------------------------

    def graph(self, model: Model) -> list[GraphCall]:
        """The calls that a built symbolic model makes, inputs first, in an order that runs."""
        graph = self._functional_of(model)
        return [
            self._graph_call(node)
            for depth in sorted(graph._nodes_by_depth, reverse=True)
            for node in graph._nodes_by_depth[depth]
        ]

    def graph_ends(self, model: Model) -> tuple[Any, Any]:
        """The structures of input and output tensors of a built symbolic model."""
        raise NotImplementedError

    def runs_graph(self, layer: Layer) -> bool:
        """Whether calling `layer` does what its graph says: a symbolic model without own code."""
        return (
            isinstance(layer, self.keras.layers.Layer)
            and self.is_symbolic(layer)
            and bool(layer.built and getattr(layer, "inputs", None))
            and getattr(type(layer), "call", None)
            in [getattr(kind, "call", None) for kind in (self.keras.Sequential, self._functional)]
        )

    def graph_inputs(self, model: Model, inputs: Any) -> list[Any]:
        """What a symbolic model is called on as a flat list in the order of its graph's inputs."""
        raise NotImplementedError

    def infer(self, layer: Layer, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Calls a layer or operation of a graph, as inference does."""
        if getattr(layer, self._takes_training, False) and kwargs.get("training") is None:
            kwargs = {**kwargs, "training": False}
        return layer(*args, **kwargs)

    # The attribute of a layer that says whether its `call` has an argument `training`.
    _takes_training: str

    def _functional_of(self, model: Model) -> Model:
        return model

    def _graph_call(self, node: Any) -> GraphCall:
        raise NotImplementedError

    def can_construct(self, model: Model) -> bool:
        """Whether the class of a symbolic model can be made from its inputs and outputs."""
        return _is_plain_constructor(self.keras, type(model))

    def copy_compile_state(self, model: Model, copy: Model, pairs: Pairs) -> None:
        """Compiles `copy` as `model` is, with a new optimizer; nothing if it is not compiled.

        Args:
            model: The model that is compiled, or not.
            copy: A model that does the same.
            pairs: Weights of `model`, each with one of `copy` that took its place, for what an
                optimizer was told of single weights.
        """
        if self.is_compiled(model):
            self._copy_compile_state(model, copy, pairs)

    def compile_arguments(self, model: Model) -> dict[str, Any]:
        """What a compiled model was given: objects, functions and names as the user wrote them."""
        return self._compile_arguments(model)

    def learning_rate(self, optimizer: Optimizer) -> float:
        """The learning rate that the next step would have."""
        return float((self.inner_optimizer(optimizer) or optimizer).learning_rate)

    def set_learning_rate(self, optimizer: Optimizer, rate: float) -> None:
        """Gives an optimizer that is not built a constant rate, also in place of a schedule."""
        raise NotImplementedError

    # -- Changing a layer in place -----------------------------------------------------------

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        """The scope that gives a layer's new variables their names."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def creation_scope(self, model: Model) -> Iterator[None]:
        """Where new variables of `model` have to be made (its distribution strategy)."""
        strategy = getattr(model, "distribute_strategy", None)
        with strategy.scope() if strategy is not None else contextlib.nullcontext():
            yield

    def transplant(self, old: Layer, new: Layer, kept: Mapping[str, str] | None = None) -> Undo:
        """Turns the layer object `old` into what `new` is; `new` must not be used afterwards.

        Class and state are replaced; the object itself, its name and its place in every graph
        stay, so whoever holds a reference to the layer goes on holding it. The variables that are
        kept stay the same objects too, and with them whatever an optimizer keeps for them.

        Args:
            old: A built layer.
            new: A built layer with the same inputs and outputs.
            kept: Variables that the two have in common: `{attribute of old: attribute of new}`, in
                the order of the last variables of `new`. Defaults to none.

        Returns:
            A function that puts everything back.
        """
        for theirs, ours in (kept or {}).items():
            if getattr(old, theirs, None) is not None and getattr(new, ours, None) is not None:
                self._share(getattr(old, theirs), new, ours)
        before, before_class = dict(old.__dict__), type(old)
        state = {key: value for key, value in new.__dict__.items() if key not in self._bound}
        state.update({key: before[key] for key in self._identity if key in before})
        state.update(self._losses_of(old, new))

        become(old, type(new), state)
        return lambda: become(old, before_class, before)

    def renew_bidirectional(self, layer: Layer) -> Undo:
        """Lets a `Bidirectional` save and copy its two layers as they are now.

        Returns:
            A function that puts everything back.
        """
        return lambda: None

    def adopt(self, layer: Layer, cls: type, attributes: dict[str, Any]) -> Undo:
        """Makes `layer` one of a subclass of its class, with further attributes.

        Returns:
            A function that puts everything back.
        """
        before, before_class = dict(layer.__dict__), type(layer)
        become(layer, cls, {**before, **attributes})
        return lambda: become(layer, before_class, before)

    def _losses_of(self, old: Layer, new: Layer) -> dict[str, Any]:
        """Attributes of what `old` becomes that hold losses of the layer's weights."""
        return {}

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        raise NotImplementedError

    def use_plain_convolutions(self, layers: Sequence[Layer]) -> None:
        """Lets stock grouped convolutions run without XLA, whose gradient is very slow on CPUs.

        The layers compute the same; what is saved does not change. Nothing in Keras 3, which has
        no such switch.
        """

    # -- Training state ----------------------------------------------------------------------

    def optimizers(self, model: Model) -> list[Optimizer]:
        """Every optimizer that `model` holds: its own and those of a custom `train_step`."""
        base = self._optimizer_classes()
        found: dict[int, Optimizer] = {}

        def visit(value: Any, depth: int = 0) -> None:
            if isinstance(value, base):
                found.setdefault(id(value), value)
                inner = self.inner_optimizer(value)
                if inner is not None:
                    found.setdefault(id(inner), inner)
            elif depth < 2 and isinstance(value, dict):
                for item in value.values():
                    visit(item, depth + 1)
            elif depth < 2 and isinstance(value, (list, tuple)):
                for item in value:
                    visit(item, depth + 1)

        visit(getattr(model, "optimizer", None))
        for value in list(vars(model).values()):
            visit(value)
        return list(found.values())

    def _optimizer_classes(self) -> tuple[type, ...]:
        raise NotImplementedError

    def inner_optimizer(self, optimizer: Optimizer) -> Optimizer | None:
        """The optimizer that a `LossScaleOptimizer` wraps, or None."""
        raise NotImplementedError

    def is_optimizer_built(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` has its variables."""
        raise NotImplementedError

    def optimizer_targets(self, optimizer: Optimizer, known: list[Variable]) -> list[Variable]:
        """The model variables that a built optimizer was built on, in order.

        Args:
            optimizer: A built optimizer.
            known: The model's variables: tf_keras keeps no references, only keys.
        """
        raise NotImplementedError

    def slots(
        self, optimizer: Optimizer, targets: list[Variable]
    ) -> dict[str, list[Variable | None]]:
        """The optimizer's per-variable state: slot name to one variable per target."""
        count = len(targets)
        return {
            name: list(value)
            for name, value in vars(optimizer).items()
            if name not in self._not_slots
            and isinstance(value, list)
            and len(value) == count
            and all(item is None or hasattr(item, "assign") for item in value)
        }

    _not_slots: tuple[str, ...] = ()

    def rebuild_optimizer(
        self,
        optimizer: Optimizer,
        old: list[Variable],
        new: list[Variable],
        undo_steps: list[Undo],
    ) -> None:
        """Builds `optimizer` again, in place, on other model variables.

        Its per-variable state starts at its initial values; iterations, learning rate, schedule
        and every scalar (loss scale, …) keep theirs.

        Args:
            optimizer: A built optimizer.
            old: The model variables that it was built on.
            new: Those that it is to update from now on.
            undo_steps: A function that puts everything back is appended before anything changes.
        """
        raise NotImplementedError

    def reset_functions(self, model: Model) -> None:
        """Forgets the compiled step functions, and makes the train function anew if in `fit`."""
        training = model.train_function is not None
        model.train_function = None
        model.test_function = None
        model.predict_function = None
        if training:
            model.make_train_function(force=True)

    def forget_best(self, callback: Any) -> None:
        """Makes a stock callback forget the best value and weights that it remembers."""
        callbacks = self.keras.callbacks
        if isinstance(callback, (callbacks.EarlyStopping, callbacks.ReduceLROnPlateau)):
            callback.on_train_begin()
        elif isinstance(callback, callbacks.ModelCheckpoint) and callback.save_best_only:
            self._forget_checkpoint(callback)

    def _forget_checkpoint(self, callback: Any) -> None:
        raise NotImplementedError

    def missing_in_backup(self, callback: Any, model: Model) -> str | None:
        """The first weight of `model` that the backup of a `BackupAndRestore` lacks.

        The backup is compared with what `model` would save now, by the names that Keras restores
        by, and by shapes.

        Returns:
            Its name and shape, or None: it has all of them, there is no backup, or `callback` is
            another callback.
        """
        if not isinstance(callback, self.keras.callbacks.BackupAndRestore) or not model.built:
            return None
        backup = self._backup(callback)
        if backup is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            saved = self._saved(model, folder)
        for name, shape in saved.items():
            # An optimizer may not be built yet, or may be another one.
            if backup.get(name) != shape and "optimizer" not in name:
                return f"'{name}' of shape {shape}"
        return None

    def _backup(self, callback: Any) -> dict[str, tuple[int, ...]] | None:
        """Names and shapes in the backup that `callback` would restore, or None."""
        raise NotImplementedError

    def _saved(self, model: Model, folder: str) -> dict[str, tuple[int, ...]]:
        """The same of what `model` saves, for which there is a `folder`."""
        raise NotImplementedError


def _shapes(model: Model) -> list[tuple[int, ...] | None]:
    return [_static_shape(weight) for weight in model.weights]


def _holds_config(config: Any, layer: Layer) -> bool:
    """Whether `layer` or its config is anywhere in the config of what holds it."""
    if isinstance(config, (list, tuple)):
        return any(_holds_config(item, layer) for item in config)
    if not isinstance(config, dict):
        return config is layer
    inner, kind = config.get("config"), str(config.get("class_name")).split(">")[-1]
    named = isinstance(inner, dict) and inner.get("name") == layer.name
    if named and kind == type(layer).__name__:
        return True
    return any(_holds_config(item, layer) for item in config.values())


def become(obj: Any, cls: type, attributes: dict[str, Any]) -> None:
    """Gives an object another class and other attributes."""
    object.__setattr__(obj, "__class__", cls)
    obj.__dict__.clear()
    obj.__dict__.update(attributes)


def remember(obj: Any) -> Undo:
    """A function that gives an object its present attributes back.

    What TensorFlow tracks of it is copied: it is changed in place whenever one is assigned.
    """
    before = {
        name: copy.copy(value) if name.startswith("_self_") else value
        for name, value in vars(obj).items()
    }
    return lambda: become(obj, type(obj), before)


def _is_plain_constructor(kind: ModuleType, cls: type) -> bool:
    """Whether `cls` can be made from inputs and outputs, or from a list of layers."""
    constructor = inspect.getattr_static(cls, "__init__")
    return constructor.__module__.startswith(f"{kind.__name__}.")


def _static_shape(value: Any) -> tuple[int, ...] | None:
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def name_of(obj: Any) -> str:
    return getattr(obj, "name", None) or getattr(obj, "_name", None) or type(obj).__name__


def specs_of(inputs: Any) -> Any:
    def spec(tensor: Any) -> tf.TensorSpec:
        return tf.TensorSpec((1, *tuple(tensor.shape)[1:]), tensor.dtype)

    return tf.nest.map_structure(spec, inputs)


def specs_from_shapes(shapes: Any, model: Model) -> Any:
    dtype = getattr(model, "input_dtype", None) or tf.float32

    def build(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {key: build(value) for key, value in shape.items()}
        if isinstance(shape, (list, tuple)) and any(
            isinstance(s, (list, tuple, dict)) for s in shape
        ):
            return [build(s) for s in shape]
        return tf.TensorSpec((1, *tuple(shape)[1:]), dtype)

    return build(shapes)


def unknown_inputs(model: Model) -> str:
    return (
        f"Expected the model '{model.name}' to know the shape of its inputs. Received: a "
        f"{type(model).__name__} that does not. Call it once on a batch, or `build()` it."
    )

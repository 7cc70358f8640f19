"""Copies of models, with their weights and their compile state."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import keras
import tensorflow as tf

from keras_alds._backend.functions import run_as_code
from keras_alds._backend.graphs import Graphs
from keras_alds._backend.layers import (
    Layer,
    Model,
    Optimizer,
    Pairs,
    Variable,
    like,
    static_shape,
)
from keras_alds._backend.quiet import ignored_warnings
from keras_alds._backend.training import Training, has_optimizer_map, is_multi_optimizer


class Cloning(Graphs, Training):
    """Copies of models: the code that Keras 3 and tf_keras share."""

    def copy_model(self, model: Model, *, stacklevel: int = 1) -> Model:
        """A new model of the same class, architecture, weights and compile state.

        Functional and Sequential models are cloned layer by layer, nested models included.
        Subclassed models are copied by `from_config(get_config())`.

        Raises:
            ValueError: If the model or a layer cannot be made from its config.
        """
        if self.is_symbolic(model) and _is_plain_constructor(self.keras, type(model)):
            try:
                copy = self._clone(model)
            except Exception as error:
                raise ValueError(
                    f"A copy of the model '{model.name}' could not be made from the configs of its "
                    f"layers {self.copy_problem(error, self._flatten(model))}. Or compress in "
                    "training with `ALDSCompress`, or in place with `apply_plan`."
                ) from error
            if type(copy) is not type(model):
                copy = type(model)(copy.inputs, copy.outputs, name=model.name)
        else:
            copy = self._copy_subclassed(model)
        pairs = self._weight_pairs(model, copy)
        if pairs is None:
            raise ValueError(
                f"Expected a copy of the model '{model.name}', made from its config, to have the "
                f"same weights. Received: {len(copy.weights)} weights in the copy, "
                f"{len(model.weights)} in the model, or other shapes. Make `get_config()` of "
                f"{type(model).__name__} and of its layers return every constructor argument."
            )
        ours = {id(variable) for variable in model.variables}
        if any(id(variable) in ours for variable in copy.variables):
            raise ValueError(
                f"Expected a copy of the model '{model.name}', made from its config, to have "
                f"weights of its own. Received: a {type(model).__name__} that holds layers of the "
                "model. Let `get_config()` return configs of layers, not the layers."
            )
        values = zip(pairs, model.get_weights(), strict=True)
        values_of = {id(new): value for (_, new), value in values}
        copy.set_weights([values_of[id(weight)] for weight in copy.weights])
        layers = dict.fromkeys(self.pairs_inside(model, copy))
        # Setting `trainable` also sets it for all layers inside, so outer layers come first.
        for old, new in sorted(layers, key=lambda pair: -len(self._flatten(pair[0]))):
            self._copy_layer_state(old, new)
        self.copy_compile_state(model, copy, pairs, stacklevel=stacklevel + 1)
        return copy

    def _weight_pairs(self, model: Model, copy: Model) -> list[tuple[Variable, Variable]] | None:
        """The weights of a model with those of its copy; None if they do not fit."""
        if _shapes(copy) == _shapes(model):
            return [*zip(model.weights, copy.weights, strict=True)]
        try:
            layers = [(model, copy), *self.pairs_inside(model, copy)]
            found = {id(old): (old, new) for pair in layers for old, new in self.own_pairs(*pair)}
            pairs = [found[id(weight)] for weight in model.weights]
        except (KeyError, ValueError):
            return None
        fit = all(static_shape(old) == static_shape(new) for old, new in pairs)
        return pairs if fit and {id(new) for _, new in pairs} == {*map(id, copy.weights)} else None

    def own_pairs(self, layer: Layer, copy: Layer) -> Iterator[tuple[Variable, Variable]]:
        """The weights of a layer, without those of layers inside it, and those of its copy.

        A layer of Keras 3 that is made from the config of a quantized one has them in another
        order.

        Raises:
            ValueError: If there are more or fewer.
        """
        old, new = self.own_variables(layer), self.own_variables(copy)
        if [*map(static_shape, old)] != [*map(static_shape, new)]:
            old, new = (sorted(some, key=lambda weight: weight.name) for some in (old, new))
        return zip(old, new, strict=True)

    def copy_problem(self, error: Exception, layers: Iterable[Layer]) -> str:
        """The end of the message that a copy could not be made, without a full stop.

        Args:
            error: The error.
            layers: The layers of which one may have raised it.
        """
        end = f"Remedy: register your own with `{self.name}.saving.register_keras_serializable`"
        for layer in filter(_is_installed, layers):
            if self.trial(functools.partial(self.copy_layer, layer, {})) is not None:
                end = (
                    f"Received: {type(layer).__name__} of the package {type(layer).__module__}, "
                    "which cannot be made from its config"
                )
        return (
            f"({type(error).__name__}: {error}). Expected serializable layers, functions and "
            f"initializers. {end}"
        )

    def copy_layer(self, layer: Layer, changes: Mapping[str, Any]) -> Layer:
        """A new layer with the config of another one and some changes, without its weights."""
        return type(layer).from_config({**layer.get_config(), **changes})

    def _copy_layer_state(self, old: Layer, new: Layer) -> None:
        """Copies the state of a layer apart from its config and weights."""
        if new.trainable != old.trainable:
            new.trainable = old.trainable
        if hasattr(new, "finalize_state") and new.weights:
            new.finalize_state()  # adapted layers compute with constants derived from the weights
        self.copy_assets(old, new)

    def copy_assets(self, old: Layer, new: Layer) -> None:
        """Copies what an adapted layer saves in files of its own, such as a vocabulary."""
        keeps_assets = getattr(type(old), "load_assets", None) is not getattr(
            self.keras.layers.Layer, "load_assets", None
        )
        if keeps_assets:
            with tempfile.TemporaryDirectory() as folder:  # vocabularies are not weights
                old.save_assets(folder)
                new.load_assets(folder)

    def pairs_inside(self, model: Layer, copy: Layer) -> Iterator[tuple[Layer, Layer]]:
        """The layers at any depth of a model, and those of its copy; shared layers repeatedly.

        Keras clones an input that nested models share once for each of them.
        """
        for old, new in zip(self.children(model), self.children(copy), strict=True):
            yield old, new
            yield from self.pairs_inside(old, new)

    def _flatten(self, layer: Layer) -> list[Layer]:
        return list(layer._flatten_layers(include_self=False))

    def _clone(self, model: Model) -> Model:
        raise NotImplementedError

    def _copy_subclassed(self, model: Model) -> Model:
        try:
            copy = type(model).from_config(model.get_config())
            if copy.built and len(copy.weights) == len(model.weights):
                return copy
            self._trace(copy, model)
        except Exception as error:
            copy = self._built_as_loaded(model)
            if copy is not None:
                return copy
            parts = ", ".join(f"`compress(model.{name}, …)`" for name in self.parts(model))
            raise ValueError(
                f"A copy of the subclassed model '{model.name}' could not be made from its config "
                f"({type(error).__name__}: {error}). Expected `get_config()` of "
                f"{type(model).__name__} to return every constructor argument, and `from_config` "
                "to build the model from them. Remedy: implement both; or create a second instance "
                "yourself and compress it with `apply_plan(instance, plan)`; or compress in "
                "training with `ALDSCompress`, which needs no copy."
                + (f" Or compress a model inside it: {parts}." if parts else "")
            ) from error
        return copy

    def _trace(self, copy: Model, model: Model) -> None:
        """Builds a copy by a call like those of a model."""
        call = tf.function(lambda inputs: copy(inputs, training=False), autograph=False)
        with run_as_code(self.layers_of(copy)):
            call.get_concrete_function(self.input_specs(model))

    def _built_as_loaded(self, model: Model) -> Model | None:
        """A copy that is built as `load_model` builds it, if that makes the same weights.

        None too if the model itself runs on its inputs, as its copy should then.
        """
        with contextlib.suppress(Exception):
            self._trace(model, model)
            return None
        try:
            copy = type(model).from_config(model.get_config())
            if not copy.built:
                copy.build_from_config(model.get_build_config())
            shapes = [[tuple(w.shape) for w in each.weights] for each in (model, copy)]
        except Exception:  # the error of the first attempt says more
            return None
        return copy if shapes[0] == shapes[1] else None

    def copy_compile_state(
        self, model: Model, copy: Model, pairs: Pairs, *, stacklevel: int = 1
    ) -> None:
        """Compiles `copy` like `model`, with a new optimizer, if `model` is compiled.

        Args:
            model: A model, compiled or not.
            copy: A copy of it, possibly with other layers.
            pairs: Pairs of weights of `model` and `copy`, for optimizer settings of single
                weights.
            stacklevel: The frame that a warning names; 1 is the caller of this function.
        """
        if not self.is_compiled(model):
            return
        if type(model).compile is not self.keras.Model.compile:
            config = model.get_compile_config()
            try:
                copy.compile_from_config(config)
            except Exception as error:
                warnings.warn(
                    f"{type(model).__name__} overrides `compile()`, and its compile state could "
                    f"not be copied ({error}): call `compile()` on the new model.",
                    stacklevel=stacklevel + 1,
                )
            return
        arguments = self.compile_arguments(model)
        arguments["optimizer"] = self._copy_optimizer(arguments["optimizer"])
        for name in ("metrics", "weighted_metrics"):
            arguments[name] = self._copy_metrics(arguments[name])
        copy.compile(**arguments)
        self._copy_settings_of_weights(model, copy, list(pairs))

    def compile_arguments(self, model: Model) -> dict[str, Any]:
        """The arguments of a model's `compile`: objects, functions and names, as given."""
        return {**model._compile_config.config, "optimizer": model.optimizer}

    def _copy_optimizer(self, optimizer: Optimizer) -> Optimizer:
        if is_multi_optimizer(optimizer):
            return self._copy_multi_optimizer(optimizer)
        # A schedule has no state, so both optimizers share it, even if it is not serializable.
        inner = self.inner_optimizer(optimizer) or optimizer
        schedule = getattr(inner, "_learning_rate", None)
        if not isinstance(schedule, self.keras.optimizers.schedules.LearningRateSchedule):
            return _copy_config(optimizer)
        any_schedule = self.keras.optimizers.schedules.ExponentialDecay(1.0, 1, 1.0)
        plain = like(inner, _learning_rate=any_schedule)
        if optimizer is inner:
            copy = _copy_config(plain)
        else:
            held = {name: plain for name, value in vars(optimizer).items() if value is inner}
            copy = _copy_config(like(optimizer, **held))
        (self.inner_optimizer(copy) or copy)._learning_rate = schedule
        return copy

    def _copy_multi_optimizer(self, optimizer: Optimizer) -> Optimizer:
        # Its config would need a function that Keras can read back, and share no optimizer.
        copies = {inner: self._copy_optimizer(inner) for inner in self.inner_optimizers(optimizer)}
        choose = optimizer._optimizer_map

        def copied(inner: Optimizer) -> Optimizer:
            if inner not in copies:
                copies[inner] = self._copy_optimizer(inner)
            return copies[inner]

        if has_optimizer_map(optimizer):
            new: Any = keras.optimizers.OptimizerMap(copied(choose.default_optimizer))
            for path in choose:
                new[path] = copied(choose._optimizer_map[path])
        else:

            def new(variable: Variable) -> Optimizer:
                return copied(choose(variable))

        factor = optimizer.loss_scale_factor
        copy = type(optimizer)(new, loss_scale_factor=factor, name=optimizer.name)
        copy._inner_optimizers[:] = copies.values()  # in the same order
        return copy

    def _copy_settings_of_weights(
        self, model: Model, copy: Model, pairs: list[tuple[Variable, Variable]]
    ) -> None:
        for old, new in pairs:
            self.assign_like(copy.optimizer, old, [new], model.optimizer)
        # An optimizer's config lacks these: name patterns, and keys of variables.
        theirs, ours = (self.inner_optimizers(m.optimizer) or [m.optimizer] for m in (model, copy))
        for old, new in zip(theirs, ours, strict=True):
            for name in ("_exclude_from_weight_decay_pattern", "_exclude_from_weight_decay_names"):
                if getattr(old, name, None):
                    setattr(new, name, getattr(old, name))
            for old_weight, new_weight in pairs:
                if self.is_excluded_from_weight_decay(old, old_weight):
                    self.exclude_from_weight_decay(new, [new_weight])

    def _copy_metrics(self, metrics: Any) -> Any:
        # Metric objects have state; names and functions do not.
        if isinstance(metrics, self.keras.metrics.Metric):
            return _copy_config(metrics)
        if isinstance(metrics, dict):
            return {key: self._copy_metrics(value) for key, value in metrics.items()}
        if isinstance(metrics, (list, tuple)):
            return [self._copy_metrics(value) for value in metrics]
        return metrics

    def saves(self, holder: Layer, layers: Collection[Layer]) -> bool:
        """Whether saving `holder` also saves the configs of `layers` inside it.

        This holds for classes of Keras and this package, and for others whose config contains those
        of the layers. All other classes create the layers again in their code.
        """
        cls = type(holder)
        if cls.__module__.startswith((f"{self.keras.__name__}.", "keras_alds.")):
            return True
        if cls.get_config in (self.keras.Model.get_config, self.keras.layers.Layer.get_config):
            return False  # at most the arguments of its constructor
        try:
            config = holder.get_config()
        except Exception:  # custom code
            return False
        return all(_holds_config(config, layer) for layer in layers)

    def can_construct(self, model: Model) -> bool:
        """Whether the class of a symbolic model can be constructed from inputs and outputs."""
        return _is_plain_constructor(self.keras, type(model))


class Keras3Cloning(Cloning):
    """The implementation for Keras 3."""

    def _copy_layer_state(self, old: Layer, new: Layer) -> None:
        super()._copy_layer_state(old, new)
        if isinstance(old, keras.layers.InputLayer):  # Keras's copies are dense and not optional
            for name in ("sparse", "ragged", "optional"):  # those that this Keras has
                if hasattr(old, name):
                    setattr(new, name, getattr(old, name))
            for name in ("_sparse", "_ragged", "_ragged_rank"):
                if hasattr(old.output, name):
                    setattr(new.output, name, getattr(old.output, name))
        if old.trainable:  # single variables can still be frozen
            for theirs, ours in self.own_pairs(old, new):
                self.copy_trainable(theirs, ours)

    def _clone(self, model: Model) -> Model:
        # Keras would try to copy the compile state, which `copy_compile_state` does.
        model = like(model, compiled=False)
        with ignored_warnings():
            return keras.models.clone_model(model, recursive=True, clone_function=_clone_layer)

    def copy_layer(self, layer: Layer, changes: Mapping[str, Any]) -> Layer:
        """As for `Cloning`. Functions that cannot be read back are shared."""
        with ignored_warnings():
            return _clone_layer(layer, changes)


class TfKerasCloning(Cloning):
    """The implementation for tf_keras."""

    def _clone(self, model: Model) -> Model:
        return self.keras.models.clone_model(model)

    def compile_arguments(self, model: Model) -> dict[str, Any]:
        arguments = super().compile_arguments(model)
        # Both may be set after `compile`.
        return {**arguments, "run_eagerly": model.run_eagerly, "jit_compile": model.jit_compile}


def _copy_config(obj: Any) -> Any:
    return type(obj).from_config(obj.get_config())


def _is_installed(layer: Layer) -> bool:
    """Whether the class of a layer comes from a package that is neither Keras nor this one."""
    module = type(layer).__module__
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    folders = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    known = ("keras", "tf_keras", "tensorflow", "keras_alds")
    return file.startswith(folders) and module.split(".")[0] not in known


def _shapes(model: Model) -> list[tuple[int | None, ...] | None]:
    return [static_shape(weight) for weight in model.weights]


def _holds_config(config: Any, layer: Layer) -> bool:
    """Whether `config` contains `layer` or its config at any depth."""
    if isinstance(config, (list, tuple)):
        return any(_holds_config(item, layer) for item in config)
    if not isinstance(config, dict):
        return config is layer
    inner, kind = config.get("config"), str(config.get("class_name")).split(">")[-1]
    named = isinstance(inner, dict) and inner.get("name") == layer.name
    if named and kind == type(layer).__name__:
        return True
    return any(_holds_config(item, layer) for item in config.values())


def _is_plain_constructor(kind: ModuleType, cls: type) -> bool:
    """Whether `cls` can be constructed from inputs and outputs, or from a list of layers."""
    constructor = inspect.getattr_static(cls, "__init__")
    return constructor.__module__.startswith(f"{kind.__name__}.")


def _clone_layer(layer: Layer, changes: Mapping[str, Any] = MappingProxyType({})) -> Layer:
    # Functions and objects that Keras cannot read back from a config (lambdas, unregistered ones)
    # have no state, so both layers share them.
    config = layer.get_config()
    if isinstance(layer, keras.layers.Lambda):
        arguments = {key: config[key] for key in ("name", "trainable", "dtype")}
        return type(layer)(
            layer.function,
            layer._output_shape,
            layer.mask,
            layer.arguments,
            **{**arguments, **changes},
        )
    for name in config:
        value = vars(layer).get(name)
        if callable(value) and not isinstance(value, (keras.layers.Layer, type)):
            config[name] = value
    return type(layer).from_config({**config, **changes})

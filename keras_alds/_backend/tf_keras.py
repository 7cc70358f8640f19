"""tf_keras, that is Keras 2 on TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_alds._backend.base import (
    Backend,
    GraphCall,
    Layer,
    Model,
    Optimizer,
    Undo,
    Variable,
    name_of,
    remember,
    specs_from_shapes,
    specs_of,
    unknown_inputs,
)


@functools.cache
def _plain_convolutions_train() -> bool:
    """Whether grouped convolutions have a gradient: on CPUs only with oneDNN, which may be off."""
    kernel = tf.ones((1, 1, 1, 2))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        try:
            outputs = tf.nn.conv2d(tf.ones((1, 2, 2, 2)), kernel, 1, "VALID")
            return tape.gradient(outputs, kernel) is not None
        except tf.errors.OpError:
            return False


class TfKeras(Backend):
    name = "tf_keras"
    _identity = (
        "_inbound_nodes_value",
        "_outbound_nodes_value",
        "_name",
        "_callable_losses",
        "_losses",
        "_build_input_shape",
        "_saved_model_inputs_spec",
        "_saved_model_arg_spec",
    )
    _not_slots = ("_variables", "_weights")

    def __init__(self) -> None:
        self.keras = sys.modules["tf_keras"]

    def value(self, variable: Variable) -> np.ndarray:
        return np.asarray(variable)

    def use_plain_convolutions(self, layers: Sequence[Layer]) -> None:
        if not _plain_convolutions_train():
            return
        for layer in layers:
            if getattr(layer, "groups", 1) > 1 and hasattr(layer, "_jit_compiled_convolution_op"):
                layer._jit_compiled_convolution_op = layer.convolution_op

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        return tf.name_scope(getattr(layer, "scope", layer.name))

    def renew_bidirectional(self, layer: Layer) -> Undo:
        # It makes both of its layers from the config of the one that it was given, and saves that.
        forward, backward = layer.forward_layer, layer.backward_layer
        given = type(forward).from_config({**forward.get_config(), "name": layer.layer.name})
        config = self.keras.saving.serialize_keras_object(backward)
        config["config"]["name"] = backward.name.removeprefix("backward_")
        return self.adopt(layer, type(layer), {"layer": given, "_backward_layer_config": config})

    def own_variables(self, layer: Layer) -> list[Variable]:
        own = [*layer._trainable_weights, *layer._non_trainable_weights]
        return [v for v in own if hasattr(v, "shape")]  # vocabularies are listed there too

    def is_compiled(self, model: Model) -> bool:
        return bool(model._is_compiled)

    def input_specs(self, model: Model) -> Any:
        if self.is_symbolic(model) and model.inputs:
            return specs_of(model.input)
        spec = model.save_spec() if hasattr(model, "save_spec") else None
        if spec is not None:
            (inputs,), _ = spec
            return specs_of(inputs)
        shapes = getattr(model, "_build_input_shape", None)
        if shapes is None:
            raise ValueError(unknown_inputs(model))
        return specs_from_shapes(shapes, model)

    _takes_training = "_expects_training_arg"

    def graph_ends(self, model: Model) -> tuple[Any, Any]:
        return model._nested_inputs, model._nested_outputs

    def graph_inputs(self, model: Model, inputs: Any) -> list[Any]:
        flat = model._flatten_to_reference_inputs(inputs)
        return [
            model._conform_to_reference_input(tensor, ref_input=reference)
            for tensor, reference in zip(flat, model.inputs, strict=True)
        ]

    def _graph_call(self, node: Any) -> GraphCall:
        outputs = tf.nest.flatten(node.outputs)
        return GraphCall(node.layer, tuple(node.call_args), dict(node.call_kwargs), outputs)

    def _clone(self, model: Model) -> Model:
        return self.keras.models.clone_model(model)

    def _compile_arguments(self, model: Model) -> dict[str, Any]:
        return {
            **model._get_compile_args(),
            "run_eagerly": model._run_eagerly,
            "steps_per_execution": int(model._steps_per_execution.numpy()),
            "jit_compile": model._jit_compile,
        }

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        delattr(new, name)
        setattr(new, name, variable)

    def _losses_of(self, old: Layer, new: Layer) -> dict[str, Any]:
        # Layers hold functions: those of weights come with the weights, others stay.
        held = {id(variable) for variable in self.own_variables(new)}
        losses = [
            loss
            for layer in (old, new)
            for loss in layer._callable_losses
            if (weight := _regularized(loss)) is None or id(weight) in held
        ]
        return {"_callable_losses": losses}

    def _forget_checkpoint(self, callback: Any) -> None:
        callback.best = np.inf if callback.monitor_op is np.less else -np.inf

    def _backup(self, callback: Any) -> dict[str, tuple[int, ...]] | None:
        latest = tf.train.latest_checkpoint(os.path.join(callback.backup_dir, "chief"))
        return None if latest is None else _variables(latest)

    def _saved(self, model: Model, folder: str) -> dict[str, tuple[int, ...]]:
        path = tf.train.Checkpoint(model=model).write(os.path.join(folder, "model"))
        for optimizer in self.optimizers(model):
            _forget_children(optimizer)
        return _variables(path)

    def _optimizer_classes(self) -> tuple[type, ...]:
        optimizers = self.keras.optimizers
        return (optimizers.Optimizer, optimizers.legacy.Optimizer)

    def _is_legacy(self, optimizer: Optimizer) -> bool:
        return isinstance(optimizer, self.keras.optimizers.legacy.Optimizer)

    def inner_optimizer(self, optimizer: Optimizer) -> Optimizer | None:
        if hasattr(type(optimizer), "inner_optimizer"):
            return optimizer.inner_optimizer
        return None

    def is_optimizer_built(self, optimizer: Optimizer) -> bool:
        if self.inner_optimizer(optimizer) is not None:
            return False  # a wrapper holds no per-variable state: its inner optimizer does
        if self._is_legacy(optimizer):
            return bool(optimizer._slots)
        return bool(getattr(optimizer, "_built", False))

    def learning_rate(self, optimizer: Optimizer) -> float:
        inner = self.inner_optimizer(optimizer) or optimizer
        # For a schedule `learning_rate` is the rate of the last step that this optimizer made.
        rate = getattr(inner, "_learning_rate", inner.learning_rate)
        return float(rate(inner.iterations) if callable(rate) else rate)

    def set_learning_rate(self, optimizer: Optimizer, rate: float) -> None:
        inner = self.inner_optimizer(optimizer) or optimizer
        if self._is_legacy(inner):
            inner._hyper["learning_rate"] = rate
        else:
            inner._learning_rate = inner._build_learning_rate(rate)

    def optimizer_targets(self, optimizer: Optimizer, known: list[Variable]) -> list[Variable]:
        if self._is_legacy(optimizer):
            return [v for v in known if optimizer._slots.get(_legacy_key(v))]
        by_key = {optimizer._var_key(v): v for v in known}
        keys = sorted(optimizer._index_dict, key=optimizer._index_dict.get)
        if not all(key in by_key for key in keys):
            raise ValueError(
                f"Expected the optimizer '{name_of(optimizer)}' to update only variables that the "
                f"model holds. Received: one that was also built on {len(set(keys) - set(by_key))} "
                "others, and tf_keras does not keep them. Give each its own optimizer."
            )
        return [by_key[key] for key in keys]

    def slots(
        self, optimizer: Optimizer, targets: list[Variable]
    ) -> dict[str, list[Variable | None]]:
        if not self._is_legacy(optimizer):
            return super().slots(optimizer, targets)
        return {
            name: [optimizer._slots.get(_legacy_key(v), {}).get(name) for v in targets]
            for name in optimizer.get_slot_names()
        }

    def rebuild_optimizer(
        self,
        optimizer: Optimizer,
        old: list[Variable],
        new: list[Variable],
        undo_steps: list[Undo],
    ) -> None:
        if self._is_legacy(optimizer):
            return self._rebuild_legacy(optimizer, old, new, undo_steps)
        undo_steps.append(remember(optimizer))
        _forget_children(optimizer)
        dropped = {id(v) for slot in self.slots(optimizer, old).values() for v in slot}
        scalars = {
            name: value
            for name, value in vars(optimizer).items()
            if isinstance(value, tf.Variable) and value.shape.rank == 0
        }
        optimizer._variables = [v for v in optimizer._variables if id(v) not in dropped]
        optimizer._built = False
        optimizer.build(new)
        for name, value in scalars.items():
            if getattr(optimizer, name) is not value:
                getattr(optimizer, name).assign(value)

    def _rebuild_legacy(
        self,
        optimizer: Optimizer,
        old: list[Variable],
        new: list[Variable],
        undo_steps: list[Undo],
    ) -> None:
        slots, weights = dict(optimizer._slots), list(optimizer._weights)

        def undo() -> None:
            optimizer._slots.clear()
            optimizer._slots.update(slots)
            optimizer._weights = weights

        undo_steps.append(undo)
        dropped: set[int] = set()
        for variable in old:  # all of them: a loaded model reads its state by their order
            dropped.update(map(id, optimizer._slots.pop(_legacy_key(variable), {}).values()))
        optimizer._weights = [w for w in weights if id(w) not in dropped]
        optimizer._create_all_weights(new)


def _variables(checkpoint: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in tf.train.list_variables(checkpoint)}


def _forget_children(optimizer: Optimizer) -> None:
    # What an optimizer saved in its first checkpoint it goes on saving.
    optimizer.__dict__.pop("_coalesced_children", None)


def _legacy_key(variable: Variable) -> str:
    return getattr(variable, "_unique_id", None) or variable.name


def _regularized(loss: Callable[..., Any]) -> Variable | None:
    """The weight whose regularizer a loss of a layer is, or None."""
    (inner,) = loss.args if isinstance(loss, functools.partial) else (None,)
    if not isinstance(inner, functools.partial) or inner.func.__name__ != "_loss_for_variable":
        return None
    return inner.args[0]

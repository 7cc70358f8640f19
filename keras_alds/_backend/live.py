"""What is alive in the process and may hold a layer: other models, optimizers, traced functions.

A layer may belong to several models, and Keras keeps no list of them. Python's garbage collector
knows every object.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.graphs import forget_graph
from keras_alds._backend.layers import Layer, Model, Optimizer, Undo, Variable

_FUNCTION = tf.types.experimental.PolymorphicFunction
_CONCRETE = tf.types.experimental.ConcreteFunction
_TABLES = (
    tf.lookup.StaticHashTable,
    tf.lookup.experimental.MutableHashTable,
    tf.lookup.experimental.DenseHashTable,
)


def live(*kinds: type) -> list[Any]:
    """Every live object of some classes.

    A process that has imported TensorFlow holds about 400,000 objects. This takes 0.1 to 0.2 s.
    """
    frozen = gc.get_freeze_count()
    if frozen:  # `get_objects` leaves frozen objects out
        gc.unfreeze()
        gc.collect()  # garbage that is frozen again would stay for good
    try:
        objects = gc.get_objects()
    finally:
        if frozen:
            gc.freeze()
    # `isinstance` would run the code of proxies and of modules that load when they are used.
    found = {cls for cls in set(map(type, objects)) if issubclass(cls, kinds)}
    return [item for item in objects if type(item) in found]


@dataclasses.dataclass(frozen=True)
class Holders:
    """All that may hold a layer or its weights.

    Attributes:
        layers: Every live layer and model with its variables. A given model comes first.
        optimizers: Every live optimizer.
        functions: Every live `tf.function` and concrete function.
    """

    layers: dict[Layer, list[Variable]]
    optimizers: list[Optimizer]
    functions: list[Any]

    @classmethod
    def of(cls, backend: _backend.Backend, model: Model) -> Holders:
        """What is alive now, of the Keras that `model` belongs to."""
        layer, optimizers = backend.keras.layers.Layer, backend.optimizer_classes()
        found = live(layer, *optimizers, _FUNCTION, _CONCRETE)
        layers = [model, *(i for i in found if isinstance(i, layer) and not backend.is_spent(i))]
        return cls(
            {layer: variables_of(layer) for layer in layers},
            [item for item in found if isinstance(item, optimizers) and _is_whole(backend, item)],
            [item for item in found if isinstance(item, (_FUNCTION, _CONCRETE))],
        )

    @classmethod
    def inside(cls, backend: _backend.Backend, model: Model) -> Holders:
        """The layers and optimizers of a model that was just made, and functions that read it.

        Functions are looked for only if something reads it: that takes longer than all the rest.
        """
        layers = dict.fromkeys([model, *model._flatten_layers(include_self=False)])
        found = {layer: variables_of(layer) for layer in layers}
        read = are_read(variable for held in found.values() for variable in held)
        functions = live(_FUNCTION, _CONCRETE) if read else []
        return cls(found, backend.optimizers(model), functions)

    def holding(self, variables: Iterable[Variable], but: Collection[Layer] = ()) -> list[Layer]:
        """The layers that held one of some variables, each before those that hold it.

        Args:
            variables: The variables.
            but: Layers to leave out.
        """
        wanted = set(map(id, variables))
        found = [
            (len(held), layer)
            for layer, held in self.layers.items()
            if layer not in but and not wanted.isdisjoint(map(id, held))
        ]
        return [layer for _, layer in sorted(found, key=lambda item: item[0])]

    def forget_graphs(self, gone: list[Variable], undo: list[Undo]) -> None:
        """Drops the graphs that read variables which are gone; their functions trace again.

        A concrete function has one graph only. From now on it raises an error.

        Args:
            gone: The variables.
            undo: A list to which functions are appended that restore the graphs.
        """
        handles = {id(handle) for variable in gone for handle in _handles(variable)}

        # Not `captured_inputs`, which also calls functions that make inputs of each call, such as
        # the keys of collective operations. All workers have to use equally many of these.
        def is_stale(function: Any) -> bool:
            return any(id(tensor) in handles for tensor in function._captured_inputs)

        for function in self.functions:
            if isinstance(function, _CONCRETE):
                if is_stale(function):
                    undo.append(_refuse(function))
            elif any(is_stale(graph) for graph in function._function_cache.values()):
                undo.append(forget_graph(function))


def live_tables(function: Any) -> list[Any]:
    """The lookup tables that a concrete function reads, which it does not keep itself."""
    handles = set(map(id, function._captured_inputs))
    if handles <= {id(handle) for variable in function.variables for handle in _handles(variable)}:
        return []
    return [table for table in live(*_TABLES) if id(table.resource_handle) in handles]


def live_variables() -> list[Any]:
    """Every live variable of TensorFlow, also those that no layer holds."""
    return live(tf.Variable)


def variables_of(layer: Layer) -> list[Variable]:
    """The variables of a layer; none if its constructor failed, or its own code does."""
    try:
        return [variable for variable in layer.variables if hasattr(variable, "shape")]
    except Exception:  # custom code
        return []


def are_read(variables: Iterable[Variable]) -> bool:
    """Whether anything but the variables themselves refers to their handles, as graphs do."""
    unread = max(_references(tf.Variable(0.0)))
    held = [*variables]

    def found() -> bool:
        return any(max(_references(variable)) > unread for variable in held)

    try:
        if not found():
            return False
        gc.collect(1)  # the young: tf_keras drops graphs that it made for the shapes of outputs
        return found()
    except AttributeError:  # a variable without one handle, such as one in shards
        return True


def assigned_in(graph: Any) -> Callable[[Variable], bool]:
    """A function that says whether a traced graph assigns to a variable."""
    assigning = ("Assign", "ResourceScatter", "ResourceStridedSliceAssign")
    targets = {id(op.inputs[0]) for op in graph.get_operations() if op.type.startswith(assigning)}
    handles = {id(handle) for handle, inside in graph.captures if id(inside) in targets}
    return lambda variable: not handles.isdisjoint(map(id, _handles(variable)))


def _references(variable: Variable) -> list[int]:
    return [sys.getrefcount(handle) for handle in _handles(variable)]


def retire(variables: list[Variable]) -> bool:
    """Lets nothing compute with variables that were replaced.

    Functions trace again; graphs that cannot be made again fail.

    Args:
        variables: Variables of layers that were just made.

    Returns:
        Whether there are such graphs.
    """
    # Nothing reads those that Keras 3 has not initialized yet. States of seeds go on.
    there = [
        v
        for v in variables
        if tf.as_dtype(v.dtype).is_floating and all(hasattr(part, "handle") for part in _parts(v))
    ]
    if not are_read(there):
        return False
    Holders({}, [], live(_FUNCTION)).forget_graphs(there, [])
    gc.collect()  # the graphs that were only theirs
    fail: list[Undo] = []
    Holders({}, [], live(_CONCRETE)).forget_graphs(there, fail)
    with tf.init_scope():  # the user's code may build layers in a graph
        for variable in there:
            empty(variable)
    return bool(fail)


def empty(variable: Variable) -> Undo:
    """Replaces the value of a variable by one number, NaN, whatever its shape.

    So its memory is free, and graphs that still read it fail: no product takes such a kernel.

    Returns:
        A function that restores the value.
    """
    before = []
    for part in _parts(variable):
        value = tf.raw_ops.ReadVariableOp(resource=part.handle, dtype=part.dtype)
        before.append((part.handle, value))
        _assign(part.handle, tf.constant(np.nan, part.dtype))

    def undo() -> None:
        for handle, value in before:
            _assign(handle, value)

    return undo


def _assign(handle: Any, value: Any) -> None:
    tf.raw_ops.AssignVariableOp(resource=handle, value=value, validate_shape=False)


def _handles(variable: Variable) -> list[Any]:
    """What graphs know a variable by: one tensor, or one per replica."""
    return [part.handle for part in _parts(variable)]


def _parts(variable: Variable) -> list[Any]:
    """The variables of TensorFlow that a variable is: one, or one per replica."""
    if isinstance(variable, keras.Variable):
        variable = variable._value  # `value` is a cast copy where a layer runs in mixed precision
    return list(getattr(variable, "values", [variable]))


def _refuse(function: Any) -> Undo:
    """Makes a concrete function raise an error when it is called."""
    kind = type(function)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "Expected a concrete function of the model as it is now. Received: "
            f"'{self.name.decode()}', whose graph computes with weights that a compression has "
            "replaced since. Call `get_concrete_function` of its `tf.function` again."
        )

    function.__class__ = type("Stale", (kind,), {"__call__": refuse})
    return lambda: setattr(function, "__class__", kind)


def _is_whole(backend: _backend.Backend, optimizer: Optimizer) -> bool:
    """Whether an optimizer's constructor came to its end; a traceback may hold one where not."""
    try:
        backend.inner_optimizer(optimizer)
        backend.is_optimizer_built(optimizer)
    except AttributeError:
        return False
    return True

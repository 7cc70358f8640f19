"""A model as a list of steps, so that parts of it can be run again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from keras_alds import _backend
from keras_alds._backend import tensors as nest
from keras_alds._backend.calls import Replacement, replaced_calls
from keras_alds._backend.graphs import mask_of, set_mask
from keras_alds._backend.layers import static_shape
from keras_alds._backend.loops import restored, states_of
from keras_alds.kinds.base import below, running, stock_kind


@dataclasses.dataclass(frozen=True)
class Slot:
    """A placeholder for a tensor in the arguments of a step."""

    tensor: int


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One call of a layer, or of a whole subclassed model.

    Attributes:
        layer: The layer or model.
        args: Its arguments, with `Slot`s in place of tensors.
        kwargs: Its keyword arguments, likewise.
        inputs: The tensors among the arguments.
        outputs: The tensors that it returns.
        inside: The layers to compress that it runs.
    """

    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    inside: frozenset[Any]


class Program:
    """The steps of a model in topological order, with the steps of nested models.

    A Functional or Sequential model has a step for each call of a layer. Any other model, and a
    custom layer, is a single step.

    Args:
        model: A built model.
        layers: The layers that are of interest; see `Step.inside`.

    Attributes:
        model: The model.
        steps: The steps.
        inputs: Its input tensors.
        outputs: Its output tensors; none before `from_code` has run.
        shapes: The shapes of its tensors in a graph, as far as it knows them.
    """

    def __init__(self, model: Any, layers: Sequence[Any]) -> None:
        self._backend = _backend.backend_of(model)
        self._wanted = frozenset(layers)
        self._inside: dict[Any, frozenset[Any]] = {}
        self._states: dict[Any, list[Any]] = {}
        self._tensors = 0
        self.model = model
        self.steps: list[Step] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.shapes: dict[int, tuple[int | None, ...] | None] = {}
        # The steps that take the masks of tensors away, as attention layers of Keras 3 do.
        self._unmasked: dict[int, int] = {}

    @classmethod
    def of(cls, model: Any, layers: Sequence[Any], batch: Any) -> Program:
        """Reads a model, which is called on batches like the given one."""
        program = cls(model, layers)
        if program._backend.runs_graph(model):
            program.from_graph()
        else:
            program.from_code(batch)
        return program

    def flat_inputs(self, batch: Any) -> list[Any]:
        """The input tensors of a batch, in the order of `inputs`."""
        if self._backend.runs_graph(self.model):
            return self._backend.graph_inputs(self.model, batch)
        return nest.flatten(batch)

    def call(
        self,
        step: Step,
        value: Callable[[int], Any],
        watching: Mapping[Any, Replacement] | None = None,
        standing: Iterable[contextlib.AbstractContextManager[Any]] = (),
    ) -> list[Any]:
        """What a step returns, flattened.

        Args:
            step: The step.
            value: Returns the value of a tensor.
            watching: More replacements of calls.
            standing: Contexts in which layers compute something else; see `KernelKind`.
        """
        values = {tensor: value(tensor) for tensor in step.inputs}
        args, kwargs = nest.map_structure(
            lambda leaf: values[leaf.tensor] if is_slot(leaf) else leaf, (step.args, step.kwargs)
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(restored(self._states_of(step.layer)))
            stack.enter_context(replaced_calls(self._running, watching or {}))
            for context in standing:
                stack.enter_context(context)
            stack.enter_context(self._masks_kept(step, values))
            found = nest.flatten(self._backend.infer(step.layer, args, kwargs))
        # Of a distribution, tf_keras notes two outputs in the graph.
        return [*found, *found[-1:] * (len(step.outputs) - len(found))]

    @contextlib.contextmanager
    def _masks_kept(self, step: Step, values: Mapping[int, Any]) -> Iterator[None]:
        """Lets a step see the masks that it sees in the model, however often it runs.

        Only the steps after one that takes a mask away do without the mask.
        """
        number = self._numbers.get(id(step), 0)
        masks = {tensor: mask_of(x) for tensor, x in values.items()}
        masks = {tensor: mask for tensor, mask in masks.items() if mask is not None}
        for tensor in masks:
            if self._unmasked.get(tensor, number) < number:
                set_mask(values[tensor], None)
        try:
            yield
        finally:
            for tensor, mask in masks.items():
                if mask_of(values[tensor]) is None:
                    self._unmasked.setdefault(tensor, number)
                    set_mask(values[tensor], mask)

    # Not needed where only the graph is read.

    @functools.cached_property
    def _running(self) -> dict[Any, Replacement]:
        return running(self.model)

    def _states_of(self, layer: Any) -> list[Any]:
        """What a call changes, so that another call with the same inputs would differ."""
        if not isinstance(layer, self._backend.keras.layers.Layer):
            return []
        if layer not in self._states:
            self._states[layer] = [*states_of(layer), *self._backend.seeds(layer)]
        return self._states[layer]

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(step): number for number, step in enumerate(self.steps)}

    def from_graph(self) -> None:
        """Reads the graph of a symbolic model."""
        self.inputs = self._new(len(nest.flatten(self._backend.graph_ends(self.model)[0])))
        self.outputs = self._read(self.model, self.inputs)

    def from_code(self, structure: Any) -> None:
        """Takes the whole model as one step, called on a structure of inputs."""
        self.inputs = self._new(len(nest.flatten(structure)))
        slots = nest.pack_sequence_as(structure, [Slot(tensor) for tensor in self.inputs])
        self.steps = [Step(self.model, (slots,), {}, tuple(self.inputs), (), self._wanted)]

    def _new(self, count: int) -> list[int]:
        self._tensors += count
        return list(range(self._tensors - count, self._tensors))

    def _read(self, model: Any, inputs: Sequence[int]) -> list[int]:
        backend = self._backend
        starts, ends = map(nest.flatten, backend.graph_ends(model))
        for index, tensor in zip(inputs, starts, strict=True):
            self.shapes.setdefault(index, _shape_of(tensor))
        known = {
            id(tensor): self._cast(index, tensor)
            for tensor, index in zip(starts, inputs, strict=True)
        }
        for call in backend.graph(model):
            if isinstance(call.layer, backend.keras.layers.InputLayer):
                continue
            args, kwargs = _with_slots((call.args, backend.inference_arguments(call)), known)
            used = [leaf.tensor for leaf in nest.flatten((args, kwargs)) if is_slot(leaf)]
            first = nest.flatten(args[0]) if args else []
            if (
                backend.runs_graph(call.layer)
                and not kwargs.get("training")
                and not any(map(is_slot, nest.flatten((args[1:], kwargs))))
                and len(first) == len(nest.flatten(backend.graph_ends(call.layer)[0]))
                and all(map(is_slot, first))
            ):
                outputs = self._read(call.layer, used)
            else:
                outputs = self._new(len(call.outputs))
                self.shapes.update(zip(outputs, map(_shape_of, call.outputs), strict=True))
                self.steps.append(
                    Step(
                        call.layer,
                        tuple(args),
                        kwargs,
                        tuple(used),
                        tuple(outputs),
                        self._candidates_in(call.layer),
                    )
                )
            known.update(zip(map(id, call.outputs), outputs, strict=True))
        return [known[id(tensor)] for tensor in ends]

    def _cast(self, index: int, tensor: Any) -> int:
        """Adds a cast to the dtype of the model's input, as models do when called."""
        (output,) = self._new(1)
        self.shapes[output] = self.shapes[index]

        def cast(value: Any) -> Any:
            return nest.cast(value, tensor.dtype) if nest.is_dense(value) else value

        step = Step(cast, (Slot(index),), {}, (index,), (output,), frozenset())
        self.steps.append(step)
        return output

    def _candidates_in(self, layer: Any) -> frozenset[Any]:
        if not isinstance(layer, self._backend.keras.layers.Layer):
            return frozenset()
        if layer not in self._inside:
            inside = [layer, *below(layer)]
            kernels = [k for inner in inside for k in stock_kind(inner).kernels(inner).values()]
            self._inside[layer] = self._wanted.intersection([*inside, *kernels])
        return self._inside[layer]


def _with_slots(value: Any, known: Mapping[int, int]) -> Any:
    """A structure of arguments with `Slot`s in place of the known tensors, given by `id`."""
    # `map_structure` is much slower, so plain containers are made here.
    if type(value) in (tuple, list):
        return type(value)(_with_slots(item, known) for item in value)
    if type(value) is dict:
        return {name: _with_slots(item, known) for name, item in value.items()}
    if nest.is_nested(value):
        return nest.map_structure(lambda leaf: _with_slots(leaf, known), value)
    return Slot(known[id(value)]) if id(value) in known else value


def is_slot(leaf: Any) -> bool:
    """Whether a leaf of a step's arguments stands for a tensor."""
    return isinstance(leaf, Slot)


def _shape_of(tensor: Any) -> tuple[int | None, ...] | None:
    """The shape of a symbolic tensor, or None if not even its number of axes is known."""
    try:
        return static_shape(tensor)
    except ValueError:
        return None

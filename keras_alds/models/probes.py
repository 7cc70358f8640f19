"""Runs a model with other kernels, and measures what that does to its outputs.

Every layer's error is measured at the layer. What it does to the output differs by a factor of a
thousand between layers, and is not linear. So each layer alone is computed with approximations of
its kernel, on held-out examples, and the divergence of the outputs is measured (`Reference`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds._backend import layers_of
from keras_alds._backend import tensors as nest
from keras_alds._backend.calls import replacements_of
from keras_alds._backend.graphs import mask_of, set_mask
from keras_alds._backend.loops import Traced, passing, restored
from keras_alds.core.slicing import Array
from keras_alds.kinds.base import known_kind
from keras_alds.models.outputs import Reference, differing, joined
from keras_alds.models.program import Program

# How many graphs are made of a model, each from another step to its end.
_MOST_TAILS, _FEWEST_IN_A_TAIL = 4, 8

#: New kernels by layer, in the shapes of the layers' own.
Kernels = Mapping[Any, Array]


class Prober:
    """Runs a model on a few examples again and again, each time with some kernels replaced.

    It runs as a graph, from the last of a few steps that is not after a replaced kernel.

    Args:
        model: A built model.
        layers: The layers whose kernels may be replaced.
        batches: Batches of inputs.
        keep: Whether to keep what is computed before some of the steps. This takes memory.
            Defaults to True.

    Attributes:
        reference: The model's own outputs.
    """

    def __init__(
        self, model: Any, layers: Iterable[Any], batches: Sequence[Any], *, keep: bool = True
    ) -> None:
        self._model, layers = model, list(layers)
        self._program = Program.of(model, layers, batches[0])
        self._steps = self._program.steps
        numbers = reversed(range(len(self._steps)))
        first = {layer: number for number in numbers for layer in self._steps[number].inside}
        self._first = {layer: first.get(layer) for layer in layers}
        starts = sorted(set(first.values())) if keep else []
        count = min(_MOST_TAILS, len(starts) // _FEWEST_IN_A_TAIL)
        cuts = sorted({0, *(starts[len(starts) * n // count] for n in range(1, count))})
        self._tails = {cut: _Tail(self._program, cut, self._first) for cut in cuts}
        needed = {tensor for tail in self._tails.values() for tensor in tail.inputs}
        self._own: list[list[list[Array]]] = []
        self._kept: list[dict[int, Any]] = []
        with passing(model):
            for batch in batches:
                outputs, kept = self._run(batch, needed)
                self._own.append(outputs)
                self._kept.append(kept)
            again, _ = self._run(batches[0], ())
        random = differing(_joined(self._own[:1]), _joined([again]))
        self.reference = Reference(model, _joined(self._own), random)

    def _run(self, batch: Any, needed: Collection[int]) -> tuple[list[list[Array]], dict[int, Any]]:
        """The model's own outputs for a batch, and the tensors that are needed."""
        flat = self._program.flat_inputs(batch)
        values = dict(zip(self._program.inputs, flat, strict=True))
        found = self._tails[0].run(values, {}, needed)
        outputs = [_arrays(tensors) for tensors in found if tensors is not None]
        return outputs, {t: value for t, value in values.items() if t in needed}

    def divergence(self, kernels: Kernels) -> float:
        """The divergence of the model's outputs if it computes with other kernels."""
        return self.reference.divergence(self.outputs(kernels))

    def discrepancy(self, kernels: Kernels) -> float:
        """How much the outputs differ, to compare plans; see `Reference.discrepancy`."""
        return self.reference.discrepancy(self.outputs(kernels))

    def error(self, kernels: Kernels) -> float:
        """The relative squared error of the outputs; see `Reference.error`."""
        return self.reference.error(self.outputs(kernels))

    def outputs(self, kernels: Kernels) -> list[Array]:
        """The model's outputs if it computes with other kernels.

        Raises:
            KeyError: If a layer is not one of those that were named.
        """
        numbers = [self._first[layer] for layer in kernels]
        used = [number for number in numbers if number is not None]
        if not used:
            return _joined(self._own)
        tail = self._tails[max(cut for cut in self._tails if cut <= min(used))]
        found = []
        with passing(self._model):
            for kept, own in zip(self._kept, self._own, strict=True):
                outputs = zip(tail(kept, kernels), own, strict=True)
                found.append([same if new is None else _arrays(new) for new, same in outputs])
        return _joined(found)


class _Tail:
    """The steps of a program from one of them on, as a function of tensors and kernels.

    Args:
        program: The program.
        cut: The number of the first step.
        layers: The layers whose kernels may be replaced, in their order.

    Attributes:
        inputs: The tensors that it reads and does not make.
    """

    def __init__(self, program: Program, cut: int, layers: Iterable[Any]) -> None:
        self._program = program
        self._steps = program.steps[cut:]
        inside = set().union(*(step.inside for step in self._steps))
        self._layers = [layer for layer in layers if layer in inside]
        read = [tensor for step in self._steps for tensor in step.inputs]
        made = {tensor for step in self._steps for tensor in step.outputs}
        self.inputs = [tensor for tensor in dict.fromkeys(read) if tensor not in made]
        self._last = {tensor: step for step in self._steps for tensor in step.inputs}
        self._graph = Traced(self._from_tensors, or_as_code=True)

    def __call__(self, kept: Mapping[int, Any], kernels: Kernels) -> list[list[Any] | None]:
        """Tensors for each output of the model, or None where an output was made before."""
        inputs = {tensor: kept[tensor] for tensor in self.inputs}
        if any(replacements_of(layers_of(self._program.model))):  # code that sees every run
            return self.run(inputs, kernels)
        masks = {tensor: mask_of(x) for tensor, x in inputs.items() if mask_of(x) is not None}
        own = [known_kind(layer).variable(layer) for layer in self._layers]
        given = [
            nest.cast(nest.tensor(kernels.get(layer, variable)), variable.dtype)
            for layer, variable in zip(self._layers, own, strict=True)
        ]
        # Cells compute with their own variable, and a graph that fails would not restore it.
        cells = [v for layer, v in zip(self._layers, own, strict=True) if hasattr(layer, "cell")]
        with restored(cells):
            found: list[list[Any] | None] = self._graph((inputs, masks, given))
        return found

    def _from_tensors(self, arguments: Any) -> list[list[Any] | None]:
        inputs, masks, kernels = arguments
        for tensor, mask in masks.items():
            set_mask(inputs[tensor], mask)
        return self.run(dict(inputs), dict(zip(self._layers, kernels, strict=True)))

    def run(
        self, values: dict[int, Any], kernels: Kernels, keep: Collection[int] = ()
    ) -> list[list[Any] | None]:
        """The outputs; `values` then has the tensors in `keep`, and those given."""
        ends = {*self._program.outputs, *keep}
        for step in self._steps:
            standing = [
                known_kind(layer).computing_with(layer, kernels[layer])
                for layer in step.inside & kernels.keys()
            ]
            result = self._program.call(step, values.__getitem__, standing=standing)
            if not self._program.outputs:  # the only step of a model without a graph
                return [nest.comparable(result)]
            values.update(zip(step.outputs, result, strict=True))
            for tensor in step.inputs:
                if self._last[tensor] is step and tensor not in ends:
                    values.pop(tensor, None)
        return [
            nest.comparable(values[tensor]) if tensor in values else None
            for tensor in self._program.outputs
        ]


def _arrays(tensors: Sequence[Any]) -> list[Array]:
    return [np.atleast_1d(nest.to_numpy(tensor)) for tensor in tensors]


def _joined(outputs: Sequence[Sequence[list[Array]]]) -> list[Array]:
    return joined(map(itertools.chain.from_iterable, outputs))

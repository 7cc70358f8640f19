"""Runs a model with other kernels, and measures what that does to its outputs.

Every layer's error is measured at the layer. What it does to the output differs by a factor of a
thousand between layers, and is not linear. So each layer alone is computed with approximations of
its kernel, on held-out examples, and the divergence of the outputs is measured (`Reference`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds._backend import tensors as nest
from keras_alds._backend.loops import passing
from keras_alds.core.slicing import Array
from keras_alds.kinds.base import known_kind
from keras_alds.models.outputs import Reference
from keras_alds.models.program import Program

#: New kernels by layer, in the shapes of the layers' own.
Kernels = Mapping[Any, Array]


class Prober:
    """Runs a model on a few examples again and again, each time with some kernels replaced.

    Args:
        model: A built model.
        layers: The layers whose kernels may be replaced.
        batches: Batches of inputs.
        keep: Whether to compute only once what no replaced kernel changes. This takes memory.
            Defaults to True.

    Attributes:
        reference: The model's own outputs.
    """

    def __init__(
        self, model: Any, layers: Iterable[Any], batches: Sequence[Any], *, keep: bool = True
    ) -> None:
        self._model = model
        layers = list(layers)
        self._program = Program.of(model, layers, batches[0])
        self._steps = self._program.steps
        #: The steps to run for each replaced kernel.
        every = frozenset(range(len(self._steps)))
        self._after = {layer: self._dependent(layer) if keep else every for layer in layers}
        needed = {tensor for after in self._after.values() for tensor in self._from_outside(after)}
        outputs: list[list[list[Array]]] = []
        self._kept: list[dict[int, Any]] = []
        with passing(model):
            for batch in batches:
                flat = self._program.flat_inputs(batch)
                values = dict(zip(self._program.inputs, flat, strict=True))
                outputs.append(self._run(range(len(self._steps)), values, needed, {}))
                self._kept.append({t: value for t, value in values.items() if t in needed})
        self._own = outputs
        self.reference = Reference(model, _joined(outputs))

    def divergence(self, kernels: Kernels) -> float:
        """The divergence of the model's outputs if it computes with other kernels."""
        return self.reference.divergence(self.outputs(kernels))

    def distance(self, kernels: Kernels) -> float:
        """Like `divergence`, but bounded for scores; see `Reference.distance`."""
        return self.reference.distance(self.outputs(kernels))

    def error(self, kernels: Kernels) -> float:
        """The relative squared error of the outputs; see `Reference.error`."""
        return self.reference.error(self.outputs(kernels))

    def outputs(self, kernels: Kernels) -> list[Array]:
        """The model's outputs if it computes with other kernels.

        Raises:
            KeyError: If a layer is not one of those that were named.
        """
        steps = sorted(set().union(*(self._after[layer] for layer in kernels)))
        if not steps:
            return _joined(self._own)
        found = []
        with passing(self._model):
            for kept, own in zip(self._kept, self._own, strict=True):
                found.append(self._run(steps, dict(kept), set(), kernels, own))
        return _joined(found)

    def _run(
        self,
        steps: Iterable[int],
        values: dict[int, Any],
        keep: set[int],
        kernels: Kernels,
        own: Sequence[list[Array]] = (),
    ) -> list[list[Array]]:
        """What stands for each output; `values` then has the tensors in `keep`, and those given."""
        steps = list(steps)
        last = {tensor: n for n in steps for tensor in self._steps[n].inputs}
        ends = set(self._program.outputs)
        for n in steps:
            step = self._steps[n]
            standing = [
                known_kind(layer).computing_with(layer, kernels[layer])
                for layer in step.inside & kernels.keys()
            ]
            result = self._program.call(step, values.__getitem__, standing=standing)
            if not ends:  # the only step of a model without a graph
                return [_arrays(result)]
            values.update(zip(step.outputs, result, strict=True))
            for tensor in step.inputs:
                if last[tensor] == n and tensor not in keep | ends:
                    values.pop(tensor, None)
        return [
            _arrays(values[tensor]) if tensor in values else own[i]
            for i, tensor in enumerate(self._program.outputs)
        ]

    def _dependent(self, layer: Any) -> frozenset[int]:
        """The steps that run a layer, and all that use what these compute."""
        found: set[int] = set()
        changed: set[int] = set()
        for n, step in enumerate(self._steps):
            if layer in step.inside or not changed.isdisjoint(step.inputs):
                found.add(n)
                changed.update(step.outputs)
        return frozenset(found)

    def _from_outside(self, steps: frozenset[int]) -> set[int]:
        """The tensors that some steps read and others make."""
        made = {tensor for n in steps for tensor in self._steps[n].outputs}
        return {tensor for n in steps for tensor in self._steps[n].inputs} - made


def _arrays(output: Any) -> list[Array]:
    return [nest.to_numpy(tensor) for tensor in nest.comparable(output)]


def _joined(outputs: Sequence[Sequence[list[Array]]]) -> list[Array]:
    """The outputs of all batches; axes of other lengths are flattened into the first."""
    joined = []
    for parts in zip(*map(itertools.chain.from_iterable, outputs), strict=True):
        if len({part.shape[1:] for part in parts}) > 1:
            parts = tuple(part.reshape(-1, part.shape[-1]) for part in parts)
        joined.append(np.concatenate([np.atleast_1d(part) for part in parts]))
    return joined

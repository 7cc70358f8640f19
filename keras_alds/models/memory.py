"""The memory that the feature maps of a model take, before and after compression.

A model runs as a sequence of operators, like those of a LiteRT file. While one runs, its inputs and
outputs are in memory, and whatever a later one needs. The peak is the most that is in memory at
once. A factorized layer is two operators with a tensor of k·j channels between them. So a plan can
raise the peak, although it removes parameters.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keras_alds._backend import wrappers
from keras_alds.core.memory import Node, live_sizes
from keras_alds.kinds.base import (
    KernelKind,
    Kind,
    Shape,
    below,
    factorized_kind,
    input_rank_of,
    is_factorized,
    known_kind,
    scheme_of,
    stock_kind,
)
from keras_alds.models.inventory import Calls, Inventory
from keras_alds.models.program import Program, Step
from keras_alds.plan import LayerChoice

# Layers that return their input, or read it as another shape.
_SAME = frozenset(
    {
        *("Dropout", "AlphaDropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"),
        *("GaussianDropout", "GaussianNoise", "ActivityRegularization", "Identity"),
        *("Flatten", "Reshape"),
    }
)
# Layers that are a product and a sum.
_SCALINGS = frozenset(
    {"BatchNormalization", "LayerNormalization", "GroupNormalization", "Normalization", "Rescaling"}
)
# Layers whose operators apply a ReLU that follows.
_FUSING = frozenset(
    {
        *("Add", "Subtract", "Multiply", "Concatenate"),
        *("MaxPooling1D", "MaxPooling2D", "AveragePooling1D", "AveragePooling2D"),
    }
)
_FUSED = frozenset({"relu", "relu6"})
# Activations that multiply their input by something computed from it.
_GATES = frozenset({"silu", "swish", "mish"})


@dataclasses.dataclass(frozen=True)
class Site:
    """A call of a layer that can be factorized.

    Attributes:
        live: Entries that are live while the dense layer runs.
        output: Entries of its output, which are not live before the last part of its factorized
            form runs.
        dying: Entries of its input, if nothing else needs it: then they are not live after the
            first part.
        inputs: The shape of its input, for one example.
        outputs: The shape of its output.
    """

    live: int
    output: int
    dying: int
    inputs: Shape
    outputs: Shape


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is live at once in a model, in entries of tensors for one example.

    A layer that holds others, such as attention, counts as one operator.

    Attributes:
        fixed: The most entries that are live while an operator runs that no plan changes.
        where: The name of the layer where that is.
        sites: The calls of each layer that can be factorized.
    """

    fixed: int
    where: str
    sites: Mapping[Any, Sequence[Site]]

    @classmethod
    def of(cls, inventory: Inventory, *, trace: bool = False) -> Memory | None:
        """Reads the graph of a model.

        Args:
            inventory: The model.
            trace: Whether the model may be traced, to see the calls of layers inside others.

        Returns:
            The memory; None for a subclassed model, or if the size of a tensor is unknown.
        """
        if not inventory.backend.runs_graph(inventory.model):
            return None
        records = [*inventory.candidates, *inventory.factorized]
        program = Program(inventory.model, [record.layer for record in records])
        program.from_graph()
        try:
            return _Reader(inventory, program, trace).memory()
        except _UnknownError:
            return None

    @property
    def peak(self) -> int:
        """The most entries that are live at once in the model as it is."""
        return max([self.fixed, *(site.live for sites in self.sites.values() for site in sites)])

    def dense(self, layer: Any) -> int:
        """The most entries that are live while a layer runs as it is; 0 if it is not called."""
        return max((site.live for site in self.sites.get(layer, ())), default=0)

    def factorized(self, layer: Any, form: tuple[int, int, int]) -> int:
        """The same for its factorized form: fold scheme, slices k and rank j.

        In Tucker-2, the rank of the input channels is in the place of k.
        """
        return max((_live(layer, form, site) for site in self.sites.get(layer, ())), default=0)

    def within(self, layer: Any, scheme: int, slices: int, ranks: range, allowed: int) -> range:
        """The ranks with which a layer stays within a limit."""
        count = bisect.bisect_right(
            ranks, allowed, key=lambda rank: self.factorized(layer, (scheme, slices, rank))
        )
        return ranks[:count]

    def after(self, choices: Iterable[tuple[Any, LayerChoice]]) -> int:
        """The peak with the choices of a plan for layers; all others stay as they are."""
        peaks = {layer: self.dense(layer) for layer in self.sites}
        for layer, choice in choices:
            if choice.slices and choice.rank and layer in peaks:
                form = choice.scheme or 0, choice.input_rank or choice.slices, choice.rank
                peaks[layer] = self.factorized(layer, form)
        return max([self.fixed, *peaks.values()])


def peak_entries(inventory: Inventory) -> int | None:
    """The most entries of tensors that are live at once in a model, or None if this is unknown."""
    memory = Memory.of(inventory, trace=True)
    return None if memory is None else memory.peak


def _live(layer: Any, form: tuple[int, int, int], site: Site) -> int:
    """The most entries that are live while the parts of a factorized form run."""
    hidden = known_kind(layer).hidden_sizes(layer, form, site.inputs, site.outputs)
    tensors = [site.dying, *hidden, site.output]
    return site.live - site.dying - site.output + max(map(sum, itertools.pairwise(tensors)))


class _UnknownError(ValueError):
    """The size of a tensor is unknown."""


class _Reader:
    """Writes the steps of a model as operators."""

    def __init__(self, inventory: Inventory, program: Program, trace: bool) -> None:
        self._inventory, self._program, self._trace = inventory, program, trace
        self._wanted = {record.layer for record in inventory.candidates}
        self._uses = collections.Counter(program.outputs)
        self._uses.update(tensor for step in program.steps for tensor in step.inputs)
        self._nodes: list[Node] = []
        self._names: list[str] = []
        self._sizes: dict[int, int] = {}
        # The tensor in whose memory a tensor is; negative ones are inside layers.
        self._place = {tensor: tensor for tensor in program.inputs}
        # What the operator that wrote a tensor does as well: "scale" and "relu".
        self._fuses: dict[int, frozenset[str]] = {}
        # The operators of layers that can be factorized, and of those that hold some.
        self._calls: list[tuple[Any, int, Shape, Shape]] = []
        self._inside: list[tuple[int, Iterable[Any]]] = []

    def memory(self) -> Memory:
        for tensor in self._program.inputs:
            self._sizes[tensor] = self._size(tensor)
        for step in self._program.steps:
            self._add(step)
        ends = [self._place[tensor] for tensor in self._program.outputs]
        live = live_sizes(self._nodes, self._sizes, ends)
        last = {t: n for n, node in enumerate(self._nodes) for t in node.inputs}
        last.update(dict.fromkeys(ends, len(self._nodes)))
        sites = collections.defaultdict(list)
        for layer, index, inputs, outputs in self._calls:
            node = self._nodes[index]
            dying = sum(self._sizes[t] for t in set(node.inputs) if last[t] == index)
            output = self._sizes[node.outputs[0]]
            sites[layer].append(Site(live[index], output, dying, inputs, outputs))
        hidden: collections.Counter[int] = collections.Counter()
        for index, layers in self._inside:
            for layer in layers:
                for inputs, outputs in self._traced(layer):
                    if is_factorized(layer):
                        largest = max(_hidden(layer, inputs, outputs))
                        hidden[index] = max(hidden[index], largest)
                    else:
                        sites[layer].append(Site(live[index], 0, 0, inputs, outputs))
        called = {index for _, index, _, _ in self._calls}
        fixed = [(size + hidden[n], -n) for n, size in enumerate(live) if n not in called]
        most, where = max(fixed, default=(0, 0))
        return Memory(most, self._names[-where] if fixed else "", dict(sites))

    # -- The operators of a step ---------------------------------------------------------------

    def _add(self, step: Step) -> None:
        layer = step.layer.layer if wrappers.is_pruning(step.layer) else step.layer
        if self._is_same(step, layer):
            self._place[step.outputs[0]] = self._place[step.inputs[0]]
            fuses = self._fuses.get(step.inputs[0], frozenset())
            self._fuses[step.outputs[0]] = frozenset() if _activation(layer) in _FUSED else fuses
            return
        # In Keras 3 an operation need not be a layer.
        is_layer = isinstance(layer, self._inventory.backend.keras.layers.Layer)
        kind, name = stock_kind(layer) if is_layer else Kind(""), type(layer).__name__
        source = step.inputs[0] if step.inputs else None
        weighted = source is not None and (kind.output_axes or isinstance(kind, KernelKind))
        if weighted and len(step.outputs) == 1 and not kind.kernels(layer):
            self._weighted(step, layer, kind)
            return
        chain = [self._places(step.inputs)]
        activation = _activation(layer)
        if name in _SCALINGS:
            chain.append(self._fresh(step))
        elif activation in _GATES:
            chain.append((*self._fresh(step), *chain[0]))
        self._run(step, chain)
        self._fuses[step.outputs[0]] = frozenset({"relu"} if name in _FUSING | _SCALINGS else ())
        if step.inside:
            self._hold(step)

    def _is_same(self, step: Step, layer: Any) -> bool:
        """Whether a step takes no memory of its own."""
        if not step.inputs or len(step.outputs) != 1:
            return False
        name, activation = type(layer).__name__, _activation(layer)
        if callable(layer) and not hasattr(layer, "name"):
            return True  # a cast to the model's dtype
        if name in _SAME or activation == "linear":
            return True
        if name == "ZeroPadding2D":
            return self._pads_depthwise(step)
        wanted = (
            "relu" if activation in _FUSED else "scale" if name == "BatchNormalization" else None
        )
        return wanted in self._fuses.get(step.inputs[0], ()) and self._uses[step.inputs[0]] == 1

    def _pads_depthwise(self, step: Step) -> bool:
        """Whether the operator of a depthwise convolution does the padding, as its own "same"."""
        users = [other.layer for other in self._program.steps if step.outputs[0] in other.inputs]
        if len(users) != 1 or type(users[0]).__name__ != "DepthwiseConv2D":
            return False
        layer, ours = users[0], step.layer.padding
        if layer.padding != "valid" or layer.data_format != "channels_last":
            return False
        lengths = self._shape(step.inputs[0])[1:3]
        for length, sides, window, stride in zip(
            lengths, ours, layer.kernel_size, layer.strides, strict=True
        ):
            total = max((-(-(length or 0) // stride) - 1) * stride + window - (length or 0), 0)
            if tuple(sides) != (total // 2, total - total // 2):
                return False
        return True

    def _weighted(self, step: Step, layer: Any, kind: Kind) -> None:
        """A convolution or dense layer, and its activation."""
        source, output = step.inputs[0], step.outputs[0]
        inputs, outputs = (self._shape(tensor) for tensor in (source, output))
        kernel = factorized_kind(layer) if is_factorized(layer) else kind
        chain = [self._places(step.inputs)]
        if isinstance(kernel, KernelKind):
            between = [kernel.before_kernel(layer, inputs, outputs)]
            between += _hidden(layer, inputs, outputs) if is_factorized(layer) else []
            chain += [self._new(size) for size in between if size]
        index = len(self._nodes) + len(chain) - 1
        activation = _name_of(getattr(layer, "activation", None))
        if activation in _GATES:
            gated = self._fresh(step)
            chain += [gated, (*self._fresh(step), *gated)]
        elif activation not in _FUSED and activation != "linear":
            chain.append(self._fresh(step))
        self._run(step, chain)
        fuses = {"linear": ("relu", "scale")}.get(activation, ())
        self._fuses[output] = frozenset(fuses)
        if layer in self._wanted:
            self._calls.append((layer, index, inputs, outputs))

    def _hold(self, step: Step) -> None:
        """A layer that holds layers to compress; what a loop does inside is not known."""
        held = [step.layer, *below(step.layer)]
        if not self._trace or any(stock_kind(layer).running(layer, False) for layer in held):
            raise _UnknownError
        self._inside.append((len(self._nodes) - 1, step.inside))

    def _traced(self, layer: Any) -> Calls:
        """The calls of a layer inside another one."""
        try:
            calls = self._inventory.calls[layer]
        except ValueError as error:
            raise _UnknownError from error
        if any(None in shape for call in calls for shape in call):
            raise _UnknownError
        return calls

    def _run(self, step: Step, chain: Sequence[tuple[int, ...]]) -> None:
        """Operators one after the other: each reads what the one before it wrote first."""
        for tensor in step.outputs:
            self._place[tensor] = tensor
            self._sizes[tensor] = self._size(tensor)
        written = [*(reads[:1] for reads in chain[1:]), step.outputs]
        self._nodes += map(Node, chain, written)
        self._names += [str(getattr(step.layer, "name", ""))] * len(chain)

    # -- Tensors -------------------------------------------------------------------------------

    def _places(self, tensors: Iterable[int]) -> tuple[int, ...]:
        return tuple(self._place[tensor] for tensor in tensors)

    def _new(self, size: int) -> tuple[int]:
        tensor = -1 - len(self._sizes)
        self._sizes[tensor] = size
        return (tensor,)

    def _fresh(self, step: Step) -> tuple[int]:
        """A tensor inside a step, of the size of its output."""
        return self._new(self._size(step.outputs[0]))

    def _shape(self, tensor: int) -> Shape:
        shape = self._program.shapes.get(tensor)
        if shape is None or None in shape[1:]:
            raise _UnknownError
        return (1, *shape[1:])

    def _size(self, tensor: int) -> int:
        return math.prod(size or 0 for size in self._shape(tensor))


def _activation(layer: Any) -> str | None:
    """The activation that a layer without weights is, if it is one."""
    name = type(layer).__name__
    if name == "Activation":
        return _name_of(layer.activation)
    if name in ("Relu", "Relu6"):
        return name.lower()
    if name == "ReLU" and layer.max_value in (None, 6) and not layer.threshold:
        return None if getattr(layer, "negative_slope", 0) else "relu"
    return None


def _name_of(activation: Any) -> str:
    if activation is None:
        return "linear"
    return str(getattr(activation, "__name__", type(activation).__name__))


def _hidden(layer: Any, inputs: Shape, outputs: Shape) -> list[int]:
    """Entries of the hidden tensors in a call of a factorized layer."""
    form = scheme_of(layer), input_rank_of(layer) or layer.slices, layer.rank
    return factorized_kind(layer).hidden_sizes(layer, form, inputs, outputs)

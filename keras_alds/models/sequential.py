"""Sequential calibration: every layer corrects the errors of the compressed layers before it.

The layers are compressed in the order in which the network runs. Let x be a layer's input in the
original network, and x̂ its input after the earlier layers were compressed. The best dense kernel
for x̂ is the regression of the original outputs xW on x̂ (see `PairAccumulator`). This kernel is
factorized with the second moment of x̂.

A Functional or Sequential model is run once, nested models included. Both versions of every tensor
that is still needed are kept for all examples, and every layer runs once on each version. A custom
layer or subclassed model is run again for each of its layers to compress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors as nest
from keras_alds._backend.calls import Replacement, replaced_calls, watched
from keras_alds._backend.loops import passing
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.calibration.regression import TARGET_RIDGES, PairAccumulator
from keras_alds.core.parallel import threads
from keras_alds.core.slicing import Array
from keras_alds.kinds.base import kernel_values, known_kind, running
from keras_alds.models.data import KeptExamples, held_out
from keras_alds.models.observe import PARTS, check_finite, when_known
from keras_alds.models.program import Program, Step
from keras_alds.models.storage import Store

# The most entries of inputs that are joined.
_JOINED_ENTRIES = 1 << 20

Decide = Callable[[Any, SecondMoment, Array], Any]


# -- Running it ----------------------------------------------------------------------------------

# Both versions of a tensor, each a list of stored chunks; the same list if they are equal.
_Pair = tuple[list[Any], list[Any]]


class Walk:
    """Runs once through a model and compresses its layers on the way.

    Args:
        model: A built model.
        layers: The layers to compress.
        examples: The examples.
        store: The store for tensors. Defaults to a new one.
        given: Pairs of other layers and their factorized layers, known from the start.

    Attributes:
        order: The layers that the examples reach, in the order of compression.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        examples: KeptExamples,
        store: Store | None = None,
        given: Sequence[tuple[Any, Any]] = (),
    ) -> None:
        self._store = Store() if store is None else store
        self._chunks = len(examples)
        self._compressed = dict(given)
        self._watchers = {layer: _Watcher(layer) for layer in layers}
        self._originals: dict[Any, dict[tuple[int, int], list[Any]]] = {x: {} for x in layers}
        first = next(iter(examples))[0]
        first_calls = _first_calls(model, layers, first)
        self._program = Program.of(model, [*layers, *self._compressed], first)
        self._steps = self._program.steps
        # Of each layer the steps that call it, and of each tensor the step that makes it.
        self._calls: dict[Any, list[int]] = {layer: [] for layer in layers}
        for number, step in enumerate(self._steps):
            for layer in step.inside & self._calls.keys():
                self._calls[layer].append(number)
        self._makers = {t: n for n, step in enumerate(self._steps) for t in step.outputs}
        self.order = self._order(first_calls)
        # Layers compressed already, those that no example reaches, and steps that need not run.
        self._done = self._compressed.keys() | (set(layers) - first_calls.keys())
        self._ran: set[int] = set()
        self._values = _Values(self._store)
        self._values.uses = self._count_uses()
        flat = [
            [self._store.keep(tensor) for tensor in self._program.flat_inputs(batch)]
            for batch, _ in examples
        ]
        inputs = map(list, zip(*flat, strict=True))
        self._values.add(self._program.inputs, [(kept, kept) for kept in inputs])

    # -- Preparation -------------------------------------------------------------------------

    def _order(self, first_calls: dict[Any, int]) -> list[Any]:
        """The layers to compress, each after those that its inputs depend on.

        If layers depend on each other through shared calls, the first one called comes first.
        """
        above: dict[int, frozenset[Any]] = {tensor: frozenset() for tensor in self._program.inputs}
        needs: dict[Any, set[Any]] = {layer: set() for layer in first_calls}
        for step in self._steps:
            before = frozenset().union(*(above[tensor] for tensor in step.inputs))
            for layer in step.inside & needs.keys():
                needs[layer] |= (before & needs.keys()) - {layer}
                inside = step.inside & needs.keys()
                needs[layer] |= {k for k in inside if first_calls[k] < first_calls[layer]}
            above.update(dict.fromkeys(step.outputs, before | step.inside))
        order: list[Any] = []
        left = sorted(needs, key=lambda layer: first_calls[layer])
        while left:
            free = (layer for layer in left if needs[layer].issubset(order))
            order.append(next(free, left[0]))
            left.remove(order[-1])
        return order

    def _count_uses(self) -> dict[int, int]:
        """The number of times that every tensor will still be read."""
        recorded = [n for calls in self._calls.values() for n in calls]
        needed = self._pending([t for n in recorded for t in self._steps[n].inputs])
        uses = dict.fromkeys(self._program.inputs, 0)
        for n in [*needed, *recorded]:
            for tensor in self._steps[n].inputs:
                uses[tensor] = uses.get(tensor, 0) + 1
        return uses

    def _pending(self, tensors: Iterable[int]) -> list[int]:
        """The steps that must run to compute some tensors."""
        found: set[int] = set()
        stack = list(tensors)
        while stack:
            tensor = stack.pop()
            number = self._makers.get(tensor)
            if number is None or number in found or number in self._ran:
                continue
            if self._values.is_provisional(tensor):
                continue
            found.add(number)
            stack.extend(self._steps[number].inputs)
        return sorted(found)

    # -- The walk ----------------------------------------------------------------------------

    def run(self, decide: Decide, progress: Callable[[float], object] = lambda part: None) -> None:
        """Compresses one layer after the other.

        Args:
            decide: `decide(layer, moment, target)` returns a built replacement of `layer` with
                the same inputs and outputs, or None to keep the layer.
            progress: Called with the part of a layer that is done, several times a layer.
        """
        with passing(self._program.model):
            for layer in self.order:
                self._compress(layer, decide, progress)

    def _compress(self, layer: Any, decide: Decide, progress: Callable[[float], object]) -> None:
        moment, target = self._observe(layer, progress)
        compressed = decide(layer, moment, target)
        self._done.add(layer)
        if compressed is not None:
            self._compressed[layer] = compressed
        for inputs in self._originals.pop(layer).values():
            for x in inputs:
                self._store.drop(x)
        self._values.drop_provisional()
        for number in self._calls[layer]:
            self._values.release(self._steps[number].inputs)

    def _observe(
        self, layer: Any, progress: Callable[[float], object]
    ) -> tuple[SecondMoment, Array]:
        """The second moment of a layer's current inputs, and the best dense kernel for them."""
        calls = self._calls[layer]
        inputs = [tensor for n in calls for tensor in self._steps[n].inputs]
        held = [chunk for chunk in range(self._chunks) if held_out(chunk)]
        part = 1 / ((len(self._pending(inputs)) + 1) * self._chunks + len(held))
        self._ensure(inputs, lambda: progress(part))
        sums = PairAccumulator(kernel_values(layer), overwrite=True)
        with threads() as pool:

            def parts(chunks: Iterable[int]) -> Iterator[list[tuple[Any, Any]]]:
                for chunk in chunks:
                    for n in calls:
                        for x, x_hat in self._seen(layer, n, chunk):
                            yield _parts(layer, x_hat, x, PARTS if sums.side <= 2048 else 2)
                    progress(part)

            for some in parts(chunk for chunk in range(self._chunks) if chunk not in held):
                sums.add_parts(some, pool)
            errors = sum(
                (sums.held_out_errors(some, pool) for some in parts(held)),
                start=np.zeros(len(TARGET_RIDGES)),
            )
            ridge = TARGET_RIDGES[int(np.argmin(errors))] if held else TARGET_RIDGES[-2]
            for some in parts(held):
                sums.add_parts(some, pool)
        return sums.result(ridge)

    def _seen(self, layer: Any, number: int, chunk: int) -> Iterator[tuple[Array, Array]]:
        """The inputs `(x, x̂)` of all calls of a layer in one step."""
        step = self._steps[number]
        if step.layer is layer:
            args, kwargs = step.args, step.kwargs
            first = args[0] if args else next(iter(kwargs.values()))
            x = _array(layer, self._values.load(first.tensor, 0, chunk))
            if self._values.is_same(first.tensor):
                yield x, x
            else:
                yield x, _array(layer, self._values.load(first.tensor, 1, chunk))
            return
        original = compressed = self._original(layer, number, chunk)
        if not self._is_same(step):
            watcher = self._watchers[layer]
            self._call(step, 1, chunk, watcher.calls)
            compressed = watcher.found()
        if len(original) != len(compressed):
            raise ValueError(
                f"Expected the layer '{layer.name}' to be called as often in the compressed "
                f"network as in the original one. Received: {len(compressed)} and {len(original)} "
                "calls, which depend on the data. Use `sequential=False`."
            )
        for x, x_hat in _joined(zip(original, compressed, strict=True)):
            yield _checked(x, layer), _checked(x_hat, layer)

    def _original(self, layer: Any, number: int, chunk: int) -> list[Array]:
        """The inputs of all calls of a layer in one step of the original network.

        Those of all layers in the step are seen in one run, and kept where there is room.
        """
        known = self._originals[layer].get((number, chunk))
        if known is not None:
            return [self._store.load(kept).numpy() for kept in known]
        step = self._steps[number]
        left = [item for item in self._calls if item in step.inside and item not in self._done]
        calls = [self._watchers[item].calls for item in left]
        self._call(step, 0, chunk, {item: call for some in calls for item, call in some.items()})
        for item in left:
            found = self._watchers[item].found()
            tensors = [nest.tensor(values) for values in found]
            if item is layer:
                inputs = found
            if all(map(self._store.has_room, tensors)):
                kept = [self._store.keep(tensor) for tensor in tensors]
                self._originals[item][number, chunk] = kept
        return inputs

    def _is_same(self, step: Step) -> bool:
        """Whether both versions of a step compute the same."""
        unchanged = not step.inside & self._compressed.keys()
        return unchanged and all(map(self._values.is_same, step.inputs))

    def _ensure(self, tensors: Iterable[int], progress: Callable[[], object]) -> None:
        """Runs the steps that are needed to compute some tensors."""
        for number in self._pending(tensors):
            step = self._steps[number]
            same = self._is_same(step)
            outputs = self._outputs(step, 0, progress)
            pairs = list(zip(outputs, outputs if same else self._outputs(step, 1), strict=True))
            waits = not step.inside <= self._done
            if waits or any(map(self._values.is_provisional, step.inputs)):
                self._values.add_provisional(step.outputs, pairs)
            else:
                self._values.add(step.outputs, pairs)
                self._values.release(step.inputs)
                self._ran.add(number)

    def _outputs(
        self, step: Step, version: int, progress: Callable[[], object] = lambda: None
    ) -> list[list[Any]]:
        """The stored chunks of every output of a step: version 0 is the original, 1 the new one."""
        chunks: list[list[Any]] = []
        for chunk in range(self._chunks):
            chunks.append([self._store.keep(x) for x in self._call(step, version, chunk)])
            progress()
        return [list(values) for values in zip(*chunks, strict=True)]

    def _call(
        self,
        step: Step,
        version: int,
        chunk: int,
        watching: Mapping[Any, Replacement] | None = None,
    ) -> list[Any]:
        def value(tensor: int) -> Any:
            return self._values.load(tensor, version, chunk)

        inside = step.inside & self._compressed.keys() if version else ()
        standing = [known_kind(x).standing_for(x, self._compressed[x]) for x in inside]
        return self._program.call(step, value, watching, standing)


class _Values:
    """Both versions of the tensors of a program, as long as they will be read.

    Provisional ones depend on layers that are not compressed yet.

    Attributes:
        uses: The number of times that every tensor will still be read.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._final: dict[int, _Pair] = {}
        self._provisional: dict[int, _Pair] = {}
        self.uses: dict[int, int] = {}

    def _pair(self, tensor: int) -> _Pair:
        return self._provisional.get(tensor) or self._final[tensor]

    def load(self, tensor: int, version: int, chunk: int) -> Any:
        """One chunk of a tensor: of the original in version 0, of the compressed one in 1."""
        return self._store.load(self._pair(tensor)[version][chunk])

    def is_same(self, tensor: int) -> bool:
        """Whether both versions are equal."""
        original, compressed = self._pair(tensor)
        return original is compressed

    def is_provisional(self, tensor: int) -> bool:
        """Whether a tensor is known, and is provisional."""
        return tensor in self._provisional

    def add(self, tensors: Sequence[int], pairs: Sequence[_Pair]) -> None:
        """Keeps the tensors that will be read."""
        for tensor, pair in zip(tensors, pairs, strict=True):
            if self.uses.get(tensor):
                self._final[tensor] = pair
            else:
                self._drop(pair)

    def add_provisional(self, tensors: Sequence[int], pairs: Sequence[_Pair]) -> None:
        """Keeps tensors until `drop_provisional`."""
        self._provisional.update(zip(tensors, pairs, strict=True))

    def drop_provisional(self) -> None:
        """Drops all provisional tensors."""
        for pair in self._provisional.values():
            self._drop(pair)
        self._provisional.clear()

    def release(self, tensors: Iterable[int]) -> None:
        """Counts one use of each tensor, and drops those that will not be read again."""
        for tensor in tensors:
            self.uses[tensor] -= 1
            if self.uses[tensor] == 0 and tensor in self._final:
                self._drop(self._final.pop(tensor))

    def _drop(self, pair: _Pair) -> None:
        for chunks in pair if pair[0] is not pair[1] else pair[:1]:
            for kept in chunks:
                self._store.drop(kept)


def _first_calls(model: Any, layers: Sequence[Any], batch: Any) -> dict[Any, int]:
    """The layers that a batch reaches, numbered in the order of their first calls."""
    found: dict[Any, int] = {}

    def watch(layer: Any, _: Any, outputs: Any) -> Any:
        found.setdefault(layer, len(found))
        return outputs

    with passing(model), replaced_calls(running(model), watched(layers, watch)):
        model(batch, training=False)
    return found


class _Watcher:
    """Notes the inputs of all calls of a layer in a run of the model."""

    def __init__(self, layer: Any) -> None:
        self._found: list[Array] = []
        self.calls = watched([layer], self._watch)

    def _watch(self, layer: Any, inputs: Any, outputs: Any) -> Any:
        return when_known(inputs, outputs, lambda x: self._found.append(x))

    def found(self) -> list[Array]:
        """The inputs since the last call of this method."""
        found, self._found = self._found, []
        return found


def _array(layer: Any, tensor: Any) -> Array:
    found: list[Array] = []
    when_known(tensor, None, found.append)
    return _checked(found[0], layer)


def _checked(values: Array, layer: Any) -> Array:
    check_finite(values, layer.name)
    return values


def _joined(pairs: Iterable[tuple[Array, Array]]) -> Iterator[tuple[Array, Array]]:
    """The inputs of calls, those of many small calls joined: a loop calls a layer at every step."""
    waiting: list[tuple[Array, Array]] = []
    for pair in pairs:
        sizes = [x.size for x, _ in [*waiting, pair]]
        same = not waiting or waiting[0][0].shape[1:] == pair[0].shape[1:]
        if waiting and (not same or sum(sizes) > _JOINED_ENTRIES):
            yield _concatenated(waiting)
            waiting = []
        waiting.append(pair)
    if waiting:
        yield _concatenated(waiting)


def _concatenated(pairs: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    if len(pairs) == 1:
        return pairs[0]
    x, x_hat = map(np.concatenate, zip(*pairs, strict=True))
    return x, (x if all(a is b for a, b in pairs) else x_hat)


def _parts(layer: Any, x_hat: Array, x: Array, parts: int) -> list[tuple[Any, Any]]:
    """The unfolded inputs of one call, split for several threads of `PairAccumulator`."""
    kind = known_kind(layer)
    pairs = [np.array_split(kind.batches(layer, values), parts) for values in (x_hat, x)]
    return [
        (kind.patches(layer, now), None if x is x_hat else kind.patches(layer, before))
        for now, before in zip(*pairs, strict=True)
        if now.size
    ]


def most_reruns(model: Any, layers: Sequence[Any]) -> int:
    """The most reruns of any subclassed model or custom layer in `model`."""
    program = Program(model, layers)
    if not _backend.backend_of(model).runs_graph(model):
        return len(layers)
    program.from_graph()
    return max((len(step.inside) for step in program.steps), default=0)

"""Converts calibration data of any type to checked batches of a model's inputs."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from rich.progress import Progress

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.graphs import is_ragged
from keras_alds.core.checks import did_you_mean, int_at_least
from keras_alds.core.slicing import Array
from keras_alds.models.storage import Store

#: The smallest number of examples that gives usable statistics.
MIN_EXAMPLES = 8
DEFAULT_EXAMPLES = 1024
#: Fewer batches are split, so that whole ones can be held out.
FEWEST_BATCHES = 4
# Largest number of examples in one forward pass of calibration, and of their entries in a pass of
# any kind, which limits large images.
_BATCH = 32
_BATCH_ENTRIES = 1 << 21

# The fewest examples, and entries of all of them, on which whole plans are tried.
_FEWEST, _ENTRIES_AT_MOST = 16, 1 << 24


class Examples:
    """Calibration data of any type as checked batches of a model's inputs, without labels.

    Iterating yields `(inputs, number of examples)` with at most 32 examples at a time. If the
    model has a fixed batch size, all batches have that size, and the rest is dropped.

    Args:
        model: The model.
        data: The user's `calibration_data` or `representative_data`.
        limit: The user's `max_examples`: the largest number of examples, or None.
        argument: The name of the user's argument, for errors.
        exact: Whether a model that calls its layers in Python code must get all inputs of its first
            call, in the sizes of that call. By default it may get fewer inputs and other sizes.

    Attributes:
        total: The number of examples, or None if it is not known.
        fixed: The model's fixed batch size, or None.

    Raises:
        ValueError: If `data` has another type, or `limit` is less than 8; during iteration, if a
            batch does not fit the model; and at the end, if there were too few examples.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        limit: int | None,
        argument: str = "calibration_data",
        *,
        exact: bool = False,
    ) -> None:
        _backend.backend_of(model).check_call(model)
        if limit is not None:
            limit = int_at_least(limit, "max_examples", MIN_EXAMPLES)
        self.fixed = fixed_batch_size(model)
        size = self.fixed or 1
        self._limit = limit if limit is None else math.ceil(limit / size) * size
        self._argument = argument
        self._names: list[str] = _backend.backend_of(model).input_names(model)
        structure = self._input_specs(model)
        self._single = structure is not None and not tensors.is_nested(structure)
        self._specs: list[Any] = [] if structure is None else tensors.flatten(structure)
        if inspect.isroutine(data) or isinstance(data, functools.partial):
            data = data()  # a generator function, such as TFLite's `representative_dataset`
        self._has_graph = _backend.backend_of(model).has_graph(model)
        #: Whether what is known of the inputs is from a call, and others may differ.
        self._may_differ = not (exact or self._has_graph)
        self._given: list[str] | None = None  # names of the inputs in the first batch
        self._spec_of: dict[str, Any] = structure if isinstance(structure, dict) else {}
        keys = set(self._spec_of)
        #: The names by which a dict may hold the inputs.
        self._keys = [names for names in (keys, set(self._names)) if names]
        self._batches, self.total = self._read(self._without_labels(data))

    @staticmethod
    def _input_specs(model: Any) -> Any:
        try:
            return _backend.backend_of(model).input_specs(model)
        except ValueError:
            return None  # a subclassed model with unknown input shapes

    def _read(self, data: Any) -> tuple[Iterable[Any], int | None]:
        """The batches of data of any type, and the number of examples if it is known."""
        arrays = self._as_arrays(data)
        if arrays is not None:
            chosen = self._chosen(self._rows(arrays))
            parts = (chosen[i : i + _BATCH] for i in range(0, len(chosen), _BATCH))
            batches = (tensors.map_structure(functools.partial(_at, p), arrays) for p in parts)
            return batches, len(chosen)
        if tensors.is_dataset(data):
            return data, self._limit
        if hasattr(data, "__getitem__") and not isinstance(data, (list, tuple, str, bytes)):
            indices = range(len(data)) if hasattr(data, "__len__") else itertools.count()
            return (data[i] for i in indices), None
        if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
            return data, None
        raise ValueError(
            f"Expected `{self._argument}` to be an array, a list or dict of arrays for several "
            "inputs, a tf.data.Dataset, a PyDataset, an iterable of batches or a function "
            "without arguments that returns one of these. "
            f"Received: {type(data).__name__}"
        )

    @property
    def _inputs(self) -> int:
        return max(len(self._specs), 1)

    def _without_labels(self, data: Any) -> Any:
        """The inputs of `(x, y)` or `(x, y, weights)`; a tuple may also be several inputs."""
        if not isinstance(data, tuple) or not data:
            return self._used(data)
        first = data[0]
        if self._inputs > 1 and len(data) == self._inputs and not isinstance(first, (list, dict)):
            return first if isinstance(first, tuple) else list(data)
        return self._used(first)

    def _used(self, data: Any) -> Any:
        """The inputs of the model in a dict that holds more, such as identifiers."""
        if isinstance(data, dict):
            for keys in self._keys:
                if keys <= set(data) or (self._may_differ and keys & set(data)):
                    self._check_spelling(set(data), keys)
                    return {key: value for key, value in data.items() if key in keys}
        return data

    def _check_spelling(self, given: set[str], known: set[str]) -> None:
        """Raises a ValueError if an unknown name is nearly that of a missing input."""
        for name in sorted(map(str, given - known)):
            if hint := did_you_mean(name, known - given):
                raise ValueError(self._other_inputs(sorted(given), sorted(known)) + hint)

    def _other_inputs(self, names: list[str], known: list[str]) -> str:
        """The message about a dict of other inputs."""
        return (
            f"Expected `{self._argument}` for {len(known)} inputs. "
            f"Received: {len(names)}, {names}, where the model has {known}"
        )

    def _as_arrays(self, data: Any) -> Any:
        """`data` as a structure of arrays, or None if it is something else."""
        if isinstance(data, dict):
            return {key: self._array(value) for key, value in data.items()}
        if isinstance(data, list) and data:
            items = [self._array(item) for item in data if _is_array(item)]
            if len(items) < len(data):
                nested = any(isinstance(item, (tuple, list, dict)) for item in data)
                return None if nested else self._array(data)
            if self._inputs > 1 and len(items) == self._inputs:
                return items
            one_by_one = self._specs and self._is_example(items[0], self._specs[0])
            return self._array(items) if one_by_one else None
        return self._array(data) if _is_array(data) else None

    def _is_example(self, array: Any, spec: Any) -> bool:
        """Whether an array in a list is one example of an input, not a batch of them."""
        wanted = tuple(spec.shape)[1:]
        example = self._fitting(array, wanted) is not None
        batch = self._batch(array, wanted) is not None
        return example if example != batch else len(array.shape) <= len(wanted)

    def _is_single(self, array: Any, wanted: tuple[int | None, ...]) -> bool:
        """Whether an array is one example, also if Keras would take its first axis for the batch.

        A column of a table is as much a batch as one example of several numbers.
        """
        as_it_is = len(array.shape) == len(wanted) > 1
        if not as_it_is and self._batch(array, wanted) is not None:
            return False
        return self._fitting(array, wanted, exact=True) is not None

    def _batch(self, array: Any, wanted: tuple[int | None, ...]) -> Any:
        return self._fitting(array, (None, *wanted))

    def _fitting(self, array: Any, wanted: tuple[int | None, ...], *, exact: bool = False) -> Any:
        """The array, of the rank that the model gives it, if it is of a shape; else None."""
        if self._has_graph and isinstance(array, np.ndarray):
            array = of_rank(array, wanted)
        same_rank = len(array.shape) == len(wanted)
        fits = same_rank and all(
            n is None or n == m or (self._may_differ and not exact)
            for n, m in zip(wanted, array.shape, strict=True)
        )
        return array if fits else None

    def _rows(self, arrays: Any) -> int:
        rows = {array.shape[0] if len(array.shape) else 0 for array in tensors.flatten(arrays)}
        if len(rows) != 1:
            raise ValueError(
                f"Expected all inputs in `{self._argument}` to have equally many examples. "
                f"Received: {sorted(rows)}"
            )
        return rows.pop()

    def _chosen(self, rows: int) -> Array:
        """The rows of arrays to use, evenly spaced; whole batches if their size is fixed."""
        size = min(self.fixed or 1, max(rows, 1))
        batches = rows // size
        most = batches if self._limit is None else min(batches, self._limit // size)
        starts = size * np.linspace(0, batches, most, endpoint=False).astype(int)
        return (starts[:, None] + np.arange(size)).ravel()

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        count = 0
        for inputs, size in self._all():
            yield inputs, size
            count += size
        if count < MIN_EXAMPLES:
            raise ValueError(
                f"Expected at least {MIN_EXAMPLES} examples in `{self._argument}`, better a few "
                f"hundred. Received: {count}"
                + (" (was a generator used up before?)" if not count else "")
            )

    def _all(self) -> Iterator[tuple[Any, int]]:
        left = self._limit
        waiting: Any = None
        seen = False
        for element in self._batches:
            inputs = self._checked(self._without_labels(element))
            self._rows(inputs)
            if waiting is not None and _sizes(waiting) != _sizes(inputs):
                rows = self._rows(waiting)
                if rows and not self.fixed:
                    yield self._tensors(waiting), rows
                left = None if left is None else left - rows
                waiting = None  # examples of another size follow
            if waiting is not None:
                inputs = tensors.map_structure(_joined, waiting, inputs)
            if left is not None:
                inputs = _part(inputs, 0, left)
            rows = self._rows(inputs)
            # Always the same batch size: the result does not depend on how the data were batched.
            size = self.fixed or min(_BATCH, examples_at_once(inputs))
            whole = rows - rows % size
            for start in range(0, whole, size):
                yield self._tensors(_part(inputs, start, start + size)), size
                seen = True
            waiting = _part(inputs, whole, rows)
            if left is not None:
                left -= whole
                if left == rows - whole:
                    break
        if waiting is not None and (rows := self._rows(waiting)) and not (self.fixed and seen):
            yield self._tensors(waiting), rows

    def _checked(self, inputs: Any) -> Any:
        """Arrays of the shapes and types that the model takes."""
        if self._single and isinstance(inputs, (list, dict)) and len(inputs) == 1:
            (inputs,) = inputs.values() if isinstance(inputs, dict) else inputs
        flat = [self._array(item, dense=True) for item in tensors.flatten(inputs)]
        if isinstance(inputs, dict):
            names = sorted(inputs)  # as `tensors.flatten` does
            specs = self._specs_of(names)
        else:
            names = [f"input {n}" for n in range(len(flat))]
            specs = self._specs
        if specs and len(flat) != len(specs):
            if isinstance(inputs, dict):
                raise ValueError(self._other_inputs(names, self._names or sorted(self._spec_of)))
            raise ValueError(
                f"Expected `{self._argument}` for {len(specs)} inputs. Received: {len(flat)}"
                + (" in a list; labels go into a tuple, (x, y)" if isinstance(inputs, list) else "")
            )
        cast = [
            self._checked_array(array, name, spec)
            for array, name, spec in itertools.zip_longest(flat, names, specs)
        ]
        self._kinds = tensors.pack_sequence_as(inputs, specs or [None] * len(flat))
        return tensors.pack_sequence_as(inputs, cast)

    def _specs_of(self, names: list[str]) -> list[Any]:
        """What is known of the inputs in a dict with these keys, the same in all batches."""
        if self._may_differ and names != (self._given or names):
            raise ValueError(
                f"Expected the same inputs in all batches of `{self._argument}`. "
                f"Received: {names} after {self._given}"
            )
        self._given = names
        if set(names) == set(self._names):
            return [self._specs[self._names.index(name)] for name in names]
        if self._may_differ and set(names) <= set(self._spec_of):
            return tensors.flatten([self._spec_of[name] for name in names])
        return self._specs

    def _tensors(self, inputs: Any) -> Any:
        """Tensors of the types that the model's inputs have."""
        return tensors.map_structure(tensors.as_input, inputs, self._kinds)

    def _array(self, value: Any, dense: bool = False) -> Any:
        """A NumPy array, or a ragged tensor; or a matrix of SciPy unless it must be `dense`."""
        if tensors.is_ragged(value):
            return value
        if scipy.sparse.issparse(value):
            return value.toarray() if dense else value.tocsr()
        if tensors.is_sparse(value):
            if len(value.shape) == 2 and not dense:
                return tensors.to_scipy(value)
            value = tensors.dense(value)
        try:
            array = tensors.to_numpy(value)
        except ValueError as error:
            raise ValueError(
                f"Expected `{self._argument}` of one shape. Received: data that cannot be "
                f"converted to an array ({error})"
            ) from error
        texts = array.dtype.kind in "OSU" and any(tensors.is_text(spec) for spec in self._specs)
        if array.dtype.kind not in "biuf" and not texts:
            raise ValueError(
                f"Expected `{self._argument}` of numbers. Received: dtype={array.dtype} of "
                f"type {type(value).__name__}"
            )
        return array

    def _checked_array(self, array: Any, name: str, spec: Any) -> Any:
        if tensors.is_ragged(array):
            if spec is None or is_ragged(spec):
                return array if spec is None else tensors.cast(array, spec.dtype)
            array = tensors.dense(array).numpy()  # as Keras 3 does
        if spec is not None:
            wanted = tuple(spec.shape)[1:]
            batch, single = self._batch(array, wanted), self._is_single(array, wanted)
            if batch is None or single:
                raise ValueError(
                    f"Expected batches in `{self._argument}` of shape (batch, "
                    f"{', '.join(str(n) for n in wanted)}) for {name}. "
                    f"Received: shape={array.shape}"
                    + (", a single example: batch the data" if single else "")
                )
            array = batch
            array = array.astype(tensors.numpy_dtype(spec.dtype), copy=False)
        elif array.dtype.kind != "f":
            array = array.astype(np.float32)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"Expected finite `{self._argument}`. Received: NaN or infinity in {name}"
            )
        return array


def of_rank(array: Any, shape: Sequence[int | None]) -> Any:
    """The array with a last axis of size 1 more or less, if `shape` has one more or less.

    Functional and Sequential models do this to their inputs, so that grey images need no axis for
    their channel, and a column of a table none for itself.
    """
    rank = len(array.shape)
    if rank == len(shape) - 1 and shape[-1] == 1:
        return array[..., np.newaxis]
    if rank == len(shape) + 1 and array.shape[-1] == 1:
        return array[..., 0]
    return array


def is_iterator(data: Any) -> bool:
    """Whether data can be read only once, and not by index.

    What `ImageDataGenerator.flow` returns is an iterator, and a Sequence too.
    """
    by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return hasattr(data, "__next__") and not by_index


def in_parts(examples: Examples | KeptExamples) -> Iterator[tuple[Any, int]]:
    """The batches of examples; if there are fewer than four, they are split."""
    batches = iter(examples)
    first = list(itertools.islice(batches, FEWEST_BATCHES))
    if len(first) < FEWEST_BATCHES and not examples.fixed:
        first = [part for batch in first for part in _split(*batch)]
    yield from itertools.chain(first, batches)


def _split(inputs: Any, size: int) -> list[tuple[Any, int]]:
    """The parts of a batch, so that some can be held out."""
    if size < FEWEST_BATCHES or any(map(tensors.is_sparse, tensors.flatten(inputs))):
        return [(inputs, size)]
    bounds = np.linspace(0, size, FEWEST_BATCHES + 1).astype(int).tolist()
    return [(_part(inputs, a, b), b - a) for a, b in itertools.pairwise(bounds)]


def fixed_batch_size(model: Any) -> int | None:
    """The batch size that a model requires, or None."""
    sizes = {tensor.shape[0] for tensor in getattr(model, "inputs", None) or []}
    return sizes.pop() if len(sizes) == 1 else None


def _sizes(inputs: Any) -> list[tuple[int, ...]]:
    return [tuple(array.shape[1:]) for array in tensors.flatten(inputs)]


def entries_of(inputs: Any) -> int:
    """The number of entries of one example."""
    return sum(math.prod(length or 1 for length in size) for size in _sizes(inputs))


def examples_at_once(inputs: Any) -> int:
    """The number of such examples in one pass that limits their entries, a power of two."""
    return 1 << max(_BATCH_ENTRIES // max(entries_of(inputs), 1), 1).bit_length() - 1


def _part(inputs: Any, start: int, stop: int) -> Any:
    return tensors.map_structure(lambda array: array[start:stop], inputs)


def _at(rows: Array, array: Any) -> Any:
    return tensors.gather(array, rows) if tensors.is_ragged(array) else array[rows]


def _joined(first: Any, second: Any) -> Any:
    join = tensors.concat if tensors.is_ragged(first) else np.concatenate
    return join([first, second], 0)


def _is_array(value: Any) -> bool:
    sparse = scipy.sparse.issparse(value) or tensors.is_sparse(value)
    return (
        sparse
        or tensors.is_ragged(value)
        or (hasattr(value, "__array__") and not tensors.is_dataset(value))
    )


class KeptExamples:
    """`Examples`, of the same arguments, that are read once and iterated again in bounded memory.

    Attributes:
        total: The number of examples.
        fixed: The model's fixed batch size, or None.

    Raises:
        ValueError: As for `Examples`.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        limit: int | None = DEFAULT_EXAMPLES,
        argument: str = "calibration_data",
        *,
        exact: bool = False,
    ) -> None:
        self._store = Store()
        source = Examples(model, data, limit, argument, exact=exact)
        self.fixed = source.fixed
        self._batches = [
            (tensors.map_structure(self._store.keep, batch), count)
            for batch, count in in_parts(source)
        ]
        self.total = sum(count for _, count in self._batches)

    def affordable(self, most: int) -> int:
        """So many examples, or fewer if they are large."""
        entries = max((entries_of(batch) for batch, _ in self._batches), default=1)
        return min(most, max(_FEWEST, _ENTRIES_AT_MOST // max(entries, 1)))

    def fitted(self, most: int) -> KeptExamples:
        """The first of these examples that are not held out, at most about so many."""
        result = copy.copy(self)
        most = self.affordable(most)
        result._batches, result.total = [], 0
        for index, (batch, count) in enumerate(self._batches):
            if not held_out(index) and result.total < most:
                result._batches.append((batch, count))
                result.total += count
        return result

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for batch, count in self._batches:
            yield tensors.map_structure(self._store.load, batch), count


def held_out(index: int) -> bool:
    """Whether a batch judges what is fitted to the others: every fourth does."""
    return index % FEWEST_BATCHES == FEWEST_BATCHES - 1


def check_differ(examples: Examples | KeptExamples) -> None:
    """Raises a ValueError if there are fewer different examples than are needed.

    No more are read than it takes to know. Sparse and ragged inputs and texts are not compared.
    """
    found: set[bytes] = set()
    total = 0
    for batch, count in examples:
        arrays = [tensors.without_raggedness(x) for x in tensors.flatten(batch)]
        if any(map(tensors.is_sparse, arrays)) or any(len(x) != count for x in arrays):
            return
        values = [tensors.to_numpy(x) for x in arrays]
        if any(x.dtype.kind not in "biuf" for x in values):
            return
        values = [x + 0 for x in values]  # -0 is 0
        found.update(b"".join(x[row].tobytes() for x in values) for row in range(count))
        total += count
        if len(found) >= MIN_EXAMPLES:
            return
    raise ValueError(
        f"Expected at least {MIN_EXAMPLES} different examples in `calibration_data`, better a few "
        f"hundred. Received: {len(found)} among {total}"
    )


def with_progress(
    examples: Examples | KeptExamples, progress: Progress, description: str
) -> Iterator[tuple[Any, int]]:
    """The batches of examples, with a progress bar."""
    task = progress.add_task(description, total=examples.total)
    for batch, count in in_parts(examples):
        yield batch, count
        progress.advance(task, count)

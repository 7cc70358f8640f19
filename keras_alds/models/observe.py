"""Streaming statistics of what a model's layers see: `CalibrationStats`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import numbers
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf
from rich.progress import Progress

from keras_alds import _backend
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.moments import FewInputs, SecondMoment
from keras_alds.core.calibration.patches import CHUNK_ROWS
from keras_alds.core.parallel import threads
from keras_alds.core.slicing import Array, kernel_sizes
from keras_alds.core.spectra import Spectra
from keras_alds.models import inspect, recurrent
from keras_alds.models.functions import run_as_code
from keras_alds.models.storage import Store

#: Makes the spectra of kernels and their moments.
Decompose = Callable[[Sequence[Array], Sequence[SecondMoment]], list[Spectra]]

STATS_VERSION = 1
#: Fewer examples than this say next to nothing of what a layer sees.
MIN_EXAMPLES = 8
DEFAULT_EXAMPLES = 1024
# Examples that go through the model at once, and entries of theirs: large images go in fewer.
_BATCH = 32
_BATCH_ENTRIES = 1 << 21
# Entries of a weight that are copied at once for its fingerprint.
_FINGERPRINT_ENTRIES = 1 << 22
# The squares of what is smaller can be added up in float32.
_LARGEST = 1e16
# Parts of one call of one layer that threads work on side by side.
_PARTS = 4


class CalibrationStats:
    """Second moments of every layer's unfolded inputs, from a model and unlabelled examples.

    They are collected in one pass and can be used for any `cr`, and saved. Layers with more than
    5120 unfolded inputs (a dense layer behind a large `Flatten`) keep diagonal blocks of S only,
    so that their number of slices is a multiple of the number of blocks; `blocks` tells.

    Args:
        moments: `{path: SecondMoment}`, None for a layer that no example reached.
        kernel_shapes: `{path: kernel shape}` of the same layers, in the model's order.
        examples: Number of examples seen.
        fingerprint: SHA-256 of the weights of the model that was run.

    Raises:
        ValueError: If the layers of `moments` and `kernel_shapes` differ.

    Example:
    ```python
    stats = keras_alds.CalibrationStats.collect(model, x, verbose=0)
    for cr in (0.3, 0.5):
        small = keras_alds.compress(model, cr, calibration_data=stats)
    stats.save("stats.npz")
    ```

    References:
        BALF, arXiv:2509.25136: factorization of a layer by the second moment of its inputs.
    """

    def __init__(
        self,
        moments: Mapping[str, SecondMoment | None],
        kernel_shapes: Mapping[str, tuple[int, ...]],
        *,
        examples: int,
        fingerprint: str,
    ) -> None:
        if list(moments) != list(kernel_shapes):
            raise ValueError(
                "Expected moments and kernel shapes of the same layers. "
                f"Received: moments of {list(moments)}, kernel shapes of {list(kernel_shapes)}"
            )
        self.moments = MappingProxyType(dict(moments))
        self.kernel_shapes = MappingProxyType(dict(kernel_shapes))
        self.examples = examples
        self.fingerprint = fingerprint
        self._spectra: dict[tuple[str, Decompose], tuple[bytes, Spectra]] = {}

    def __repr__(self) -> str:
        return f"<CalibrationStats of {len(self.moments)} layers, {self.examples} examples>"

    @classmethod
    def collect(
        cls,
        model: Any,
        data: Any,
        *,
        max_examples: int | None = DEFAULT_EXAMPLES,
        verbose: int = 1,
    ) -> CalibrationStats:
        """Runs `model` on `data` and collects the second moments of its layers' inputs.

        The model runs as in inference, at most 32 examples at a time (or as many as its inputs
        have where their batch size is fixed), and is not changed. Memory does not grow with the
        number of examples: beside the sums only the patches of one layer and one chunk are held,
        and of wide dense layers a bounded number of inputs.

        Args:
            model: A built Keras 3 or tf_keras model of any kind.
            data: Examples without labels, or with labels that are ignored (`(x, y)`): an array;
                a list or dict of arrays for several inputs; a batched `tf.data.Dataset`; a
                `keras.utils.PyDataset`; or any generator or iterable of batches.
            max_examples: Use at most so many; of arrays evenly spaced rows, of everything else
                the first ones. None for all. Defaults to 1024.
            verbose: 0 for silence, else a progress bar is shown on a terminal. Defaults to 1.

        Returns:
            The `CalibrationStats`.

        Raises:
            ValueError: If `data` is none of these, has another shape than the model's inputs, is
                not numeric, holds NaN or infinity, or has fewer than 8 examples; or if a layer
                gets NaN or infinity from the layers before it.

        Example:
        ```python
        stats = keras_alds.CalibrationStats.collect(model, x, max_examples=512, verbose=0)
        ```
        """
        if max_examples is not None and (
            not isinstance(max_examples, numbers.Integral) or max_examples < MIN_EXAMPLES
        ):
            raise ValueError(
                f"Expected `max_examples` to be an integer of at least {MIN_EXAMPLES}, or None. "
                f"Received: max_examples={max_examples!r}"
            )
        source = Examples(model, data, max_examples)
        return cls._observed(model, source, source.total, verbose)

    @classmethod
    def _observed(
        cls, model: Any, source: Iterable[tuple[Any, int]], total: int | None, verbose: int
    ) -> CalibrationStats:
        specs = candidates(model)
        observer = _Observer(specs)
        examples = 0
        with (
            Progress(transient=True, disable=not verbose) as progress,
            run_as_code(model),
            observer.watching(model),
        ):
            task = progress.add_task("calibration", total=total)
            for batch, count in source:
                model(batch, training=False)
                examples += count
                progress.update(task, completed=examples)
        check_count(examples)
        found = observer.moments()
        return cls(
            {spec.path: found.get(spec.path) for spec in specs},
            {spec.path: tuple(spec.kernel_shape or ()) for spec in specs},
            examples=examples,
            fingerprint=fingerprint(model),
        )

    @property
    def blocks(self) -> dict[str, int]:
        """Layers that keep only diagonal blocks of their second moment, and how many."""
        return {
            path: moment.block_count
            for path, moment in self.moments.items()
            if moment is not None and moment.block_count > 1
        }

    def match(self, model: Any) -> dict[int, SecondMoment | None]:
        """The moments by the id of the layers of `model`, found by name or else by order.

        Raises:
            ValueError: If the model has other layers than the one that was run.
        """
        specs = candidates(model)
        shapes = [tuple(spec.kernel_shape or ()) for spec in specs]
        if {spec.path: shape for spec, shape in zip(specs, shapes, strict=True)} == dict(
            self.kernel_shapes
        ):
            return {id(spec.layer): self.moments[spec.path] for spec in specs}
        if list(self.kernel_shapes.values()) == shapes:
            return {
                id(spec.layer): moment
                for spec, moment in zip(specs, self.moments.values(), strict=True)
            }
        raise ValueError(
            f"Expected calibration statistics of the model '{model.name}', or of one of the same "
            f"architecture. Received: statistics of {len(self.moments)} layers, where the model "
            f"has {len(specs)} that can be factorized, or other kernels. Collect them anew."
        )

    def spectra(
        self, kernels: Mapping[str, tuple[bytes, Array, SecondMoment]], decompose: Decompose
    ) -> list[Spectra]:
        """The spectra of the outputs of some layers, kept for the next call.

        Args:
            kernels: `{path: (digest of the kernel, kernel, its moment)}`.
            decompose: Makes the spectra of kernels and moments; see `Method.spectra`.

        Returns:
            One `Spectra` a layer, in order.
        """
        new = {
            path: value
            for path, value in kernels.items()
            if self._spectra.get((path, decompose), (b"",))[0] != value[0]
        }
        found = decompose([k for _, k, _ in new.values()], [m for *_, m in new.values()])
        for path, spectra in zip(new, found, strict=True):
            self._spectra[path, decompose] = (new[path][0], spectra)
        return [self._spectra[path, decompose][1] for path in kernels]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to `path`, an .npz file."""
        reached = [(name, moment) for name, moment in self.moments.items() if moment is not None]
        meta = {
            "format": "keras_alds.CalibrationStats",
            "version": STATS_VERSION,
            "examples": self.examples,
            "fingerprint": self.fingerprint,
            "layers": [[name, shape] for name, shape in self.kernel_shapes.items()],
            "counts": {name: moment.count for name, moment in reached},
        }
        with zipfile.ZipFile(path, "w") as file:
            _write(file, "meta", np.array(json.dumps(meta)))
            for n, (_, moment) in enumerate(reached):  # one at a time: they are large
                if isinstance(moment, FewInputs):
                    _write(file, f"rows_{n}", moment.rows)
                    _write(file, f"parts_{n}", np.array(moment.block_count))
                else:
                    _write(file, f"blocks_{n}", moment.blocks)
                if moment.mean is not None:
                    _write(file, f"mean_{n}", moment.mean)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStats:
        """Reads statistics that `save` wrote.

        Raises:
            ValueError: If the file holds no such statistics, or those of another version.
        """
        where = f"Expected the calibration statistics of keras_alds in {os.fspath(path)!r}. "
        try:
            with np.load(path) as file:
                meta = json.loads(str(file["meta"]))
                if meta["format"] != "keras_alds.CalibrationStats":
                    raise ValueError(f"format {meta['format']!r}")
                if meta["version"] == STATS_VERSION:
                    return cls._read(meta, file)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{where}Received: a file that holds none ({error})") from error
        raise ValueError(
            f"Expected calibration statistics of version {STATS_VERSION}. "
            f"Received: version={meta['version']!r}. Collect them anew."
        )

    @classmethod
    def _read(cls, meta: Mapping[str, Any], file: Mapping[str, Array]) -> CalibrationStats:
        moments: dict[str, SecondMoment | None] = {name: None for name, _ in meta["layers"]}
        for n, (name, count) in enumerate(meta["counts"].items()):
            mean = file.get(f"mean_{n}")  # older files have none
            if f"rows_{n}" in file:
                rows, blocks = file[f"rows_{n}"], int(file[f"parts_{n}"])
                moments[name] = FewInputs(rows, blocks, mean=mean is not None)
            else:
                moments[name] = SecondMoment(file[f"blocks_{n}"], int(count), mean)
        return cls(
            moments,
            {name: tuple(shape) for name, shape in meta["layers"]},
            examples=int(meta["examples"]),
            fingerprint=meta["fingerprint"],
        )


def _write(file: zipfile.ZipFile, name: str, array: Array) -> None:
    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def check_count(examples: int, argument: str = "calibration_data") -> None:
    """Raises a ValueError if there are too few examples."""
    if examples < MIN_EXAMPLES:
        raise ValueError(
            f"Expected at least {MIN_EXAMPLES} examples in `{argument}`; some hundreds are good. "
            f"Received: {examples}" + (" (was a generator used up before?)" if not examples else "")
        )


def check_data(model: Any, data: Any) -> None:
    """Raises a ValueError if `calibration_data` are seen to be wrong without using them up."""
    if isinstance(data, CalibrationStats):
        data.match(model)
        return
    examples = Examples(model, data, DEFAULT_EXAMPLES)
    if hasattr(data, "__next__"):
        return  # it cannot be begun again
    seen = 0
    for _, count in examples:
        seen += count
        if seen >= MIN_EXAMPLES:
            return
    check_count(seen)


class KeptExamples:
    """Checked calibration data that were read once and can be run again, in bounded memory.

    Args:
        model: The model that they are for.
        data: What a user gives as `calibration_data`.

    Raises:
        ValueError: As `CalibrationStats.collect`.
    """

    def __init__(self, model: Any, data: Any) -> None:
        self._store = Store()
        self._batches: list[tuple[Any, int]] = []
        for batch, count in Examples(model, data, DEFAULT_EXAMPLES):
            self._batches.append((tf.nest.map_structure(self._store.keep, batch), count))
        check_count(self.count)

    @property
    def count(self) -> int:
        """The number of examples."""
        return sum(count for _, count in self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for batch, count in self._batches:
            yield tf.nest.map_structure(self._store.load, batch), count


@dataclasses.dataclass
class Calibration:
    """What is known of a model's layers: statistics, examples to run again, or both.

    Attributes:
        stats: The statistics, None if they are not collected yet.
        examples: The examples, None if there are none or they are not wanted again.
    """

    stats: CalibrationStats | None = None
    examples: KeptExamples | None = None

    @classmethod
    def of(cls, model: Any, data: Any, *, keep: bool, verbose: int = 1) -> Calibration:
        """What `calibration_data` give.

        Args:
            model: The model.
            data: What a user gives, or a `Calibration`.
            keep: Whether the examples are wanted again; else the statistics are collected.
            verbose: As for `CalibrationStats.collect`.
        """
        if isinstance(data, Calibration):
            return data
        if keep and not isinstance(data, CalibrationStats):
            return cls(examples=KeptExamples(model, data))
        return cls(stats=calibration_stats(model, data, verbose=verbose))

    def collected(self, model: Any, *, verbose: int = 1) -> CalibrationStats:
        """The statistics, collected now if they were not yet."""
        if self.stats is None:
            self.stats = calibration_stats(model, self.examples, verbose=verbose)
        return self.stats


def calibration_stats(model: Any, data: Any, *, verbose: int = 1) -> CalibrationStats:
    """The statistics that `data` are, or those that are collected from them.

    Raises:
        ValueError: As `CalibrationStats.collect` and `CalibrationStats.match`.
    """
    if isinstance(data, KeptExamples):
        return CalibrationStats._observed(model, data, data.count, verbose)
    if not isinstance(data, CalibrationStats):
        return CalibrationStats.collect(model, data, verbose=verbose)
    data.match(model)
    if data.fingerprint != fingerprint(model):
        warnings.warn(
            f"The calibration statistics were collected with other weights than the model "
            f"'{model.name}' has now. Collect them anew if it was trained much since.",
            stacklevel=2,
        )
    return data


def candidates(model: Any) -> list[inspect.LayerSpec]:
    """The layers of `model` that can be factorized, whatever a user excludes."""
    specs, _ = inspect.inspect_model(model)
    return [spec for spec in specs if spec.reason is None]


def fingerprint(model: Any) -> str:
    """SHA-256 of all weights of a model, in order."""
    digest = hashlib.sha256()
    for variable in model.weights:  # in parts: a copy of a wide kernel is half a gigabyte
        if not hasattr(variable, "shape"):
            continue  # the vocabulary of an adapted layer
        tensor = tf.reshape(tf.convert_to_tensor(variable), [-1])
        for start in range(0, tensor.shape[0], _FINGERPRINT_ENTRIES):
            values = tensor[start : start + _FINGERPRINT_ENTRIES].numpy()
            digest.update(values.view(np.uint8).data)
    return digest.hexdigest()


# -- What the layers see -------------------------------------------------------------------------


class _Observer:
    """Accumulates the second moments of the inputs of some layers of a running model."""

    def __init__(self, specs: list[inspect.LayerSpec]) -> None:
        self._specs = {id(spec.layer): spec for spec in specs if observable(spec.layer)}
        self._sums: dict[int, MomentAccumulator] = {}

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Observes every call of the layers while inside."""
        backend = _backend.backend_of(model)
        layers = [spec.layer for spec in self._specs.values()]
        with (
            threads() as self._pool,
            backend.watching_calls(layers, self._see),
            calling_kernels(model, layers),
        ):
            yield

    def _see(self, layer: Any, inputs: Any, outputs: Any) -> Any:
        return when_known(inputs, outputs, lambda x: self._add(layer, x))

    def _add(self, layer: Any, inputs: Array) -> None:
        spec = self._specs[id(layer)]
        check_finite(inputs, spec.path)
        c, kappa, _ = kernel_sizes(spec.kernel_shape or ())
        sums = self._sums.setdefault(id(layer), MomentAccumulator(c, kappa))
        x = layer_inputs(layer, inputs)
        if math.prod(x.shape[:-1]) < CHUNK_ROWS:
            for chunk in layer_patches(layer, x):
                sums.add(chunk)
            return
        # Not by the number of workers: the same parts everywhere give the same bits.
        parts = np.array_split(x, _PARTS if c * kappa <= CHUNK_ROWS else 2)
        sums.add_parts([layer_patches(layer, part) for part in parts if part.size], self._pool)

    def moments(self) -> dict[str, SecondMoment | None]:
        """The second moments by path; ends the observation."""
        found: dict[str, SecondMoment | None] = {}
        for key, spec in self._specs.items():
            sums = self._sums.pop(key, None)
            found[spec.path] = sums.moment() if sums is not None else None
        return found


def check_finite(inputs: Array, path: str) -> None:
    """Raises a ValueError if a layer gets NaN, infinity or what has no finite square."""
    largest = float(np.abs(inputs).max(initial=0.0))  # NaN if there is one
    if not largest < _LARGEST:
        raise ValueError(
            "Expected finite values in the whole model, of finite squares. Received: "
            + (f"{largest:g}" if np.isfinite(largest) else "NaN or infinity")
            + f" in the input of layer '{path}'. Look at the layers before it and at the range of "
            "the data."
        )


def when_known(inputs: Any, outputs: Any, use: Callable[[Array], None]) -> Any:
    """Calls `use` with the values of `inputs`, at once or when the graph being traced runs.

    Returns:
        What is to be handed on as `outputs`.
    """
    x = tf.convert_to_tensor(inputs)
    if x.dtype not in (tf.float32, tf.float64):
        x = tf.cast(x, tf.float32)
    if hasattr(x, "numpy"):
        use(x.numpy())
        return outputs

    def run(values: Array) -> np.bool_:
        use(values)
        return np.bool_(True)

    # Inside a function or loop of the model's own, such as that of `TimeDistributed`.
    done = tf.numpy_function(run, [x], tf.bool, stateful=True)
    with tf.control_dependencies([done]):
        return tf.nest.map_structure(tf.identity, outputs)


def layer_inputs(layer: Any, inputs: Array) -> Array:
    """The inputs of one call as `[batch, *spatial, channels]`, or `[batch, channels]`."""
    return known_kind(layer).batches(layer, inputs)


def layer_patches(layer: Any, inputs: Array) -> Iterator[Array]:
    """The unfolded inputs of a stock layer, in chunks; see `patch_chunks`."""
    return known_kind(layer).patches(layer, inputs)


# -- Calibration data ----------------------------------------------------------------------------


class Examples:
    """Calibration data of any kind as checked batches of a model's inputs, without labels.

    Iterating yields `(inputs, number of examples)` with at most 32 examples at a time. Where the
    model's inputs have a fixed batch size it is that one, and what is left over is left out.

    Args:
        model: The model.
        data: What a user gives as `calibration_data` or `representative_data`.
        limit: Largest number of examples, or None.
        argument: What the user's argument is called, for errors.

    Raises:
        ValueError: If `data` cannot be calibration data; while iterating, for bad batches.
    """

    def __init__(
        self, model: Any, data: Any, limit: int | None, argument: str = "calibration_data"
    ) -> None:
        _backend.backend_of(model).check_call(model)
        self._limit, self._argument = limit, argument
        sizes = {tensor.shape[0] for tensor in getattr(model, "inputs", None) or []}
        #: Examples in a batch if the model's inputs say so.
        self._fixed: int | None = sizes.pop() if len(sizes) == 1 else None
        self._names: list[str] = [
            tensor._keras_history[0].name for tensor in getattr(model, "inputs", None) or []
        ]
        structure = self._input_specs(model)
        self._single = structure is not None and not tf.nest.is_nested(structure)
        self._specs: list[Any] = [] if structure is None else tf.nest.flatten(structure)
        data = self._without_labels(data)
        arrays = self._as_arrays(data)
        self.total: int | None = None
        self._batches: Iterable[Any]
        if arrays is not None:
            rows = self._rows(arrays)
            self.total = rows if limit is None else min(rows, limit)
            chosen = np.linspace(0, rows, self.total, endpoint=False).astype(int)
            self._batches = (
                tf.nest.map_structure(lambda a, c=chosen[i : i + _BATCH]: a[c], arrays)
                for i in range(0, self.total, _BATCH)
            )
        elif isinstance(data, tf.data.Dataset):
            self._batches = data
            self.total = limit
        elif hasattr(data, "__getitem__") and not isinstance(data, (list, tuple, str, bytes)):
            count = len(data) if hasattr(data, "__len__") else None
            indices = itertools.count() if count is None else range(count)
            self._batches = (data[i] for i in indices)
        elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
            self._batches = data
        else:
            raise ValueError(
                f"Expected `{argument}` to be an array, a list or dict of arrays for several "
                "inputs, a tf.data.Dataset, a PyDataset or an iterable of batches. "
                f"Received: {type(data).__name__}"
            )

    @staticmethod
    def _input_specs(model: Any) -> Any:
        try:
            return _backend.backend_of(model).input_specs(model)
        except ValueError:
            return None  # a subclassed model that tells nothing of its inputs

    @property
    def _inputs(self) -> int:
        return max(len(self._specs), 1)

    def _without_labels(self, data: Any) -> Any:
        """The inputs of `(x, y)` or `(x, y, weights)`; a tuple may also be several inputs."""
        if not isinstance(data, tuple) or not data:
            return data
        first = data[0]
        if self._inputs > 1 and len(data) == self._inputs and not isinstance(first, (list, dict)):
            return first if isinstance(first, tuple) else list(data)
        return first

    def _as_arrays(self, data: Any) -> Any:
        """The structure of arrays that `data` is, or None."""
        if isinstance(data, dict):
            return {key: self._array(value) for key, value in data.items()}
        if isinstance(data, list) and data:
            items = [self._array(item) for item in data if _is_array(item)]
            if len(items) < len(data):
                nested = any(isinstance(item, (tuple, list, dict)) for item in data)
                return None if nested else self._array(data)
            if self._inputs > 1 and len(items) == self._inputs:
                return items
            one_less = self._specs and items[0].ndim == len(self._specs[0].shape) - 1
            return np.stack(items) if one_less else None
        return self._array(data) if _is_array(data) else None

    def _rows(self, arrays: Any) -> int:
        rows = {len(array) if array.ndim else 0 for array in tf.nest.flatten(arrays)}
        if len(rows) != 1:
            raise ValueError(
                f"Expected all inputs in `{self._argument}` to have as many examples. "
                f"Received: {sorted(rows)}"
            )
        return rows.pop()

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        left = self._limit
        waiting: Any = None
        seen = False
        for element in self._batches:
            inputs = self._checked(self._without_labels(element))
            self._rows(inputs)
            if waiting is not None and _sizes(waiting) != _sizes(inputs):
                rows = self._rows(waiting)
                if rows and not self._fixed:
                    yield _tensors(waiting), rows
                left = None if left is None else left - rows
                waiting = None  # examples of another size follow
            if waiting is not None:
                inputs = tf.nest.map_structure(lambda a, b: np.concatenate([a, b]), waiting, inputs)
            if left is not None:
                inputs = _part(inputs, 0, left)
            rows = self._rows(inputs)
            # Always as many together: how the data were batched changes no bit of the result.
            size = self._fixed or _examples_at_once(inputs)
            whole = rows - rows % size
            for start in range(0, whole, size):
                yield _tensors(_part(inputs, start, start + size)), size
                seen = True
            waiting = _part(inputs, whole, rows)
            if left is not None:
                left -= whole
                if left == rows - whole:
                    break
        if waiting is not None and (rows := self._rows(waiting)) and not (self._fixed and seen):
            yield _tensors(waiting), rows

    def _checked(self, inputs: Any) -> Any:
        if self._single and isinstance(inputs, (list, dict)) and len(inputs) == 1:
            (inputs,) = inputs.values() if isinstance(inputs, dict) else inputs
        flat = [self._array(item) for item in tf.nest.flatten(inputs)]
        names = [f"input {n}" for n in range(len(flat))]
        specs = self._specs
        if isinstance(inputs, dict):
            names = sorted(inputs)  # as `tf.nest.flatten` does
            if set(names) == set(self._names):
                specs = [self._specs[self._names.index(name)] for name in names]
        if specs and len(flat) != len(specs):
            raise ValueError(
                f"Expected `{self._argument}` for {len(specs)} inputs. Received: {len(flat)}"
                + (" in a list; labels go into a tuple, (x, y)" if isinstance(inputs, list) else "")
                + (f", {names}, where the model has {self._names}" * isinstance(inputs, dict))
            )
        cast = [
            self._checked_array(array, name, spec)
            for array, name, spec in itertools.zip_longest(flat, names, specs)
        ]
        return tf.nest.pack_sequence_as(inputs, cast)

    def _array(self, value: Any) -> Array:
        if isinstance(value, tf.Tensor) and value.dtype == tf.bfloat16:
            value = tf.cast(value, tf.float32)
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(
                f"Expected `{self._argument}` of one shape. Received: data that make no array "
                f"({error})"
            ) from error
        texts = array.dtype.kind in "OSU" and any(spec.dtype == tf.string for spec in self._specs)
        if array.dtype.kind not in "biuf" and not texts:
            raise ValueError(
                f"Expected `{self._argument}` of numbers. Received: dtype={array.dtype} of "
                f"type {type(value).__name__}"
            )
        return array

    def _checked_array(self, array: Array, name: str, spec: Any) -> Array:
        if spec is not None:
            wanted = tuple(spec.shape)[1:]
            fits = array.ndim == len(wanted) + 1 and all(
                n is None or n == m for n, m in zip(wanted, array.shape[1:], strict=True)
            )
            if not fits:
                raise ValueError(
                    f"Expected batches in `{self._argument}` of shape (batch, "
                    f"{', '.join(str(n) for n in wanted)}) for {name}. "
                    f"Received: shape={array.shape}"
                    + (" of one example: batch the data" if array.ndim == len(wanted) else "")
                )
            array = array.astype(tf.as_dtype(spec.dtype).as_numpy_dtype, copy=False)
        elif array.dtype.kind != "f":
            array = array.astype(np.float32)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"Expected finite `{self._argument}`. Received: NaN or infinity in {name}"
            )
        return array


def _sizes(inputs: Any) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in tf.nest.flatten(inputs)]


def _examples_at_once(inputs: Any) -> int:
    """How many examples such as these go through a model together, a power of two."""
    entries = sum(math.prod(size) for size in _sizes(inputs))
    return min(_BATCH, 1 << max(_BATCH_ENTRIES // max(entries, 1), 1).bit_length() - 1)


def _part(inputs: Any, start: int, stop: int) -> Any:
    return tf.nest.map_structure(lambda array: array[start:stop], inputs)


def _tensors(inputs: Any) -> Any:
    return tf.nest.map_structure(tf.convert_to_tensor, inputs)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (
        hasattr(value, "__array__") and not isinstance(value, tf.data.Dataset)
    )

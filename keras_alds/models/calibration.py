"""`CalibrationStats`: the second moments of layer inputs, collected, cached and saved."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from types import MappingProxyType
from typing import Any

import numpy as np

from keras_alds._backend import tensors
from keras_alds._backend.layers import KerasModel
from keras_alds.core.calibration.curves import Curve
from keras_alds.core.calibration.held_out import best_ridge
from keras_alds.core.calibration.moments import FewInputs, SecondMoment
from keras_alds.core.calibration.sums import joined
from keras_alds.core.methods import Decompose
from keras_alds.core.parallel import threads
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Spectra
from keras_alds.kinds.base import kernel_values, observable
from keras_alds.models.choices import Seen, check_executor, decomposed
from keras_alds.models.curves import measure_curves
from keras_alds.models.data import (
    DEFAULT_EXAMPLES,
    Examples,
    KeptExamples,
    check_differ,
    entries_of,
    held_out,
    is_iterator,
    with_progress,
)
from keras_alds.models.inventory import Inventory, LayerRecord
from keras_alds.models.minibatches import image_axes, shifted
from keras_alds.models.observe import Observer
from keras_alds.models.scale import ScaleCheck
from keras_alds.models.turns import alone
from keras_alds.progress import progress_bar
from keras_alds.tables import counted

STATS_VERSION = 2
# The attributes of `CalibrationStats` that cannot be pickled as they are.
_PROXIES = ("moments", "kernel_shapes", "curves")
#: The fewest examples that a call of an executor gets.
SHARD_EXAMPLES = 256
# Entries of a weight that are copied at once for the fingerprint.
_FINGERPRINT_ENTRIES = 1 << 22
#: The most held-out examples on which plans are judged, and on which layers are probed: small ones,
#: and large ones. And the most entries of small ones.
JUDGED_EXAMPLES, PROBED_EXAMPLES, PROBED_LARGE_EXAMPLES, SMALL_ENTRIES = 128, 128, 32, 1 << 14


@dataclasses.dataclass(frozen=True)
class _Known:
    """The spectra of a kernel with this digest, for the largest ranks by number of slices."""

    digest: bytes
    ranks: Mapping[int, int]
    spectra: Spectra

    def holds(self, seen: Seen) -> bool:
        """Whether all that matters now is here: a layer's curve needs more than most targets."""
        if self.digest != seen.digest:
            return False
        return self.ranks == seen.ranks or all(
            k in self.spectra.slices and self.ranks.get(k, 0) >= rank
            for k, rank in seen.ranks.items()
        )


class CalibrationStats:
    """Second moments S of every layer's unfolded inputs on unlabelled examples.

    They are collected in one pass, work for any `cr`, and can be saved. Every fourth batch is held
    out, and errors are those on it. In further runs of a few examples, each layer alone is cut, and
    what that does to the model's outputs is kept (`curves`). For layers with more than
    5120 unfolded inputs, such as a dense layer after a large `Flatten`, only diagonal blocks of S
    are kept. Their number of slices is then a multiple of the number of blocks; see `blocks`.

    The sum of two `CalibrationStats` of the same weights has the second moments of all their
    examples, so that several machines can collect them. The held-out examples are those of both,
    and the `curves` those of the first summand that has any.

    Args:
        moments: `{path: SecondMoment}`, None for a layer that no example reached.
        kernel_shapes: `{path: kernel shape}` of the same layers, in the model's order.
        examples: Number of examples.
        fingerprint: SHA-256 of the model's weights at the time.
        curves: `{path: Curve}`: what an error of each layer does to the model's outputs. Defaults
            to none: all errors count alike.

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
        curves: Mapping[str, Curve] | None = None,
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
        self.curves = MappingProxyType(dict(curves or {}))
        self._spectra: dict[tuple[str, int, Decompose], list[_Known]] = {}
        self._ridges_due = False  # of a sum: they depend on the kernels

    def __getstate__(self) -> dict[str, Any]:
        proxies = {name: dict(getattr(self, name)) for name in _PROXIES}
        return {**vars(self), **proxies, "_spectra": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self).update({name: MappingProxyType(state[name]) for name in _PROXIES})

    def __add__(self, other: object) -> CalibrationStats:
        """The statistics of the examples of both.

        Raises:
            ValueError: If they are of other weights.
        """
        if not isinstance(other, CalibrationStats):
            return NotImplemented
        ours, theirs = ((stats.fingerprint, dict(stats.kernel_shapes)) for stats in (self, other))
        if ours != theirs:
            raise ValueError(
                "Expected calibration statistics of one model with the same weights, to add up. "
                f"Received: fingerprints {self.fingerprint[:16]}… and {other.fingerprint[:16]}… "
                f"of {len(self.moments)} and {len(other.moments)} layers"
            )
        result = CalibrationStats(
            {path: joined(moment, other.moments[path]) for path, moment in self.moments.items()},
            self.kernel_shapes,
            examples=self.examples + other.examples,
            fingerprint=self.fingerprint,
            curves=self.curves or other.curves,
        )
        result._ridges_due = True
        return result

    def __repr__(self) -> str:
        return (
            f"<CalibrationStats of {counted(len(self.moments), 'layer')}, {self.examples} examples>"
        )

    @classmethod
    def collect(
        cls,
        model: KerasModel,
        data: Any,
        *,
        max_examples: int | None = DEFAULT_EXAMPLES,
        executor: Executor | None = None,
        verbose: int = 1,
    ) -> CalibrationStats:
        """Runs `model` on `data` and collects the second moments of its layers' inputs.

        The model runs in inference mode on at most 32 examples at a time, or on its fixed batch
        size, and is not changed. Memory does not grow with the number of examples.

        Args:
            model: A built Keras 3 or tf_keras model of any kind.
            data: Examples: an array; a list or dict of arrays for several inputs; a batched
                `tf.data.Dataset`; a `keras.utils.PyDataset`; any generator or iterable of batches;
                or a function that returns one of these. Labels, as in `(x, y)`, are ignored.
            max_examples: Largest number of examples to use: evenly spaced rows of arrays, and
                the first examples of everything else. None for all. Defaults to 1024.
            executor: Any `concurrent.futures.Executor` whose workers import this package, such as
                a `ProcessPoolExecutor` that spawns, or `client.get_executor()` of dask. Each of
                its calls gets the model and 256 examples or more; the results are added up.
                Defaults to None: this process.
            verbose: 0 prints nothing; otherwise a terminal shows a progress bar. Defaults to 1.

        Returns:
            The `CalibrationStats`.

        Raises:
            ValueError: If `data` has another type, does not fit the model's inputs, is not
                numeric, contains NaN or infinity, or has fewer than 8 examples; or if NaN or
                infinity arises inside the model.

        Example:
        ```python
        stats = keras_alds.CalibrationStats.collect(model, x, max_examples=512, verbose=0)
        ```
        """
        check_executor(executor)
        with alone(model):
            source = Examples(model, data, max_examples)
            if executor is None:
                return cls._observed(Inventory.of(model), source, verbose, stacklevel=2)
            shards = list(_shards(source))
        # Threads of an executor take turns with this model: other workers get copies.
        calls = [executor.submit(_collected, model, x, first=not n) for n, x in enumerate(shards)]
        return functools.reduce(operator.add, (call.result() for call in calls))

    @classmethod
    def _observed(
        cls,
        inventory: Inventory,
        source: Examples | KeptExamples,
        verbose: int,
        *,
        curves: bool = True,
        stacklevel: int,
    ) -> CalibrationStats:
        model, records = inventory.model, inventory.factorizable
        observer, scales = Observer(records), ScaleCheck(model)
        examples, judges = 0, _HeldOut()
        with progress_bar(verbose) as progress:
            with observer.watching(model, scales.watched()) as run:
                read = with_progress(source, progress, "calibration")
                for index, (batch, count) in enumerate(read):
                    run(batch, held_out(index))
                    examples += count
                    judges.add(index, batch, count)
            scales.warn(stacklevel=stacklevel + 1)
            moments = _regularized(records, observer.moments())
            stats = cls(
                {record.path: moments.get(record.path) for record in records},
                {record.path: tuple(record.kernel_shape or ()) for record in records},
                examples=examples,
                fingerprint=fingerprint(model),
            )
            judged = [
                r for r in stats.match(inventory).candidates if r.judged or not observable(r.layer)
            ]
            if curves and judged and (batches := judges.probing()):
                task = progress.add_task("outputs", total=len(judged))
                stats.curves = MappingProxyType(
                    measure_curves(model, judged, stats, batches, lambda: progress.advance(task))
                )
        return stats

    @property
    def blocks(self) -> dict[str, int]:
        """Number of diagonal blocks, for the layers that keep only blocks of their moment."""
        return {
            path: moment.block_count
            for path, moment in self.moments.items()
            if moment is not None and moment.block_count > 1
        }

    def match(self, inventory: Inventory) -> Inventory:
        """The inventory with the moments of its layers, matched by name or else by order.

        Raises:
            ValueError: If the statistics were collected on another architecture.
        """
        records = inventory.factorizable
        shapes = [tuple(record.kernel_shape or ()) for record in records]
        paths = [record.path for record in records]
        if dict(zip(paths, shapes, strict=True)) == dict(self.kernel_shapes):
            names = {path: path for path in paths}
        elif list(self.kernel_shapes.values()) == shapes:
            names = dict(zip(paths, self.kernel_shapes, strict=True))
        else:
            raise ValueError(
                f"Expected calibration statistics of the model '{inventory.model.name}', or of one "
                "of the same architecture. Received: statistics of "
                f"{counted(len(self.moments), 'layer')}, where the model has {len(records)} that "
                "can be factorized, or other kernels. Collect them again."
            )

        if self._ridges_due:
            own = {path: self.moments[name] for path, name in names.items()}
            found = _regularized(records, own)
            self.moments = MappingProxyType({names[path]: m for path, m in found.items()})
            self._ridges_due = False

        def measured(record: LayerRecord) -> LayerRecord:
            moment = self.moments.get(names.get(record.path, ""))
            ridge = None if moment is None else moment.relative_ridge
            curve = self.curves.get(names.get(record.path, ""))
            return dataclasses.replace(record, moment=moment, ridge=ridge, curve=curve)

        return inventory.map(measured)

    def spectra(
        self,
        kernels: Mapping[tuple[str, int], Seen],
        decompose: Decompose,
    ) -> list[Spectra]:
        """The output spectra of some layers, cached for later calls.

        Args:
            kernels: Kernels by path and fold scheme.
            decompose: Computes spectra from kernels and moments; see `Method.spectra`.

        Returns:
            One `Spectra` per layer, in order.
        """
        found: dict[tuple[str, int], Spectra] = {}
        for key, seen in kernels.items():
            for known in self._spectra.get((*key, decompose), []):
                if known.holds(seen):
                    found[key] = known.spectra
        missing = {key: seen for key, seen in kernels.items() if key not in found}
        new = decomposed(
            decompose,
            [seen.kernel for seen in missing.values()],
            [seen.moment() for seen in missing.values()],
            [seen.ranks for seen in missing.values()],
        )
        for (key, seen), spectra in zip(missing.items(), new, strict=True):
            place = (*key, decompose)
            kept = [one for one in self._spectra.get(place, []) if one.digest == seen.digest]
            self._spectra[place] = [*kept, _Known(seen.digest, seen.ranks, spectra)]
            found[key] = spectra
        return [found[key] for key in kernels]

    def warn_of_other_weights(self, model: Any, *, stacklevel: int) -> None:
        """Warns if the model's weights have changed since the statistics were collected."""
        if self.fingerprint != fingerprint(model):
            warnings.warn(
                f"The weights of the model '{model.name}' have changed since the calibration "
                "statistics were collected. Collect them again if it was trained for long.",
                stacklevel=stacklevel + 1,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to `path`, an .npz file."""
        reached = [(name, moment) for name, moment in self.moments.items() if moment is not None]
        meta = {
            "format": "keras_alds.CalibrationStats",
            "version": STATS_VERSION,
            "examples": self.examples,
            "ridges_due": self._ridges_due,
            "fingerprint": self.fingerprint,
            "layers": [[name, shape] for name, shape in self.kernel_shapes.items()],
            "counts": {name: moment.count for name, moment in reached},
            "ridges": {name: moment.relative_ridge for name, moment in reached},
            "curves": {name: dataclasses.asdict(curve) for name, curve in self.curves.items()},
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
                if (other := moment.held_out) is not None:
                    _write(file, f"held_count_{n}", np.array(other.count))
                    if not isinstance(moment, FewInputs):
                        _write(file, f"held_blocks_{n}", other.blocks)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStats:
        """Reads statistics that `save` wrote.

        Raises:
            ValueError: If the file does not contain statistics of this version.
        """
        where = f"Expected the calibration statistics of keras_alds in {os.fspath(path)!r}. "
        try:
            with np.load(path) as file:
                meta = json.loads(str(file["meta"]))
                if meta["format"] != "keras_alds.CalibrationStats":
                    raise ValueError(f"format {meta['format']!r}")
                if meta["version"] == STATS_VERSION:
                    return cls._read(meta, file)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            EOFError,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(f"{where}Received: a file without them ({error})") from error
        raise ValueError(
            f"Expected calibration statistics of version {STATS_VERSION}. "
            f"Received: version={meta['version']!r}. Collect them again."
        )

    @classmethod
    def _read(cls, meta: Mapping[str, Any], file: Mapping[str, Array]) -> CalibrationStats:
        moments: dict[str, SecondMoment | None] = {name: None for name, _ in meta["layers"]}
        for n, (name, count) in enumerate(meta["counts"].items()):
            moment = cls._read_moment(n, int(count), file)
            held: SecondMoment | None = None
            if f"held_count_{n}" in file:
                held_count = int(file[f"held_count_{n}"])
                if isinstance(moment, FewInputs):
                    held = FewInputs(moment.rows[-held_count:], moment.block_count, mean=False)
                else:
                    held = SecondMoment(file[f"held_blocks_{n}"], held_count)
            moments[name] = moment = moment.with_ridge(meta["ridges"][name])
            moment.held_out = held
        curves = {
            name: Curve(tuple(curve["errors"]), tuple(curve["divergences"]))
            for name, curve in meta["curves"].items()
        }
        stats = cls(
            moments,
            {name: tuple(shape) for name, shape in meta["layers"]},
            examples=int(meta["examples"]),
            fingerprint=meta["fingerprint"],
            curves=curves,
        )
        stats._ridges_due = meta.get("ridges_due", False)
        return stats

    @staticmethod
    def _read_moment(n: int, count: int, file: Mapping[str, Array]) -> SecondMoment:
        mean = file.get(f"mean_{n}")
        if f"rows_{n}" in file:
            return FewInputs(file[f"rows_{n}"], int(file[f"parts_{n}"]), mean=mean is not None)
        return SecondMoment(file[f"blocks_{n}"], count, mean)


def _shards(source: Examples) -> Iterator[list[Any]]:
    """The batches of examples, in lists of at least `SHARD_EXAMPLES` examples."""
    shard: list[Any] = []
    held: list[Any] = []  # until it is known that enough follow
    count = 0
    for batch, size in source:
        shard.append(batch)
        count += size
        if count >= SHARD_EXAMPLES:
            if held:
                yield held
            held, shard, count = shard, [], 0
    yield [*held, *shard]


def _collected(model: KerasModel, shard: list[Any], *, first: bool) -> CalibrationStats:
    """What a worker does; the first one also measures the curves."""
    with alone(model):
        source = Examples(model, iter(shard), None)
        inventory = Inventory.of(model)
        return CalibrationStats._observed(inventory, source, 0, curves=first, stacklevel=2)


class _HeldOut:
    """Divides the first held-out examples: some probe layers, and others judge whole plans.

    A plan that was chosen with some examples looks better on these than on others.

    Args:
        judging: The most examples that judge. Defaults to 0: they only probe.
    """

    def __init__(self, judging: int = 0) -> None:
        self._most = judging
        self._probing: list[Any] = []
        self._judging: list[Any] = []
        self._probes = self._judges = 0
        self._small = False

    def add(self, index: int, batch: Any, count: int) -> None:
        """Takes in a batch of `count` examples if it is held out and one of the first."""
        if not held_out(index):
            return
        self._small = entries_of(batch) <= SMALL_ENTRIES
        enough = self._probes >= (PROBED_EXAMPLES if self._small else PROBED_LARGE_EXAMPLES)
        if not enough and self._probes <= self._judges:
            self._probing.append(batch)
            self._probes += count
        else:
            if self._judges < self._most:
                self._judging.append(batch)
            self._judges += count

    def probing(self) -> list[Any]:
        """The batches that probe."""
        return self._with_copies(self._probing)

    def judging(self) -> list[Any]:
        """The batches that judge; those that probe if there are no others."""
        return self._with_copies(self._judging or self._probing)

    def _with_copies(self, batches: list[Any]) -> list[Any]:
        """The batches, of small images also shifted copies.

        A network may know the examples themselves from its training, and is then too sure of them.
        """
        if not self._small or not all(map(image_axes, batches)):
            return batches
        random = np.random.default_rng(0)
        copies = [shifted(batch, random) for batch in batches]
        return [*batches, *(tensors.map_structure(tensors.tensor, copy) for copy in copies)]


def _regularized(
    records: Sequence[LayerRecord], moments: Mapping[str, SecondMoment | None]
) -> dict[str, SecondMoment | None]:
    """The moments with the ridges that give the least errors on held-out inputs."""

    def regularized(record: LayerRecord) -> SecondMoment | None:
        moment = moments.get(record.path)
        if moment is None:
            return None
        return moment.with_ridge(best_ridge(kernel_values(record.layer), moment))

    with threads() as pool:
        return dict(zip((r.path for r in records), pool.map(regularized, records), strict=True))


def _write(file: zipfile.ZipFile, name: str, array: Array) -> None:
    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def check_data(inventory: Inventory, data: Any) -> None:
    """Checks `calibration_data` as far as possible without consuming an iterator."""
    if isinstance(data, CalibrationStats):
        data.match(inventory)
        return
    examples = Examples(inventory.model, data, DEFAULT_EXAMPLES)
    if is_iterator(data):
        return  # it cannot be restarted
    check_differ(examples)


@dataclasses.dataclass
class Calibration:
    """Calibration statistics, examples for more forward passes, or both.

    Attributes:
        stats: The statistics; None until they are collected.
        examples: The examples; None if they were not kept.
    """

    stats: CalibrationStats | None = None
    examples: KeptExamples | None = None

    @classmethod
    def of(
        cls,
        inventory: Inventory,
        data: Any,
        *,
        stacklevel: int = 1,
    ) -> Calibration:
        """Makes a `Calibration` from `calibration_data`.

        Args:
            inventory: The model.
            data: The user's `calibration_data`, or a `Calibration`.
            stacklevel: The frame that warnings name; 1 is the caller of this function.

        Raises:
            ValueError: As for `CalibrationStats.collect` and `CalibrationStats.match`.
        """
        if isinstance(data, Calibration):
            return data
        if isinstance(data, CalibrationStats):
            data.match(inventory)
            data.warn_of_other_weights(inventory.model, stacklevel=stacklevel + 1)
            return cls(stats=data)
        examples = KeptExamples(inventory.model, data)
        check_differ(examples)
        return cls(examples=examples)

    def collected(
        self,
        inventory: Inventory,
        *,
        curves: bool = True,
        verbose: int = 1,
        stacklevel: int = 1,
    ) -> CalibrationStats:
        """The statistics, collected on the first call.

        Args:
            inventory: The model.
            curves: Whether to measure what the layers' errors do to the outputs.
            verbose: As for `CalibrationStats.collect`.
            stacklevel: As for `Calibration.of`.
        """
        if self.stats is None and self.examples is not None:
            self.stats = CalibrationStats._observed(
                inventory, self.examples, verbose, curves=curves, stacklevel=stacklevel + 1
            )
        if self.stats is None:
            raise ValueError("Expected statistics or examples. Received: neither")
        return self.stats

    def judging(self) -> list[Any]:
        """Batches of held-out examples to judge a whole plan; none without examples."""
        return self._held_out().judging()

    def probing(self) -> list[Any]:
        """Those that probe single layers."""
        return self._held_out().probing()

    def _held_out(self) -> _HeldOut:
        if self.examples is None:
            return _HeldOut()
        held = _HeldOut(self.examples.affordable(JUDGED_EXAMPLES))
        for index, (batch, count) in enumerate(self.examples):
            held.add(index, batch, count)
        return held


def fingerprint(model: Any) -> str:
    """SHA-256 of all weights of a model, in order."""
    digest = hashlib.sha256()
    for variable in model.weights:  # in parts, as a wide kernel takes half a gigabyte
        if not hasattr(variable, "shape"):
            continue  # the vocabulary of an adapted layer
        tensor = tensors.reshape(tensors.tensor(variable), [-1])
        for start in range(0, tensor.shape[0], _FINGERPRINT_ENTRIES):
            values = tensor[start : start + _FINGERPRINT_ENTRIES].numpy()
            digest.update(values.view(np.uint8).data)
    return digest.hexdigest()

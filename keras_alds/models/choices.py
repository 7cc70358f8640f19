"""Tables of cost and error for the choices of every layer, with cached spectra."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

import numpy as np

from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.chains import decomposer, is_chain
from keras_alds.core.choices import ChoiceTable, choice_table, join_tables
from keras_alds.core.costs import Costs
from keras_alds.core.errors import get_error
from keras_alds.core.methods import Decompose, Method
from keras_alds.core.parallel import map_within
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Float64, Spectra, spectra_many, spectra_of
from keras_alds.kinds.base import kernel_values
from keras_alds.models.inventory import LayerRecord

#: Bytes of kernels that are decomposed together.
KERNELS_AT_ONCE = 1 << 27

_executor: contextvars.ContextVar[Executor | None] = contextvars.ContextVar(
    "executor", default=None
)

#: The allowed choices of a layer in a fold scheme: ranks by number of slices, and costs by budget.
Offer = Callable[[LayerRecord, int], tuple[Mapping[int, range], Sequence[Costs]]]


@dataclasses.dataclass(frozen=True)
class Seen:
    """A kernel in a fold scheme, and the inputs that it sees.

    Attributes:
        digest: Digest of the kernel.
        kernel: The kernel, `[*spatial, c, f]`.
        moment: Makes the second moment of its unfolded inputs.
        ranks: The largest rank that matters by number of slices.
    """

    digest: bytes
    kernel: Array
    moment: Callable[[], SecondMoment]
    ranks: Mapping[int, int]


class Spectrums(Protocol):
    """What computes the output spectra of layers, and keeps them."""

    def spectra(
        self,
        kernels: Mapping[tuple[str, int], Seen],
        decompose: Decompose,
    ) -> list[Spectra]:
        """The output spectra of some kernels, by path and fold scheme."""


@contextlib.contextmanager
def decomposing_on(executor: Executor | None) -> Iterator[None]:
    """Lets an executor decompose the layers inside; this process does without one.

    Raises:
        ValueError: If it is no executor.
    """
    check_executor(executor)
    token = _executor.set(executor)
    try:
        yield
    finally:
        _executor.reset(token)


def check_executor(executor: object) -> None:
    """Raises a ValueError for anything but None or an executor."""
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise ValueError(
            "Expected `executor` to be None or a `concurrent.futures.Executor`. "
            f"Received: executor={executor!r}"
        )


def decomposed(
    decompose: Decompose,
    kernels: Sequence[Array],
    moments: Sequence[Any],
    ranks: Sequence[Mapping[int, int]],
) -> list[Spectra]:
    """The spectra of some kernels. An executor gets each layer's kernel and inputs once."""
    executor = _executor.get()
    if executor is None:
        return decompose(kernels, moments, ranks)
    calls = [
        ([kernel], [m], [some]) for kernel, m, some in zip(kernels, moments, ranks, strict=True)
    ]
    return [spectra for (spectra,) in map_within(executor, decompose, calls)]


def choice_tables(
    records: Sequence[LayerRecord], method: Method, offer: Offer, stats: Spectrums | None
) -> list[ChoiceTable]:
    """The choice tables of some layers.

    Errors are output errors for layers with calibration statistics, and kernel errors otherwise.

    Raises:
        ValueError: If a kernel is not finite.
    """
    measured = [record for record in records if record.moment is not None]
    others = [record for record in records if record.moment is None]
    tables: dict[str, list[ChoiceTable]] = {record.path: [] for record in records}
    for group in _together(others, _kernel_bytes):
        by_scheme = [{s: offer(record, s) for s in record.schemes} for record in group]
        entries = _entries(group, by_scheme)
        for record, every, entry in zip(group, by_scheme, entries, strict=True):
            tables[record.path] += [
                entry.table(method.error_measure, s, *every[s]) for s in record.schemes
            ]
    for group in _together(measured, _moment_bytes):
        for scheme in sorted({scheme for record in group for scheme in record.schemes}):
            some = [record for record in group if scheme in record.schemes]
            offers = [offer(record, scheme) for record in some]
            found = _output_spectra(some, scheme, offers, method, stats)
            for record, (offered, costs), spectra in zip(some, offers, found, strict=True):
                # Of a wide layer, only some numbers of slices were looked at.
                known = {k: ranks for k, ranks in offered.items() if k in spectra.slices}
                tables[record.path].append(
                    choice_table(
                        spectra, known, costs, error_measure=method.error_measure, scheme=scheme
                    )
                )
    return [join_tables(tables[record.path]) for record in records]


def _output_spectra(
    records: Sequence[LayerRecord],
    scheme: int,
    offers: Sequence[tuple[Mapping[int, range], Sequence[Costs]]],
    method: Method,
    stats: Spectrums | None,
) -> list[Spectra]:
    """The output spectra of some layers in one fold scheme, for the offered choices."""
    rows = zip(records, offers, kernels(records, scheme), strict=True)
    seen = {
        # Folded when it is needed: it may be large.
        (record.path, scheme): Seen(
            *read,
            functools.partial(record.fold, record.moment, scheme),
            {k: ranks[-1] for k, ranks in offered.items()},
        )
        for record, (offered, _), read in rows
        if record.moment is not None
    }
    decompose = decomposer(scheme) if is_chain(scheme) else method.spectra
    return [] if stats is None else stats.spectra(seen, decompose)


def kernels(records: Iterable[LayerRecord], scheme: int = 0) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields a digest of every layer's kernel, and the kernel, in a fold scheme.

    Raises:
        ValueError: If a kernel is not finite.
    """
    for record in records:
        kernel = np.ascontiguousarray(kernel_values(record.layer, scheme))
        check_finite(kernel, "kernel", record.path)
        yield hashlib.sha256(kernel.data).digest(), kernel


def check_kernels(records: Iterable[LayerRecord]) -> None:
    """Raises a ValueError if a kernel is not finite, before the model is run."""
    for record in records:
        check_finite(kernel_values(record.layer), "kernel", record.path)


def check_finite(values: Array, part: str, path: str) -> None:
    """Raises a ValueError if a part of a layer holds NaN or infinity."""
    if not np.isfinite(values).all():
        raise ValueError(
            f"Expected finite weights. Received: NaN or infinity in the {part} of layer '{path}'. "
            "Look for the step at which training diverged."
        )


def singular_values(records: Sequence[LayerRecord]) -> list[Float64]:
    """The singular values of every layer's whole kernel in fold scheme 0, descending.

    Raises:
        ValueError: If a kernel is not finite.
    """
    found = []
    for group in _together(records, _kernel_bytes):
        entries = _entries(group, [{0: ({1: range(1)}, ())} for _ in group])
        found += [entry.spectra[0].slices[1].singular_values for entry in entries]
    return found


@dataclasses.dataclass
class _Entry:
    """The spectra of one layer's kernel by fold scheme, and the tables made from them."""

    digest: bytes
    layer: weakref.ref[Any]
    spectra: dict[int, Spectra] = dataclasses.field(default_factory=dict)
    tables: dict[tuple, ChoiceTable] = dataclasses.field(default_factory=dict)

    def table(
        self, error: str, scheme: int, offered: Mapping[int, range], costs: Sequence[Costs]
    ) -> ChoiceTable:
        key = (error, scheme, *offered.items(), *costs)
        if key not in self.tables:
            kernel = None
            if get_error(error).needs_kernel:
                kernel = kernel_values(self.layer(), scheme)
            spectra = self.spectra[scheme]
            self.tables[key] = choice_table(
                spectra, offered, costs, error_measure=error, scheme=scheme, kernel=kernel
            )
        return self.tables[key]


# Layers hash by identity; an entry is dropped with its layer.
_CACHE: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()


def _kernel_bytes(record: LayerRecord) -> int:
    return 4 * record.dense_weights


def _moment_bytes(record: LayerRecord) -> int:
    """Bytes of the kernel, and of its moments in another fold scheme if it has some."""
    moment = record.moment
    if moment is None or len(record.schemes) == 1:
        return _kernel_bytes(record)
    return _kernel_bytes(record) + 8 * moment.side * moment.block_side


def _together(
    records: Iterable[LayerRecord], bytes_of: Callable[[LayerRecord], int]
) -> Iterator[list[LayerRecord]]:
    """Groups of layers that are decomposed in parallel, limited by memory."""
    group: list[LayerRecord] = []
    held = 0
    for record in records:
        size = bytes_of(record)
        if group and held + size > KERNELS_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(record)
        held += size
    if group:
        yield group


def _entries(
    records: Sequence[LayerRecord],
    offers: Sequence[Mapping[int, tuple[Mapping[int, range], Sequence[Costs]]]],
) -> list[_Entry]:
    """The cached or new spectra of every layer's kernel, for the offered slices of its schemes."""
    missing: list[tuple[_Entry, int, np.ndarray]] = []
    slices = {1}  # gives the norm of the whole kernel
    for record, some, (digest, kernel) in zip(records, offers, kernels(records), strict=True):
        entry = _CACHE.get(record.layer)
        if entry is None or entry.digest != digest:
            entry = _CACHE[record.layer] = _Entry(digest, weakref.ref(record.layer))
        for scheme, (offered, _) in some.items():
            known = entry.spectra.get(scheme)
            if known is None or not offered.keys() <= known.slices.keys():
                read = kernel_values(record.layer, scheme) if scheme else kernel
                missing.append((entry, scheme, read))
                slices.update(() if is_chain(scheme) else offered)
    matrices = [kernel for _, scheme, kernel in missing if not is_chain(scheme)]
    found = iter(_kernel_spectra(matrices, slices))
    for entry, scheme, read in missing:
        chain = decomposed(decomposer(scheme), [read], [None], [{}]) if is_chain(scheme) else found
        values = next(iter(chain))
        entry.spectra[scheme] = values
        entry.tables.clear()
    return [_CACHE[record.layer] for record in records]


def _kernel_spectra(kernels: Sequence[np.ndarray], slices: Collection[int]) -> list[Spectra]:
    executor = _executor.get()
    if executor is None:
        return spectra_many(kernels, slices=slices)
    return map_within(executor, spectra_of, [(kernel, slices) for kernel in kernels])

"""Tables of cost and error for the choices of every layer, with cached spectra."""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.choices import ChoiceTable, choice_table, join_tables
from keras_alds.core.costs import Costs
from keras_alds.core.errors import get_error
from keras_alds.core.methods import Method
from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Spectra, spectra_many
from keras_alds.kinds.base import kernel_values
from keras_alds.models.inventory import LayerRecord

#: Bytes of kernels that are decomposed together.
KERNELS_AT_ONCE = 1 << 27

#: The allowed choices of a layer in a fold scheme: ranks by number of slices, and costs by budget.
Offer = Callable[[LayerRecord, int], tuple[Mapping[int, range], Sequence[Costs]]]
#: Computes the spectra of kernels with the moments of their inputs.
Decompose = Callable[[Sequence[Array], Sequence[SecondMoment]], list[Spectra]]


class Spectrums(Protocol):
    """What computes the output spectra of layers, and keeps them."""

    def spectra(
        self, kernels: Mapping[str, tuple[bytes, Array, SecondMoment]], decompose: Decompose
    ) -> list[Spectra]:
        """The output spectra of some layers, by path: digest, kernel and moment."""


def choice_tables(
    records: Sequence[LayerRecord], method: Method, offer: Offer, stats: Spectrums | None
) -> list[ChoiceTable]:
    """The choice tables of some layers.

    Errors are output errors for layers with calibration statistics, and kernel errors otherwise.

    Args:
        records: Layers that can be factorized.
        method: The method, which defines the error measure.
        offer: Gives the allowed choices of a layer.
        stats: Calibration statistics, which also cache spectra.

    Raises:
        ValueError: If a kernel is not finite.
    """
    measured = [record for record in records if record.moment is not None]
    others = [record for record in records if record.moment is None]
    tables = {}
    for group in _together(others):
        for record, entry in zip(group, _entries(group), strict=True):
            found = [
                entry.table(method.error_measure, s, *offer(record, s)) for s in record.schemes
            ]
            tables[record.path] = join_tables(found)
    for group in _together(measured):
        if stats is None:
            break
        seen = {
            record.path: (*read, record.moment)
            for record, read in zip(group, kernels(group), strict=True)
            if record.moment is not None
        }
        for record, spectra in zip(group, stats.spectra(seen, method.spectra), strict=True):
            offered, costs = offer(record, 0)
            # Of a wide layer, only some numbers of slices were looked at.
            offered = {k: ranks for k, ranks in offered.items() if k in spectra.slices}
            tables[record.path] = choice_table(
                spectra, offered, costs, error_measure=method.error_measure
            )
        del seen  # before the next kernels are read
    return [tables[record.path] for record in records]


def kernels(records: Iterable[LayerRecord]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields a digest of every layer's kernel, and the kernel.

    Raises:
        ValueError: If a kernel is not finite.
    """
    for record in records:
        kernel = np.ascontiguousarray(kernel_values(record.layer))
        if not np.isfinite(kernel).all():
            raise ValueError(
                f"Expected finite weights. Received: NaN or infinity in the kernel of layer "
                f"'{record.path}'. Look for the step at which training diverged."
            )
        yield hashlib.sha256(kernel.data).digest(), kernel


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


def _together(records: Iterable[LayerRecord]) -> Iterator[list[LayerRecord]]:
    """Groups of layers whose kernels are decomposed in parallel, limited by memory."""
    group: list[LayerRecord] = []
    held = 0
    for record in records:
        size = 4 * record.dense_weights
        if group and held + size > KERNELS_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(record)
        held += size
    if group:
        yield group


def _entries(records: Sequence[LayerRecord]) -> list[_Entry]:
    """The cached or new spectra of every layer's kernel, in its fold schemes."""
    missing: list[tuple[_Entry, int, np.ndarray]] = []
    for record, (digest, kernel) in zip(records, kernels(records), strict=True):
        entry = _CACHE.get(record.layer)
        if entry is None or entry.digest != digest:
            entry = _CACHE[record.layer] = _Entry(digest, weakref.ref(record.layer))
        for scheme in record.schemes:
            if scheme not in entry.spectra:
                read = kernel_values(record.layer, scheme) if scheme else kernel
                missing.append((entry, scheme, read))
    found = spectra_many([kernel for *_, kernel in missing])
    for (entry, scheme, _), values in zip(missing, found, strict=True):
        entry.spectra[scheme] = values
    return [_CACHE[record.layer] for record in records]

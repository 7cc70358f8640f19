"""The layers of two models side by side: what became of each, and how far its kernel moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds.kinds.base import factorized_kind, is_factorized, kernel_values, scheme_of
from keras_alds.models.inventory import Inventory, LayerRecord
from keras_alds.models.matching import is_applied, match
from keras_alds.models.optimizer import Factors
from keras_alds.models.resources import Macs
from keras_alds.plan import CompressionPlan, LayerChoice, Skip, Skipped

# How the names of layers end that `expand` puts before the one with the layer's own name.
_PIECES = ("_depthwise", "_encoder", "_core", "_rows", "_columns")
_UNKNOWN = Skipped(Skip.BUDGET, "it stays dense; only the plan knows why (pass it as `plan=`)")
_NOT_APPLIED = Skipped(Skip.BUDGET, "it is dense here, and factorized in the plan")

Pair = tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer with weights, before and after the compression.

    Attributes:
        path: Its path in the original model.
        kind: Its class name there.
        kernel_shape: The shape of its dense kernel, or None if it has none.
        params: Its parameters, before and after; None if it was not found.
        macs: Its multiply–accumulates; None if the shapes of its calls are unknown.
        slices: Number of slices, or None if it is not factorized.
        rank: Rank of every slice, or None.
        scheme: Fold scheme, or None.
        expanded: Whether stock layers stand for its factors.
        predicted: The error that the plan gives, or None.
        measured: ‖W − E D‖ / ‖W‖ of the kernels as they are now (Frobenius norm), or None.
        skipped: Why it stays dense, or None.
        note: A remark of the plan, or None.
    """

    path: str
    kind: str
    kernel_shape: tuple[int, ...] | None
    params: Pair
    macs: Pair
    slices: int | None = None
    rank: int | None = None
    scheme: int | None = None
    expanded: bool = False
    predicted: float | None = None
    measured: float | None = None
    skipped: Skipped | None = None
    note: str | None = None


def choices_of(
    before: Inventory, after: Inventory, plan: CompressionPlan
) -> dict[str, LayerChoice]:
    """The choices of a plan, by the paths of the original's layers.

    Raises:
        ValueError: If the plan is neither for the original nor applied to the compressed model.
    """
    if len(before.records) == len(plan.choices) and is_applied(after, plan):
        return {r.path: c for r, c in zip(before.records, plan.choices, strict=True)}
    return {record.path: choice for record, choice in match(before, plan)}


def layer_rows(
    before: Inventory, after: Inventory, choices: Mapping[str, LayerChoice]
) -> tuple[list[LayerRow], list[str]]:
    """A row for every layer of the original with weights.

    Args:
        before: The original model.
        after: The compressed model.
        choices: The choices of its plan by path; empty if there is none.

    Returns:
        The rows, and the paths of layers of the compressed model that belong to none of them.
    """
    partners, strangers = _partners(before, after)
    macs = _macs(before), _macs(after)
    rows = []
    for record in before.records:
        others = partners[record.path]
        row = LayerRow(
            record.path,
            record.class_name,
            record.kernel_shape,
            (record.params, _sum(other.params for other in others)),
            (macs[0].get(record.layer), _sum(macs[1].get(other.layer) for other in others)),
        )
        row = _formed(row, record, others)
        rows.append(_explained(row, record, choices.get(record.path)))
    return rows, [record.path for record in strangers]


def _formed(row: LayerRow, record: LayerRecord, others: list[LayerRecord]) -> LayerRow:
    """The row with what the layer is in the compressed model."""
    if len(others) > 1:
        return dataclasses.replace(row, expanded=True)
    if not others or not is_factorized(layer := others[0].layer):
        return row
    return dataclasses.replace(
        row,
        slices=layer.slices,
        rank=layer.rank,
        scheme=scheme_of(layer),
        measured=_distance(record, others[0]),
    )


def _explained(row: LayerRow, record: LayerRecord, choice: LayerChoice | None) -> LayerRow:
    """The row with what the plan says, or why the layer stays dense as far as this is known."""
    factorized = row.rank is not None or row.expanded
    if choice is None:
        return row if factorized else dataclasses.replace(row, skipped=record.skipped or _UNKNOWN)
    row = dataclasses.replace(row, kernel_shape=choice.kernel_shape, note=choice.note)
    if not choice.factorized:
        skipped = Skipped(Skip(choice.reason_code or Skip.BUDGET), choice.reason or "")
        return row if factorized else dataclasses.replace(row, skipped=skipped)
    if not factorized:
        return dataclasses.replace(row, predicted=choice.error, skipped=_NOT_APPLIED)
    if row.expanded:
        row = dataclasses.replace(row, slices=choice.slices, rank=choice.rank, scheme=choice.scheme)
    return dataclasses.replace(row, predicted=choice.error)


def _partners(
    before: Inventory, after: Inventory
) -> tuple[dict[str, list[LayerRecord]], list[LayerRecord]]:
    """The layers of the compressed model by the original's paths, and those that fit to none.

    They have the same path, or after `expand` a path with an ending. In models made twice by the
    same code, names may differ: then the order tells.
    """
    found: dict[str, list[LayerRecord]] = {record.path: [] for record in before.records}
    same = found.keys() <= {record.path for record in after.records}
    if len(before.records) == len(after.records) and not same:
        pairs = zip(before.records, after.records, strict=True)
        return {record.path: [other] for record, other in pairs}, []
    strangers: list[LayerRecord] = []
    for record in after.records:
        names = [record.path, *_without_ending(record.path)]
        name = next((name for name in names if name in found), None)
        (strangers if name is None else found[name]).append(record)
    return found, strangers


def _without_ending(path: str) -> Iterator[str]:
    """The paths that a layer of an expanded model may have had, also in `TimeDistributed`."""
    for end in _PIECES:
        yield path.removesuffix(end)
        yield "/".join(name.removesuffix(end) for name in path.split("/"))


def _macs(inventory: Inventory) -> dict[Any, int]:
    """The multiply–accumulates of every layer; none if the shapes of the calls are unknown."""
    counter = Macs(inventory)
    try:
        return {record.layer: counter.of(record) for record in inventory.records}
    except ValueError:
        return {}


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum of some counts, or None if there is none or one is unknown."""
    found = [*counts]
    return sum(n for n in found if n is not None) if found and None not in found else None


def _distance(record: LayerRecord, other: LayerRecord) -> float | None:
    """‖W − W'‖ / ‖W‖ of two kernels; None if they cannot be compared."""
    if record.kernel_shape is None and not is_factorized(record.layer):
        return None
    old, new = _kernel(record.layer), _kernel(other.layer)
    norm = np.linalg.norm(old)
    if old.shape != new.shape or not norm > 0:
        return None
    return float(np.linalg.norm(old - new) / norm)


def _kernel(layer: Any) -> np.ndarray:
    """A kernel, dense or in two factors, as `[*spatial, c, f]` in float64."""
    if is_factorized(layer):
        product = Factors.of(_backend.backend_of(layer), layer).product
        return factorized_kind(layer).unfolding(layer).read(product).astype(np.float64)
    return kernel_values(layer).astype(np.float64)

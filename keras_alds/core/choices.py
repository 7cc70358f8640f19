"""The choices of one layer: what every (k, j) costs and how large its error is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.checks import positive_int
from keras_alds.core.costs import SampledCosts
from keras_alds.core.errors import error_curve, get_error
from keras_alds.core.slicing import Array, factor_weights, kernel_sizes, weights
from keras_alds.core.spectra import Float64, Spectra
from keras_alds.core.targets import Target, allowed_ranks

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """One row of a `ChoiceTable`; `slices == 0` means that the layer stays as it is.

    Attributes:
        slices: Number of channel slices k, 0 for "keep".
        rank: Rank j of every slice, 0 for "keep".
        scheme: Fold scheme of the kernel; 0 is `[c·κ, f]`, see `slicing.decoder_axes`.
        weights: Weights of the encoder and the decoder, of the dense kernel for "keep".
        cost: What the choice takes of a budget.
        error: Relative error.
    """

    slices: int
    rank: int
    scheme: int
    weights: int
    cost: int
    error: float

    @property
    def keep(self) -> bool:
        """Whether the layer stays as it is."""
        return self.slices == 0


@dataclass(frozen=True, eq=False)
class ChoiceTable:
    """The choices of one layer, one row each, sorted by cost, error, scheme, slices and rank.

    Attributes:
        slices: Array `[n]` of int64: number of channel slices k, 0 where the layer is kept.
        rank: Array `[n]` of int64: rank j of every slice, 0 where the layer is kept.
        full_rank: Array `[n]` of int64: full rank of such a slice, 0 where the layer is kept.
        scheme: Array `[n]` of int64: fold scheme.
        weights: Array `[n]` of int64: weights of the kernels.
        cost: Array `[n]` of int64: what the choice takes of a budget.
        error: Array `[n]` of float64: relative error.

    Raises:
        ValueError: If the arrays differ in length or are no vectors.
    """

    slices: Int64
    rank: Int64
    full_rank: Int64
    scheme: Int64
    weights: Int64
    cost: Int64
    error: Float64

    def __post_init__(self) -> None:
        columns = [getattr(self, column.name) for column in fields(self)]
        if len({column.shape for column in columns}) != 1 or columns[0].ndim != 1:
            raise ValueError(
                "Expected vectors of one length. Received: shapes="
                f"{[column.shape for column in columns]}"
            )
        for column in columns:
            column.setflags(write=False)

    def __len__(self) -> int:
        return int(self.cost.size)

    def __getitem__(self, index: int) -> Choice:
        """Returns one row as plain Python numbers."""
        return Choice(
            slices=int(self.slices[index]),
            rank=int(self.rank[index]),
            scheme=int(self.scheme[index]),
            weights=int(self.weights[index]),
            cost=int(self.cost[index]),
            error=float(self.error[index]),
        )

    def __iter__(self) -> Iterator[Choice]:
        return (self[index] for index in range(len(self)))

    def take(self, rows: NDArray[Any]) -> ChoiceTable:
        """Returns a new table of some rows.

        Args:
            rows: Indices, or a mask `[n]`.

        Returns:
            The new table, in the order of `rows`.
        """
        return ChoiceTable(**{c.name: getattr(self, c.name)[rows] for c in fields(self)})

    def front(self) -> ChoiceTable:
        """Returns the Pareto front as a new table.

        A row is left out if another one is no worse in cost and in error. Of equal rows the one
        of the smaller scheme stays, then the one with fewer slices, then with the smaller rank.

        Returns:
            A table with strictly ascending costs and strictly descending errors.

        Example:
            >>> from keras_alds.core.spectra import spectra
            >>> table = choice_table(spectra(np.diag([3.0, 2.0, 1.0, 0.0, 0.0, 0.0])))
            >>> table.front()[-1].error
            0.0
        """
        order = np.lexsort((self.rank, self.slices, self.scheme, self.error, self.cost))
        error = self.error[order]
        before = np.concatenate(([np.inf], np.minimum.accumulate(error)[:-1]))
        return self.take(order[error < before])


def choice_table(
    spectra: Spectra,
    *,
    error: str = "slice",
    kernel: Array | None = None,
    scheme: int = 0,
    cost_per_weight: int = 1,
    encoder_cost_per_weight: int | None = None,
    added_cost: int = 0,
    costs: SampledCosts | None = None,
    max_slices: int | None = None,
    near_slices: int | None = None,
    rank_multiple: int = 1,
    target: Target | None = None,
    depthwise: bool = True,
    blocks: int = 1,
) -> ChoiceTable:
    """Returns the choices of one layer: every (k, j) smaller than the dense kernel, and "keep".

    Args:
        spectra: Spectra of the kernel.
        error: Error measure; one of the keys of `keras_alds.core.errors.ERRORS`.
        kernel: The kernel, `[*spatial, c, f]`; needed by the error `"spectral"` only.
        scheme: Fold scheme in which the kernel was read, for the table's column.
        cost_per_weight: Cost of one weight, a positive integer: 1 for parameters, the number of
            output positions P for multiply–accumulates, which are P·j·(k·f + c·κ).
        encoder_cost_per_weight: The same for the encoder's weights, which in some schemes work at
            other positions than the decoder's. Choices that cost as much as the kernel, though
            smaller, are left out. Defaults to `cost_per_weight`.
        added_cost: What every factorized form costs beside its weights, such as a bias that the
            dense layer has not. Choices that then cost as much as the kernel are left out.
        costs: What the choices cost in place of that, such as measured latencies. Choices that
            cost as much as the kernel, though smaller, are left out.
        max_slices: Largest k. Defaults to no limit.
        near_slices: Only the k nearest to this number, the smaller one of two; for 1 no other
            one. Defaults to all.
        rank_multiple: Ranks are multiples of this.
        target: Further constraints on slices and ranks. Defaults to none.
        depthwise: Whether k = c has a depthwise form; see `Target.ranks`.
        blocks: Diagonal blocks of the inputs' second moment; see `Target.ranks`.

    Returns:
        The `ChoiceTable`, with one row of slices = rank = 0 for the kernel as it is: error 0 and
        full cost.

    Raises:
        ValueError: If an option is out of its range or `error` is unknown.

    Example:
        >>> from keras_alds.core.spectra import spectra
        >>> table = choice_table(spectra(np.eye(6)), max_slices=1)
        >>> [(row.slices, row.rank, row.weights) for row in table]
        [(1, 1, 12), (1, 2, 24), (0, 0, 36)]
    """
    get_error(error)
    unit = positive_int(cost_per_weight, "cost_per_weight")
    encoder_unit = (
        unit
        if encoder_cost_per_weight is None
        else positive_int(encoder_cost_per_weight, "encoder_cost_per_weight")
    )
    multiple = positive_int(rank_multiple, "rank_multiple")
    most = None if max_slices is None else positive_int(max_slices, "max_slices")
    near = None if near_slices is None else positive_int(near_slices, "near_slices")
    shape = spectra.kernel_shape
    c, kappa, f = kernel_sizes(shape)
    dense = c * kappa * f
    offered: dict[int, Int64] = {}
    for k, spectrum in spectra.slices.items():
        ranks_of_k = allowed_ranks(
            shape,
            k,
            target=target,
            max_slices=most,
            rank_multiple=multiple,
            depthwise=depthwise,
            blocks=blocks,
        )
        last = min(spectrum.rank, (dense - added_cost // unit - 1) // weights(shape, k, 1))
        j = np.array([rank for rank in ranks_of_k if rank <= last], dtype=np.int64)
        if j.size and (near != 1 or k == 1):
            offered[k] = j
    if near is not None and offered:
        nearest = min(offered, key=lambda k: (abs(k - near), k))
        offered = {nearest: offered[nearest]}

    slices, ranks, sizes = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.array([dense])]
    full, errors = [np.zeros(1, np.int64)], [np.zeros(1)]
    unit_costs = [np.array([dense * unit])]
    for k, j in offered.items():
        encoder, decoder = factor_weights(shape, k, 1)
        unit_costs.append((encoder * encoder_unit + decoder * unit) * j + added_cost)
        slices.append(np.full(j.size, k, np.int64))
        ranks.append(j)
        full.append(np.full(j.size, spectra.slices[k].rank, np.int64))
        sizes.append((encoder + decoder) * j)
        errors.append(error_curve(spectra, error, k, kernel, max_rank=int(j[-1]))[j])
    size = np.concatenate(sizes).astype(np.int64)
    table = ChoiceTable(
        slices=np.concatenate(slices),
        rank=np.concatenate(ranks),
        full_rank=np.concatenate(full),
        scheme=np.where(np.arange(size.size) > 0, scheme, 0).astype(np.int64),
        weights=size,
        cost=np.concatenate(unit_costs).astype(np.int64)
        if costs is None
        else np.concatenate([[costs.dense], *(costs.of(k, j) for k, j in offered.items())]),
        error=np.concatenate(errors),
    )
    if costs is not None or encoder_unit > unit:
        most_cost = dense * unit if costs is None else costs.dense
        table = table.take((table.cost < most_cost) | (table.slices == 0))
    return _sorted(table)


def join_tables(tables: Sequence[ChoiceTable]) -> ChoiceTable:
    """Returns the choices of several fold schemes of one kernel as one table.

    Args:
        tables: Tables of the same kernel, each with the row of the kernel as it is.

    Returns:
        A table of all their rows, with that row once.

    Raises:
        ValueError: If there is no table, or they differ in what the kernel costs as it is.

    Example:
        >>> from keras_alds.core.slicing import convolution_unfolding
        >>> from keras_alds.core.spectra import spectra
        >>> kernel = np.ones((3, 3, 2, 1))
        >>> schemes = [(scheme, convolution_unfolding(2, scheme)) for scheme in (0, 3)]
        >>> tables = [
        ...     choice_table(spectra(unfolding.read(kernel)), scheme=scheme)
        ...     for scheme, unfolding in schemes
        ... ]
        >>> [(row.scheme, row.slices, row.rank, row.weights) for row in join_tables(tables)]
        [(3, 1, 1, 11), (0, 0, 0, 18)]
    """
    kept = {(row.weights, row.cost) for t in tables for row in t.take(t.slices == 0)}
    if len(kept) != 1:
        raise ValueError(
            "Expected tables of one kernel, with what it weighs and costs as it is. Received: "
            f"{sorted(kept)}"
        )
    first, *others = tables
    if not others:
        return first
    parts = [first, *(table.take(table.slices > 0) for table in others)]
    columns = {c.name: np.concatenate([getattr(t, c.name) for t in parts]) for c in fields(first)}
    return _sorted(ChoiceTable(**columns))


def _sorted(table: ChoiceTable) -> ChoiceTable:
    keys = (table.rank, table.slices, table.scheme, table.error, table.cost)
    return table.take(np.lexsort(keys))

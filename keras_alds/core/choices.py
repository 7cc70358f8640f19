"""The choices for one layer: the cost and error of every (k, j)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.chains import TUCKER, chain_ranks, form_weights, is_chain
from keras_alds.core.checks import positive_int
from keras_alds.core.costs import Costs, WeightCosts
from keras_alds.core.errors import error_curve, get_error
from keras_alds.core.slicing import Array, divisors, full_rank, weights
from keras_alds.core.spectra import Float64, Spectra

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """One row of a `ChoiceTable`; `slices == 0` means that the layer stays unchanged.

    Attributes:
        slices: Number of channel slices k, 0 for "keep".
        rank: Rank j of every slice, 0 for "keep".
        scheme: Fold scheme of the kernel; 0 is `[c·κ, f]`, see `slicing.decoder_axes`. Or a chain
            of `core.chains`; in Tucker-2, `slices` is the rank of the input channels.
        weights: Number of weights of encoder and decoder together, or of the dense kernel for
            "keep".
        cost: Cost of the choice in each budget.
        error: Relative error.
    """

    slices: int
    rank: int
    scheme: int
    weights: int
    cost: tuple[int, ...]
    error: float

    @property
    def keep(self) -> bool:
        """Whether the layer stays unchanged."""
        return self.slices == 0

    @property
    def input_rank(self) -> int | None:
        """The rank of the input channels in Tucker-2, or None."""
        return self.slices if self.scheme == TUCKER else None

    @property
    def channel_slices(self) -> int:
        """Number of channel slices k, 1 for a chain."""
        return 1 if is_chain(self.scheme) else self.slices


@dataclass(frozen=True, eq=False)
class ChoiceTable:
    """The choices for one layer, one per row.

    Attributes:
        slices: Array `[n]` of int64: number of channel slices k, 0 for "keep".
        rank: Array `[n]` of int64: rank j of every slice, 0 for "keep".
        full_rank: Array `[n]` of int64: full rank of such a slice, 0 for "keep".
        scheme: Array `[n]` of int64: fold scheme.
        weights: Array `[n]` of int64: weights of the kernels.
        cost: Array `[n, r]` of int64: cost of the choice in each of r budgets.
        error: Array `[n]` of float64: relative error.

    Raises:
        ValueError: If the arrays differ in length, or the costs are not integers.
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
        shapes = [column.shape for column in columns]
        if (
            {len(shape) for shape in shapes[:-2] + shapes[-1:]} != {1}
            or len(shapes[-2]) != 2
            or len({shape[0] for shape in shapes}) != 1
            or self.cost.dtype.kind not in "iu"
        ):
            raise ValueError(
                "Expected vectors of one length, and integer costs [n, r]. Received: "
                f"shapes={shapes}, cost.dtype={self.cost.dtype}"
            )
        for column in columns:
            column.setflags(write=False)

    def __len__(self) -> int:
        return len(self.cost)

    def __getitem__(self, index: int) -> Choice:
        """Returns one row as plain Python numbers."""
        return Choice(
            slices=int(self.slices[index]),
            rank=int(self.rank[index]),
            scheme=int(self.scheme[index]),
            weights=int(self.weights[index]),
            cost=tuple(self.cost[index].tolist()),
            error=float(self.error[index]),
        )

    def __iter__(self) -> Iterator[Choice]:
        return (self[index] for index in range(len(self)))

    def take(self, rows: NDArray[Any]) -> ChoiceTable:
        """Returns a new table of the given rows.

        Args:
            rows: Indices, or a mask `[n]`.
        """
        return ChoiceTable(**{c.name: getattr(self, c.name)[rows] for c in fields(self)})

    def front(self) -> ChoiceTable:
        """Returns the Pareto front as a new table.

        Returns:
            A table with strictly ascending costs in the first budget and strictly descending
            errors; see `front_rows`.

        Example:
            >>> from keras_alds.core.spectra import spectra
            >>> table = choice_table(spectra(np.diag([3.0, 2.0, 1.0, 0.0, 0.0, 0.0])))
            >>> table.front()[-1].error
            0.0
        """
        return self.take(self.front_rows())

    def front_rows(self, cost: NDArray[Any] | None = None) -> Int64:
        """Returns the rows of the Pareto front, by cost.

        A row is dropped if another one is no worse in both cost and error. Ties go to the row
        with the smaller scheme, then to the one with fewer slices, then to the smaller rank.

        Args:
            cost: Costs of the choices, `[n]`. Defaults to their costs in the first budget.
        """
        cost = self.cost[:, 0] if cost is None else cost
        order = np.lexsort((self.rank, self.slices, self.scheme, self.error, cost))
        error = self.error[order]
        before = np.append(np.inf, np.minimum.accumulate(error)[:-1])
        return order[error < before]


#: Returns the ranks that a runtime allows for a kernel shape and a number of slices.
RankRule = Callable[[tuple[int, ...], int], range]


def offered_ranks(
    kernel_shape: Sequence[int],
    *,
    rule: RankRule | None = None,
    max_slices: int | None = None,
    near_slices: int | None = None,
    rank_multiple: int = 1,
    blocks: int = 1,
    added: int = 0,
    scheme: int = 0,
) -> dict[int, range]:
    """Returns the available choices for a layer: ranks by number of slices.

    Every choice is smaller than the dense kernel and within all limits.

    Args:
        kernel_shape: Shape `[*spatial, c, f]` of the kernel in its fold scheme.
        rule: `rule(kernel_shape, slices)` returns the ranks that a runtime allows. Defaults to
            all.
        max_slices: Largest k. Defaults to no limit.
        near_slices: Keeps only the k nearest to this number. Ties go to the smaller k; 1 allows
            only k = 1. Defaults to all k.
        rank_multiple: Ranks are multiples of this.
        blocks: k is a multiple of this number of diagonal blocks of the input second moment.
        added: Parameters that every factorized form has besides its weights, such as a bias that
            the dense layer lacks.
        scheme: The fold scheme. Of a chain, no limit of slices counts; see `chain_ranks`.

    Returns:
        Ranges of ranks, none of them empty, by k in ascending order.

    Raises:
        ValueError: If an option is not a positive integer.

    Example:
        >>> offered_ranks((6, 6), max_slices=2)
        {1: range(1, 3), 2: range(1, 2)}
    """
    multiple = positive_int(rank_multiple, "rank_multiple")
    most = None if max_slices is None else positive_int(max_slices, "max_slices")
    near = None if near_slices is None else positive_int(near_slices, "near_slices")
    shape = tuple(kernel_shape)
    if is_chain(scheme):
        return chain_ranks(shape, scheme, multiple, added)
    offered = {}
    for k in divisors(shape[-2]):
        if k % blocks or (most is not None and k > most) or (near == 1 != k):
            continue
        ranks = range(1, full_rank(shape, k) + 1) if rule is None else rule(shape, k)
        step = math.lcm(ranks.step, multiple)
        smaller = (math.prod(shape) - added - 1) // weights(shape, k, 1)
        if ranks := range(step, min(ranks.stop, smaller + 1), step):
            offered[k] = ranks
    if near is not None and offered:
        nearest = min(offered, key=lambda k: (abs(k - near), k))
        return {nearest: offered[nearest]}
    return offered


def choice_table(
    spectra: Spectra,
    offered: Mapping[int, range] | None = None,
    costs: Sequence[Costs] | None = None,
    *,
    error_measure: str = "slice",
    kernel: Array | None = None,
    scheme: int = 0,
) -> ChoiceTable:
    """Returns the choices for one layer: every available (k, j), and "keep".

    Smaller choices that cost no less than the dense kernel in the first budget are dropped.

    Args:
        spectra: Spectra of the kernel.
        offered: Ranks by number of slices, from `offered_ranks`. Defaults to all smaller choices.
        costs: Costs of the choices, one entry per budget. Defaults to one budget of weights.
        error_measure: Error measure; one of the keys of `keras_alds.core.errors.ERRORS`.
        kernel: The kernel, `[*spatial, c, f]`; needed by the error `"spectral"` only.
        scheme: Fold scheme of the unfolding that gave the spectra.

    Returns:
        The `ChoiceTable`, sorted by cost, error, scheme, slices and rank, with one row of slices
        = rank = 0 for the unchanged kernel: error 0 and full cost.

    Raises:
        ValueError: If `error_measure` is unknown, or `offered` holds slices that the spectra lack.

    Example:
        >>> from keras_alds.core.spectra import spectra
        >>> table = choice_table(spectra(np.eye(6)), offered_ranks((6, 6), max_slices=1))
        >>> [(row.slices, row.rank, row.weights) for row in table]
        [(1, 1, 12), (1, 2, 24), (0, 0, 36)]
    """
    get_error(error_measure)
    shape = spectra.kernel_shape
    if offered is None:
        every = offered_ranks(shape)
        offered = {k: ranks for k, ranks in every.items() if k in spectra.slices}
    if costs is None:
        costs = [WeightCosts(((scheme, shape, 1),))]
    columns = [np.array([[0, 0, 0, 0, math.prod(shape)]])]
    prices = [np.array([[cost.dense for cost in costs]])]
    errors = [np.zeros(1)]
    for k, ranks in offered.items():
        curve = error_curve(spectra, error_measure, k, kernel, max_rank=ranks[-1])
        j = np.array(ranks)
        same = np.broadcast_to([k, spectra.slices[k].rank, scheme], (j.size, 3))
        columns.append(np.column_stack([same, j, form_weights(shape, k, j, scheme)]))
        prices.append(np.column_stack([cost.of(k, ranks, scheme) for cost in costs]))
        errors.append(curve[j])
    slices, full, schemes, rank, size = np.concatenate(columns).astype(np.int64).T
    table = ChoiceTable(
        slices=slices,
        rank=rank,
        full_rank=full,
        scheme=schemes,
        weights=size,
        cost=np.concatenate(prices).astype(np.int64),
        error=np.concatenate(errors),
    )
    return _sorted(table.take((table.cost[:, 0] < costs[0].dense) | (table.slices == 0)))


def join_tables(tables: Sequence[ChoiceTable]) -> ChoiceTable:
    """Joins the choices for several fold schemes of one kernel into one table.

    Args:
        tables: Tables of the same kernel, each with the row of the unchanged kernel.

    Returns:
        A table of their rows, with that row once. With several budgets, rows are left out whose
        costs another row orders differently: one that is dearer in the first budget and cheaper in
        another. Strides do that to the multiply–accumulates of some fold schemes.

    Raises:
        ValueError: If there is no table, or they disagree on the cost of the unchanged kernel.

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
            "Expected tables of one kernel, with the dense kernel's weights and cost. Received: "
            f"{sorted(kept)}"
        )
    first, *others = tables
    if not others:
        return _ordered_alike(first)
    parts = [first, *(table.take(table.slices > 0) for table in others)]
    columns = {c.name: np.concatenate([getattr(t, c.name) for t in parts]) for c in fields(first)}
    return _ordered_alike(_sorted(ChoiceTable(**columns)))


def _ordered_alike(table: ChoiceTable) -> ChoiceTable:
    """The rows that cost no more than any dearer row, in every budget."""
    if table.cost.shape[1] == 1:
        return table
    least_after = np.minimum.accumulate(table.cost[::-1], axis=0)[::-1]
    return table.take(np.flatnonzero((table.cost <= least_after).all(axis=1)))


def _sorted(table: ChoiceTable) -> ChoiceTable:
    keys = (table.rank, table.slices, table.scheme, table.error, table.cost[:, 0])
    return table.take(np.lexsort(keys))

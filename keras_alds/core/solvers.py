r"""One choice per layer under one or two hard budgets: exact min–max, near-optimal min–sum.

Picking one choice per layer is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger,
"Knapsack Problems", chapter 11). Within a layer all budgets order the choices alike, because its
multiply–accumulates are its weights times a constant. So for an error threshold t, a layer's
cheapest choice is cheapest in every budget. All totals fall as t grows, and the smallest t within
the budgets solves min–max exactly.

For sums, each budget has a price λ ≥ 0. For a fixed ratio of the prices, a walk along the convex
hulls ends before the first step that exceeds a budget. One budget needs one walk. With two, a
bisection over the ratio raises the price of the budget that stops the walk. Every pair of prices
gives a lower bound,

    Σ_l min_i (ε_{l,i} + λ · c_{l,i}) − λ · C,

and the solution reports the best one. No budget is ever exceeded.
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.choices import ChoiceTable

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

# Exchanges between pairs of layers are skipped above this many layers × choices (about 20 ms per
# round), or once the sum is this close to its lower bound.
_EXCHANGE_ROWS = 400_000
_EXCHANGE_GAP = 1e-3
# Halvings of the angle between two prices; rises of each of more prices.
_HALVINGS = 24


class InfeasibleBudget(ValueError):  # noqa: N818 - a name of the public API
    """The cheapest choices of all layers together exceed a budget.

    Attributes:
        required: The smallest possible total.
        budget: The requested budget.
        resource: Index of the exceeded budget, from 0.
    """

    def __init__(self, required: int, budget: int, resource: int = 0) -> None:
        super().__init__(
            f"Expected a budget of at least {required}, the total of the cheapest choices of all "
            f"layers. Received: budget={budget}"
        )
        self.required = required
        self.budget = budget
        self.resource = resource

    def __reduce__(self) -> tuple[type[InfeasibleBudget], tuple[int, int, int]]:
        return InfeasibleBudget, (self.required, self.budget, self.resource)


@dataclass(frozen=True)
class Solution:
    """One choice per layer.

    Attributes:
        indices: The chosen row of each layer's table.
        max_error: The largest error of the choices; 0 without layers.
        sum_error: The sum of their errors.
        total_cost: The sum of their costs in each budget, never above the budget.
        lower_bound: No selection within the budgets has a smaller objective (the largest error
            with `min_max`, the sum with `min_sum`).
        certificate: With `min_max`, `(threshold, required)`. `threshold` is the largest error below
            the optimum in any front. `required` holds the smallest total cost per budget that
            reaches it; at least one exceeds its budget (all are `math.inf` if it is out of
            reach). `None` if no front has an error below the optimum.
    """

    indices: tuple[int, ...]
    max_error: float
    sum_error: float
    total_cost: tuple[int, ...]
    lower_bound: float
    certificate: tuple[float, tuple[float, ...]] | None = None

    @classmethod
    def of(
        cls,
        tables: Sequence[ChoiceTable],
        indices: Sequence[int],
        limits: Int64,
        lower_bound: float,
        certificate: tuple[float, tuple[float, ...]] | None = None,
    ) -> Solution:
        """Returns the solution that takes the given row of each table."""
        errors = [float(table.error[i]) for table, i in zip(tables, indices, strict=True)]
        return cls(
            tuple(int(i) for i in indices),
            max(errors, default=0.0),
            math.fsum(errors),
            tuple(_total(tables, indices, limits).tolist()),
            lower_bound,
            certificate,
        )


def check_budgets(tables: Sequence[ChoiceTable], budgets: Sequence[int]) -> Int64:
    """Returns the budgets as an array, or raises an error if they cannot be used.

    Returns:
        Array `[r]` of int64.

    Raises:
        InfeasibleBudget: If the cheapest choices together exceed a budget; it says which.
        ValueError: If a budget is not an integer, a table is empty or does not have one cost per
            budget, or the budgets order the choices of a layer differently.
    """
    try:
        limits = np.array([operator.index(budget) for budget in budgets], np.int64)
    except TypeError:
        raise ValueError(f"Expected integer budgets. Received: budgets={budgets!r}") from None
    for layer, table in enumerate(tables):
        received = f"costs of shape {table.cost.shape} for {limits.size} budgets"
        if len(table) and table.cost.shape[1] == limits.size:
            costs = table.cost[np.argsort(table.cost[:, 0], kind="stable")]
            falls = (np.diff(costs, axis=0) < 0).any(axis=1)
            if not falls.any():
                continue
            at = int(falls.argmax())
            received = f"costs of two choices {costs[at].tolist()} and {costs[at + 1].tolist()}"
        raise ValueError(
            "Expected at least one choice, one cost for each choice and budget, and budgets "
            f"that order a layer's choices alike. Received: for layer {layer} {received}"
        )
    required = sum((table.cost.min(axis=0) for table in tables), start=np.zeros_like(limits))
    for resource in np.flatnonzero(required > limits):
        raise InfeasibleBudget(int(required[resource]), int(limits[resource]), int(resource))
    return limits


def min_max(tables: Sequence[ChoiceTable], budgets: Sequence[int]) -> Solution:
    """Minimises the largest error under the budgets exactly, then spends the rest on ranks.

    For a threshold t every layer takes its cheapest choice with an error of at most t. The totals
    fall as t grows, so the optimum is the smallest error in any front whose totals are within the
    budgets. Bisection finds it. The rest of the budgets then lowers the largest remaining error,
    step by step. A layer whose next step does not fit is done; the next largest error follows.

    A step only raises the rank of the chosen slices, or keeps the whole kernel. The subspaces are
    nested, so such a step is better in every norm. Another number of slices may be better in one
    measure and worse in all others. ResNet20 at 40 % of its parameters has 65.7 % top-1 this way,
    53.7 % with steps to any choice, and 64.6 % with the rest unspent.

    Args:
        tables: One table of choices per layer.
        budgets: Largest total costs, integers.

    Returns:
        The `Solution`; ties are broken in layer order.

    Raises:
        InfeasibleBudget: As `check_budgets`.
        ValueError: As `check_budgets`.

    Example:
        >>> from keras_alds.core.choices import choice_table
        >>> from keras_alds.core.spectra import spectra
        >>> table = choice_table(spectra(np.diag([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])))
        >>> table[min_max([table], [13]).indices[0]].rank
        1
    """
    limits = check_budgets(tables, budgets)
    if not tables:
        return Solution.of(tables, [], limits, 0.0)
    fronts = [table.front_rows() for table in tables]
    errors = [table.error[rows] for table, rows in zip(tables, fronts, strict=True)]

    def total_at(threshold: float) -> tuple[list[int], tuple[float, ...]]:
        """The cheapest rows with errors up to a threshold, and their total costs."""
        found = [int(np.searchsorted(-error, -threshold)) for error in errors]
        if any(n == error.size for n, error in zip(found, errors, strict=True)):
            return [], (math.inf,) * limits.size
        picks = [int(rows[n]) for rows, n in zip(fronts, found, strict=True)]
        return picks, tuple(_total(tables, picks, limits).tolist())

    thresholds = np.unique(np.concatenate(errors))
    # The largest threshold is feasible: there every layer takes its cheapest choice.
    low, high = 0, thresholds.size - 1
    while low < high:
        middle = (low + high) // 2
        if (total_at(thresholds[middle])[1] <= limits).all():
            high = middle
        else:
            low = middle + 1
    optimum = float(thresholds[low])
    certificate = None
    if low:
        below = float(thresholds[low - 1])
        certificate = below, total_at(below)[1]
    picks = _lower_largest(tables, total_at(optimum)[0], limits)
    return Solution.of(tables, picks, limits, optimum, certificate)


def _lower_largest(tables: Sequence[ChoiceTable], picks: Sequence[int], limits: Int64) -> list[int]:
    """Spends the rest of the budgets on rank for the layers with the largest errors."""
    picks = list(picks)
    left = limits - _total(tables, picks, limits)
    largest = [
        (-float(table.error[row]), n)
        for n, (table, row) in enumerate(zip(tables, picks, strict=True))
    ]
    heapq.heapify(largest)
    while largest:
        _, n = heapq.heappop(largest)
        table = tables[n]
        following = more_rank(table, picks[n])
        step = table.cost[following] - table.cost[picks[n]]
        if following != picks[n] and (step <= left).all():
            left -= step
            picks[n] = following
            heapq.heappush(largest, (-float(table.error[following]), n))
    return picks


def more_rank(table: ChoiceTable, row: int) -> int:
    """Returns the cheapest row with less error in the same slices, or with the whole kernel.

    Returns:
        A row with less error, or `row` itself if there is none.
    """
    same = (table.slices == table.slices[row]) & (table.scheme == table.scheme[row])
    better = np.flatnonzero((same | (table.slices == 0)) & (table.error < table.error[row]))
    return row if better.size == 0 else int(better[np.argmin(table.cost[better, 0])])


def min_sum(tables: Sequence[ChoiceTable], budgets: Sequence[int]) -> Solution:
    """Minimises the sum of the errors, to within one step per budget of its lower bound.

    Steps along the lower convex hulls of all fronts are taken in order of error saved per cost,
    while the budgets last. Bisection on a Lagrange multiplier would end at the same place. The rest
    goes to the steps that lower the sum most, on any front and also off the hulls, until none
    fits. Another trial takes the steps that save most per cost. The best trial wins. If it is
    not close to the lower bound and the instance is small, pairs of layers then exchange cost
    while that lowers the sum (exact for two layers).

    Args:
        tables: One table of choices per layer.
        budgets: Largest total costs, integers.

    Returns:
        The `Solution`; its `lower_bound` is the best Lagrangian bound found.

    Raises:
        InfeasibleBudget: As `check_budgets`.
        ValueError: As `check_budgets`.

    Example:
        >>> from keras_alds.core.choices import choice_table
        >>> from keras_alds.core.spectra import spectra
        >>> table = choice_table(spectra(np.diag([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])))
        >>> table[min_sum([table], [24]).indices[0]].rank
        2
    """
    limits = check_budgets(tables, budgets)
    rows = [table.front_rows() for table in tables]
    fronts = [table.take(front) for table, front in zip(tables, rows, strict=True)]
    scale = _scale(limits)
    trials = []
    # Costs above the least one of each layer: the price of a budget that leaves no choice is so
    # high that total costs would round away the errors.
    floors = [front.cost.min(axis=0) for front in fronts]
    spare = limits - sum(floors)
    bound = 0.0
    for picks, prices in walks(fronts, limits, hull_chain):
        least = [
            float((front.error + (front.cost - floor) @ prices).min())
            for front, floor in zip(fronts, floors, strict=True)
        ]
        bound = max(bound, math.fsum(least) - float(spare @ prices))
        trials += [_spend(fronts, picks, limits, each) for each in (None, scale)]
    best = min(trials, key=lambda trial: total_error(fronts, trial))
    best = _exchange(fronts, best, limits, bound)
    indices = [int(front[pick]) for front, pick in zip(rows, best, strict=True)]
    return Solution.of(tables, indices, limits, bound)


def total_error(tables: Sequence[ChoiceTable], picks: Sequence[int]) -> float:
    """Returns the sum of the errors of one row per table."""
    return math.fsum(float(table.error[i]) for table, i in zip(tables, picks, strict=True))


def _total(tables: Sequence[ChoiceTable], picks: Sequence[int], limits: Int64) -> Int64:
    """Total cost of one row per table, in each budget."""
    costs = (table.cost[i] for table, i in zip(tables, picks, strict=True))
    return sum(costs, start=np.zeros_like(limits))


def _spend(
    fronts: Sequence[ChoiceTable], picks: Sequence[int], limits: Int64, scale: Float64 | None
) -> list[int]:
    """Takes the best steps that fit: by error saved, or per cost if a scale is given."""
    picks = list(picks)
    left = limits - _total(fronts, picks, limits)

    def best_step(n: int) -> tuple[float, int, int] | None:
        cost, error, now = fronts[n].cost, fronts[n].error, picks[n]
        last = int(_affordable(cost, cost[now] + left))
        if last == now:
            return None
        saved = error[now] - error[now + 1 : last + 1]
        if scale is None:
            return -float(saved[-1]), n, last
        rates = saved / ((cost[now + 1 : last + 1] - cost[now]) * scale).max(axis=1)
        row = int(rates.argmax())
        return -float(rates[row]), n, now + 1 + row

    # The budget left only shrinks, so a layer's best step never improves after it was queued.
    queue = [step for n in range(len(fronts)) if (step := best_step(n))]
    heapq.heapify(queue)
    while queue:
        queued = heapq.heappop(queue)
        _, n, row = queued
        actual = best_step(n)
        if actual is None:
            continue
        if actual != queued:
            heapq.heappush(queue, actual)
            continue
        left -= fronts[n].cost[row] - fronts[n].cost[picks[n]]
        picks[n] = row
        if (following := best_step(n)) is not None:
            heapq.heappush(queue, following)
    return picks


def _affordable(cost: Int64, limits: Int64) -> Any:
    """The last row of a front within limits `[…, r]`; the first row must be within them."""
    rows = [np.searchsorted(cost[:, r], limits[..., r], side="right") for r in range(cost.shape[1])]
    return np.minimum.reduce(rows) - 1


def _exchange(
    fronts: Sequence[ChoiceTable], picks: Sequence[int], limits: Int64, bound: float
) -> list[int]:
    """Moves cost from one layer to another while that lowers the sum of the errors."""
    picks = list(picks)
    if len(fronts) * sum(map(len, fronts)) > _EXCHANGE_ROWS:
        return picks
    total = total_error(fronts, picks)
    while total - bound > _EXCHANGE_GAP * total:
        left = limits - _total(fronts, picks, limits)
        best = (0.0, 0, 0, 0, 0)
        for a, front in enumerate(fronts):
            rows = np.arange(picks[a])
            if not rows.size:
                continue
            freed = front.cost[picks[a]] - front.cost[rows] + left
            lost = front.error[rows] - front.error[picks[a]]
            for b, other in enumerate(fronts):
                if a == b:
                    continue
                up = _affordable(other.cost, other.cost[picks[b]] + freed)
                change = lost - (other.error[picks[b]] - other.error[up])
                row = int(change.argmin())
                if change[row] < best[0]:
                    best = (float(change[row]), a, row, b, int(up[row]))
        _, a, row_a, b, row_b = best
        trial = list(picks)
        trial[a], trial[b] = row_a, row_b
        # Compare the sums: a change may be smaller than their rounding.
        if a == b or (changed := total_error(fronts, trial)) >= total:
            break
        picks, total = trial, changed
    return picks


# -- Walks: every layer moves along a chain of its choices ---------------------------------------


@dataclass(frozen=True, eq=False)
class Chain:
    """The choices that a layer takes in turn as a scalar rises.

    Attributes:
        rows: Rows of the layer's table.
        levels: The scalar at which each one is taken, not descending; −∞ for the first.
    """

    rows: Int64
    levels: Float64

    @classmethod
    def of(cls, rows: Int64, levels: Float64) -> Chain:
        """Returns the chain of the given rows; raises each level to at least the one before it."""
        levels = np.maximum.accumulate(np.append(-np.inf, levels[1:]))
        return cls(rows.astype(np.int64), levels[: rows.size])


#: Makes a layer's chain from its table and the costs of its choices, `[n]`.
ChainOf = Callable[[ChoiceTable, Float64], Chain]


def hull_chain(table: ChoiceTable, cost: Float64) -> Chain:
    """Returns the choices that minimise λ·cost + error for some λ, ordered by −λ.

    They lie on the lower convex hull. Each starts at the λ at which the step to it saves as much
    error as it costs.

    Args:
        table: The choices of a layer.
        cost: Costs of the choices, `[n]`.
    """
    front = table.front_rows(cost)
    hull = front[lower_hull(cost[front], table.error[front])]
    rates = -np.diff(table.error[hull]) / np.diff(cost[hull])
    return Chain.of(hull, -np.append(np.inf, rates))


def lower_hull(cost: NDArray[Any], error: Float64) -> Int64:
    """Returns the rows of a front that are on its lower convex hull (monotone chain).

    Args:
        cost: Costs, strictly ascending.
        error: Errors, strictly descending.

    Returns:
        Their indices, ascending.
    """
    hull: list[int] = []
    x, y = cost.tolist(), error.tolist()
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, np.int64)


def walks(
    tables: Sequence[ChoiceTable], limits: Int64, chain: ChainOf, *, together: bool = False
) -> Iterator[tuple[list[int], Float64]]:
    """Walks along the layers' chains while the budgets last, for several ratios of the prices.

    Args:
        tables: One table per layer.
        limits: The budgets, from `check_budgets`.
        chain: Makes a layer's chain.
        together: Whether steps of one level are taken all together or not at all.

    Yields:
        `(rows, prices)`: where the walk ended, and the budgets' prices there.

    Raises:
        InfeasibleBudget: If the first choices of all chains together exceed a budget.
    """
    ratios = _ratios(limits.size)
    ratio = next(ratios)
    for step in itertools.count():
        weight = ratio * _scale(limits)
        chains = [chain(table, (table.cost * weight).sum(axis=1)) for table in tables]
        rows, stopped_by, level = _walk(tables, chains, limits, together)
        yield rows, max(-level, 0.0) * weight
        if stopped_by is None or step == stopped_by:
            return  # at the optimum the other budgets have price 0
        try:
            ratio = ratios.send(stopped_by)
        except StopIteration:
            return


def _ratios(count: int) -> Generator[Float64, int, None]:
    """Ratios of the budgets' prices: each budget alone, then all.

    It is sent the budget that stopped the walk, whose price then rises.
    """
    if count <= 2:
        low, high = 0.0, math.pi / 2
        for step in range(2 + _HALVINGS):
            angle = (low, high)[step] if step < 2 else (low + high) / 2
            stopped_by = yield np.array([math.cos(angle), math.sin(angle)])[:count]
            if step >= 2:
                low, high = (angle, high) if stopped_by == 1 else (low, angle)
        return
    for index in range(count):
        yield np.eye(count)[index]
    ratio = np.ones(count)
    for step in range(count * _HALVINGS):
        stopped_by = yield ratio / np.linalg.norm(ratio)
        ratio[stopped_by] *= 1 + 0.9**step


def _scale(limits: Int64) -> Float64:
    """Factors that convert the costs in each budget to units of the first."""
    comparable = np.maximum(limits, 1)
    return comparable[0] / comparable


def _walk(
    tables: Sequence[ChoiceTable], chains: Sequence[Chain], limits: Int64, together: bool
) -> tuple[list[int], int | None, float]:
    """Walks along all chains by level, as far as the budgets last.

    With `together`, the steps of one level are taken together or not at all.

    Returns:
        The rows at the end, the budget that stops the walk (None if none does), and the level of
        the first step that was not taken (0 if all were).
    """
    if not chains:
        return [], None, 0.0
    costs = [table.cost[c.rows] for table, c in zip(tables, chains, strict=True)]
    # All steps of all layers: the layer, the level and what it adds to the costs.
    layer = np.concatenate([np.full(c.rows.size - 1, n) for n, c in enumerate(chains)])
    level = np.concatenate([c.levels[1:] for c in chains])
    added = np.concatenate([np.diff(cost, axis=0) for cost in costs])
    order = np.argsort(level, kind="stable")  # ties in layer order
    layer, level, added = layer[order], level[order], added[order]
    start = sum((cost[0] for cost in costs), start=np.zeros_like(limits))
    over = start + np.cumsum(added, axis=0) > limits  # after each step, by budget
    may_end = np.append(np.diff(level) > 0, True)[: level.size] if together else True
    within = np.flatnonzero(may_end & ~over.any(axis=1))
    count = int(within[-1]) + 1 if within.size else 0  # of the steps that are taken
    if not count and (start > limits).any():
        resource = int(np.argmax(start > limits))
        raise InfeasibleBudget(int(start[resource]), int(limits[resource]), resource)
    picks = np.bincount(layer[:count], minlength=len(chains))
    rows = [int(c.rows[n]) for c, n in zip(chains, picks, strict=True)]
    if count == level.size:
        return rows, None, 0.0
    beyond = over[count:]
    return rows, int(np.argmax(beyond[beyond.any(axis=1).argmax()])), float(level[count])

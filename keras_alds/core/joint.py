r"""Two budgets at once: a limit on parameters and one on multiply–accumulates, say.

Within a layer both resources order the choices alike: its multiply–accumulates are its weights
times a constant. So for a threshold t on the error the cheapest choice of a layer is the cheapest
in both, both totals fall as t grows, and min–max stays exact: the least t that is within both.

For sums the budgets have prices λ, μ ≥ 0. For a ratio of the prices, the choices on the convex
hulls are walked through as for one budget, until a step leaves either of them; a bisection over the
ratio raises the price of the budget that stops the walk. Every pair of prices gives a lower bound,

    Σ_l min_i (ε_{l,i} + λ a_{l,i} + μ b_{l,i}) − λ A − μ B,

and the best one comes with the solution. Neither budget is ever exceeded.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.choices import ChoiceTable
from keras_alds.core.solvers import InfeasibleBudget, Solution, check_budget, more_rank
from keras_alds.research.scalars import Chain, ChainOf, hull_rates

Costs = Sequence[NDArray[np.int64]]

# Halvings of the angle between the two prices.
_HALVINGS = 24


def joint_min_max(tables: Sequence[ChoiceTable], costs: Costs, budgets: Sequence[int]) -> Solution:
    """Minimises the largest error under several budgets, exactly, and spends the rest on ranks.

    As `min_max_ranks` does under one: what is left lowers the largest errors by more rank in the
    slices that were chosen, or by keeping the kernel, as long as every budget lasts.

    Args:
        tables: One table a layer.
        costs: For every layer an array `[n, r]`: what its choices take of each of r budgets. In
            every layer all budgets order the choices alike.
        budgets: The r budgets, integers.

    Returns:
        The `Solution`; its cost is that of the first budget.

    Raises:
        InfeasibleBudget: If the cheapest choices together are above a budget; it says which.
        ValueError: If the budgets order choices differently.

    Example:
        >>> from keras_alds.core.choices import choice_table
        >>> from keras_alds.core.spectra import spectra
        >>> table = choice_table(spectra(np.diag([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])))
        >>> costs = np.stack([table.cost, 10 * table.cost], axis=1)
        >>> joint_min_max([table], [costs], [24, 150]).total_cost
        12
    """
    limits = _limits(tables, costs, budgets)
    fronts = [_rows(table, cost) for table, cost in zip(tables, costs, strict=True)]
    if not tables:
        return _solution(tables, costs, [], 0.0)
    errors = [table.error[rows] for table, rows in zip(tables, fronts, strict=True)]

    def picks_at(threshold: float) -> list[int] | None:
        """The cheapest rows with errors up to a threshold; None where a layer has none."""
        found = [int(np.searchsorted(-error, -threshold)) for error in errors]
        if any(n == error.size for n, error in zip(found, errors, strict=True)):
            return None
        return [int(rows[n]) for rows, n in zip(fronts, found, strict=True)]

    thresholds = np.unique(np.concatenate(errors))
    low, high = 0, thresholds.size - 1
    while low < high:
        middle = (low + high) // 2
        found = picks_at(thresholds[middle])
        if found is not None and (_total(costs, found) <= limits).all():
            high = middle
        else:
            low = middle + 1
    optimum = float(thresholds[low])
    picks = picks_at(optimum) or []
    left = limits - _total(costs, picks)
    largest = [
        (-float(table.error[row]), n) for n, (table, row) in enumerate(_pairs(tables, picks))
    ]
    heapq.heapify(largest)
    while largest:
        _, n = heapq.heappop(largest)
        following = more_rank(tables[n], picks[n])
        step = costs[n][following] - costs[n][picks[n]]
        if following != picks[n] and (step <= left).all():
            left = left - step
            picks[n] = following
            heapq.heappush(largest, (-float(tables[n].error[following]), n))
    return _solution(tables, costs, picks, optimum)


def joint_min_sum(tables: Sequence[ChoiceTable], costs: Costs, budgets: Sequence[int]) -> Solution:
    """Minimises the sum of the errors under several budgets, close to a lower bound.

    Args:
        tables: One table a layer.
        costs: As for `joint_min_max`.
        budgets: As for `joint_min_max`.

    Returns:
        The `Solution`; its `lower_bound` is the best Lagrangian bound that was met, and its cost
        that of the first budget.

    Raises:
        InfeasibleBudget: As `joint_min_max`.
        ValueError: As `joint_min_max`.
    """
    limits = _limits(tables, costs, budgets)
    best: list[int] | None = None
    bound = 0.0
    for picks, prices in _walks(tables, costs, limits, hull_rates):
        bound = max(bound, _dual(tables, costs, limits, prices))
        for per_cost in (False, True):
            spent = _spend(tables, costs, limits, picks, per_cost)
            if best is None or _sum(tables, spent) < _sum(tables, best):
                best = spent
    return _solution(tables, costs, best or [], bound)


def joint_scalar(
    tables: Sequence[ChoiceTable], costs: Costs, budgets: Sequence[int], *, chain: ChainOf
) -> Solution:
    """As `one_scalar`, within several budgets.

    Where the chain depends on what choices cost, the ratio of the budgets' prices is searched, and
    of all walks the one with the least sum of errors is taken.

    Args:
        tables: One table a layer.
        costs: As for `joint_min_max`.
        budgets: As for `joint_min_max`.
        chain: As for `one_scalar`.

    Returns:
        The `Solution`; its cost is that of the first budget.

    Raises:
        InfeasibleBudget: As `joint_min_max`.
        ValueError: As `joint_min_max`.
    """
    limits = _limits(tables, costs, budgets)
    walks = [picks for picks, _ in _walks(tables, costs, limits, chain)]
    best = min(walks, key=lambda picks: _sum(tables, picks))
    return _solution(tables, costs, best, 0.0)


def _walks(
    tables: Sequence[ChoiceTable], costs: Costs, limits: NDArray[np.int64], chain: ChainOf
) -> Iterator[tuple[list[int], NDArray[np.float64]]]:
    """Walks for several ratios of the prices: the choices, and the prices where the walk ended."""
    scale = 1 / np.maximum(limits, 1)
    low, high = 0.0, math.pi / 2
    # First each budget alone priced, then in between.
    angles = [low, high]
    for step in range(len(angles) + _HALVINGS):
        angle = angles[step] if step < len(angles) else (low + high) / 2
        weight = np.array([math.cos(angle), math.sin(angle)]) * scale
        priced = [cost[:, 0] * weight[0] + cost[:, 1] * weight[1] for cost in costs]
        chains = [chain(table, price) for table, price in zip(tables, priced, strict=True)]
        picks, stopped_by, level = _walk(chains, costs, limits)
        rows = [int(c.rows[n]) for c, n in zip(chains, picks, strict=True)]
        yield rows, max(-level, 0.0) * weight
        if stopped_by is None or (step == 0 and stopped_by == 0) or (step == 1 and stopped_by == 1):
            return  # the other budget's price is 0 at the optimum
        if step >= len(angles):
            low, high = (angle, high) if stopped_by == 1 else (low, angle)


def _walk(
    chains: Sequence[Chain], costs: Costs, limits: NDArray[np.int64]
) -> tuple[list[int], int | None, float]:
    """Walks along all chains by level, until a budget does not last.

    Returns:
        The positions in the chains, the budget that does not last (None if all do), and the level
        of the first step that was not taken (0 if all were).
    """
    steps = [
        (c.levels[1:], np.full(c.rows.size - 1, n), np.diff(cost[c.rows], axis=0))
        for n, (c, cost) in enumerate(zip(chains, costs, strict=True))
    ]
    picks = [0] * len(chains)
    if not steps:
        return picks, None, 0.0
    level, layer, step = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(level, kind="stable")
    level, layer = level[order], layer[order]
    start = sum(cost[c.rows[0]] for c, cost in zip(chains, costs, strict=True))
    over = start + np.cumsum(step[order], axis=0) > limits
    beyond = np.flatnonzero(over.any(axis=1))
    if not beyond.size:
        count, stopped_by, end = level.size, None, 0.0
    else:
        end = float(level[beyond[0]])
        count = int(np.searchsorted(level, end))  # what steps together is taken together
        # Of the group that does not fit, the budget that is over first.
        stopped_by = int(np.argmax(over[beyond[0]]))
    for n in layer[:count]:
        picks[int(n)] += 1
    return picks, stopped_by, end


def _spend(
    tables: Sequence[ChoiceTable],
    costs: Costs,
    limits: NDArray[np.int64],
    picks: Sequence[int],
    per_cost: bool,
) -> list[int]:
    """Takes the steps that save most error (per cost) and fit all budgets, until none does."""
    picks = list(picks)
    left = limits - _total(costs, picks)

    def best_step(n: int) -> tuple[float, int, int] | None:
        step = costs[n] - costs[n][picks[n]]
        saved = tables[n].error[picks[n]] - tables[n].error
        rows = np.flatnonzero((step <= left).all(axis=1) & (saved > 0))
        if not rows.size:
            return None
        gain = saved[rows]
        if per_cost:
            gain = gain / np.maximum((step[rows] / np.maximum(limits, 1)).max(axis=1), 1e-300)
        row = int(gain.argmax())
        return -float(gain[row]), n, int(rows[row])

    queue = [step for n in range(len(tables)) if (step := best_step(n))]
    heapq.heapify(queue)
    while queue:
        queued = heapq.heappop(queue)
        n = queued[1]
        actual = best_step(n)
        if actual is None:
            continue
        if actual != queued:
            heapq.heappush(queue, actual)
            continue
        left = left - (costs[n][actual[2]] - costs[n][picks[n]])
        picks[n] = actual[2]
        if following := best_step(n):
            heapq.heappush(queue, following)
    return picks


def _dual(
    tables: Sequence[ChoiceTable],
    costs: Costs,
    limits: NDArray[np.int64],
    prices: NDArray[np.float64],
) -> float:
    """The Lagrangian lower bound for some prices."""
    least = [float((t.error + c @ prices).min()) for t, c in zip(tables, costs, strict=True)]
    return math.fsum(least) - float(limits @ prices)


def _limits(
    tables: Sequence[ChoiceTable], costs: Costs, budgets: Sequence[int]
) -> NDArray[np.int64]:
    limits = np.array([check_budget(budget) for budget in budgets], np.int64)
    for layer, (table, cost) in enumerate(zip(tables, costs, strict=True)):
        order = np.argsort(cost[:, 0], kind="stable")
        if cost.shape != (len(table), limits.size) or (np.diff(cost[order], axis=0) < 0).any():
            raise ValueError(
                "Expected one cost a choice and budget, and budgets that order the choices of a "
                f"layer alike. Received: others for layer {layer}"
            )
    for index, budget in enumerate(limits):
        required = sum(int(cost[:, index].min()) for cost in costs)
        if required > budget:
            raise InfeasibleBudget(required, int(budget), index)
    return limits


def _rows(table: ChoiceTable, cost: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the Pareto front, by cost."""
    order = np.lexsort((table.rank, table.slices, table.error, cost[:, 0]))
    error = table.error[order]
    before = np.append(np.inf, np.minimum.accumulate(error)[:-1])
    return order[error < before]


def _total(costs: Costs, picks: Sequence[int]) -> Any:
    return sum(cost[row] for cost, row in zip(costs, picks, strict=True))


def _pairs(tables: Sequence[ChoiceTable], picks: Sequence[int]) -> Iterator[tuple[Any, int]]:
    return zip(tables, picks, strict=True)


def _sum(tables: Sequence[ChoiceTable], picks: Sequence[int]) -> float:
    return math.fsum(float(table.error[row]) for table, row in _pairs(tables, picks))


def _solution(
    tables: Sequence[ChoiceTable], costs: Costs, picks: Sequence[int], bound: float
) -> Solution:
    errors = [float(table.error[row]) for table, row in _pairs(tables, picks)]
    total = sum(int(cost[row, 0]) for cost, row in zip(costs, picks, strict=True))
    return Solution(tuple(picks), max(errors, default=0.0), math.fsum(errors), total, bound)

"""One scalar for all layers: how the methods of the paper's comparison share a budget.

Such a method has a single number: a fraction of the rank, a part of the energy or a price λ. It
determines every layer's choice. As the number moves from its smallest to its largest budget, a
layer walks along a *chain* of its choices, and takes each at a *level* of the number. So the total
only changes at the levels of the chains. Sorting and summing these once gives exactly the number
that uses most of the budget. Layers with the same level step together. The rest of the budget is
not spent, since the method does not step in one layer alone.

The methods are those of arXiv 2107.11442, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.choices import ChoiceTable
from keras_alds.core.solvers import (
    Chain,
    ChainOf,
    Solution,
    check_budgets,
    total_error,
    walks,
)


def one_scalar(
    tables: Sequence[ChoiceTable], budgets: Sequence[int], *, chain: ChainOf
) -> Solution:
    """Takes exactly the scalar whose choices use most of the budgets without exceeding them.

    With two budgets and a chain that depends on the costs of choices, it searches the ratio of the
    budgets' prices and takes the walk with the least sum of errors.

    Args:
        tables: One table per layer.
        budgets: Largest total costs, integers, one or two.
        chain: Defines the scalar: makes a layer's chain from its table and costs.

    Returns:
        The `Solution`; its lower bound is 0, since no error is minimised over all layers.

    Raises:
        InfeasibleBudget: If the first choices of all chains together exceed a budget.
        ValueError: As for `check_budgets`.

    Example:
        >>> from keras_alds.core.choices import choice_table, offered_ranks
        >>> from keras_alds.core.spectra import spectra
        >>> tables = [
        ...     choice_table(spectra(kernel), offered_ranks(kernel.shape, near_slices=1))
        ...     for kernel in (np.eye(8), np.diag([4.0, 1.0, 1.0, 1.0]))
        ... ]
        >>> solution = one_scalar(tables, [40], chain=fractions_of_rank)
        >>> [table[row].rank for table, row in zip(tables, solution.indices, strict=True)]
        [2, 1]
    """
    limits = check_budgets(tables, budgets)
    found = [rows for rows, _ in walks(tables, limits, chain, together=True)]
    best = min(found, key=lambda rows: total_error(tables, rows))
    return Solution.of(tables, best, limits, 0.0)


def fractions_of_rank(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"svd"`: the largest rank up to a fraction p of the full rank r, at least the first.

    The kernel stays dense once the factors would have as many weights as the kernel.

    Args:
        table: The choices of a layer for one number of slices.
        cost: Not used: the fraction does not depend on costs.

    Returns:
        The chain, by p.

    Example:
        >>> from keras_alds.core.choices import choice_table, offered_ranks
        >>> from keras_alds.core.spectra import spectra
        >>> table = choice_table(spectra(np.eye(6)), offered_ranks((6, 6), near_slices=1))
        >>> fractions_of_rank(table, table.cost[:, 0]).levels.tolist()
        [-inf, 0.3333333333333333, 0.5]
    """
    ranked, whole = _by_rank(table)
    levels = table.rank[ranked] / table.full_rank[ranked]
    if ranked.size and whole.size:
        row = ranked[-1]
        per_rank = int(table.weights[row]) // int(table.rank[row])
        even = int(table.weights[whole[0]]) / (per_rank * int(table.full_rank[row]))
        levels = np.append(levels, even)
    return Chain.of(np.append(ranked, whole), levels)


def errors_of_ranks(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"svd-energy"`: the least rank with an error of at most t.

    Args:
        table: The choices of a layer for one number of slices.
        cost: The costs of the choices; only their order matters.

    Returns:
        The chain, by −t.
    """
    front = table.front_rows(cost)
    error = table.error[front]
    # A row is taken as soon as t is below the error of the previous one.
    return Chain.of(front, -np.append(np.inf, error[:-1]))


def energy_drops(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"pca"`: keeps the ranks whose loss would lower the product of energies most per cost.

    Zhang et al. drop eigenvalues greedily. They first drop the one that lowers
    Π_l Σ_{m≤j_l} λ_{l,m} least per cost. With E the energy of a choice, this is the relative drop
    (E_j − E_{j−1}) / E_j / Δcost.

    Args:
        table: The choices of a layer for one number of slices; errors are 1 − E.
        cost: The costs of the choices.

    Returns:
        The chain, by the negative of the drop.

    References:
        Zhang et al., TPAMI 2016 (arXiv 1505.06798), section 3.3.
    """
    front = table.front_rows(cost)
    energy = 1 - table.error[front]
    drops = np.diff(energy) / energy[1:] / np.diff(cost[front])
    return Chain.of(front, -np.append(np.inf, drops))


def _by_rank(table: ChoiceTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the factorized choices by rank, and the row of the dense kernel if there is one."""
    ranked = np.flatnonzero(table.slices > 0)
    return ranked[np.argsort(table.rank[ranked])], np.flatnonzero(table.slices == 0)

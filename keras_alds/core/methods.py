"""The named methods: which error is measured and how the layers share the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from keras_alds.core.choices import ChoiceTable
from keras_alds.core.errors import get_error
from keras_alds.core.joint import Costs, joint_min_max, joint_min_sum, joint_scalar
from keras_alds.core.solvers import Solution, min_max_ranks, min_sum
from keras_alds.research.scalars import (
    ChainOf,
    energy_drops,
    errors_of_ranks,
    fractions_of_rank,
    hull_rates,
    one_scalar,
)


def pareto_fronts(tables: Sequence[ChoiceTable]) -> list[ChoiceTable]:
    """Returns the Pareto front of every table, the candidates of an optimising method.

    Args:
        tables: One table a layer.

    Returns:
        New tables, one a layer.
    """
    return [table.front() for table in tables]


@dataclass(frozen=True)
class Method:
    """A way to choose: an error measure, the candidates of every layer, and a solver.

    A new method is a new entry of `METHODS`. A method that does not optimise, such as one ratio
    for all layers, brings its own `candidates` and `solver` (see `keras_alds.research.scalars`).

    Attributes:
        name: Its name in `METHODS`.
        error: Error measure of its choices; one of the keys of `keras_alds.core.errors.ERRORS`.
        solver: `solver(candidates, budget)` returns a `Solution` that is within the budget.
        joint: `joint(candidates, costs, budgets)`, the same within several budgets; see
            `keras_alds.core.joint`.
        candidates: Reduces the tables of all layers to what `solver` chooses from.
        near_slices: The method takes only the number of slices k that is nearest to this one.
            Defaults to all.
        needs_data: Whether it needs calibration data.
        centred: Whether it works on the principal components of centred outputs, and so gives
            every layer that it factorizes a bias.
        summary: One line for messages and documentation.
    """

    name: str
    error: str
    solver: Callable[[Sequence[ChoiceTable], int], Solution]
    joint: Callable[[Sequence[ChoiceTable], Costs, Sequence[int]], Solution]
    candidates: Callable[[Sequence[ChoiceTable]], list[ChoiceTable]] = pareto_fronts
    near_slices: int | None = None
    needs_data: bool = False
    centred: bool = False
    summary: str = ""

    @property
    def folds(self) -> bool:
        """Whether it can choose among fold schemes: not on data, nor with slices of its own."""
        return not self.needs_data and self.near_slices is None

    def solve(
        self, tables: Sequence[ChoiceTable], budget: int
    ) -> tuple[list[ChoiceTable], Solution]:
        """Picks one choice a layer.

        Args:
            tables: One table a layer, from `choice_table` with this method's `error` and
                `near_slices`.
            budget: Largest total cost, an integer.

        Returns:
            `(candidates, solution)`; `solution.indices[n]` is a row of `candidates[n]`.

        Raises:
            InfeasibleBudget: If even the cheapest choices are above the budget.

        Example:
            >>> import numpy as np
            >>> from keras_alds.core.choices import choice_table
            >>> from keras_alds.core.spectra import spectra
            >>> table = choice_table(spectra(np.diag([3.0, 1.0, 1.0, 1.0])))
            >>> candidates, solution = get_method("alds").solve([table], 9)
            >>> candidates[0][solution.indices[0]].rank
            1
        """
        candidates = self.candidates(tables)
        return candidates, self.solver(candidates, budget)

    def solve_joint(
        self, tables: Sequence[ChoiceTable], units: Sequence[int], budgets: tuple[int, int]
    ) -> tuple[list[ChoiceTable], Solution]:
        """Picks one choice a layer within two budgets.

        Args:
            tables: As for `solve`, with what the choices take of the first budget as their costs.
            units: What one kernel weight of each layer takes of the second budget.
            budgets: The two budgets, integers.

        Returns:
            As `solve`.

        Raises:
            InfeasibleBudget: If even the cheapest choices are above a budget; it says which.
        """
        candidates = self.candidates(tables)
        costs = [
            np.stack([table.cost, unit * table.weights], axis=1)
            for table, unit in zip(candidates, units, strict=True)
        ]
        return candidates, self.joint(candidates, costs, budgets)


def _scalar(chain: ChainOf) -> dict[str, Any]:
    """Both solvers of a method with one scalar."""
    return {"solver": partial(one_scalar, chain=chain), "joint": partial(joint_scalar, chain=chain)}


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                "alds",
                error="slice",
                solver=min_max_ranks,
                joint=joint_min_max,
                candidates=list,
                summary="least largest relative error over the layers, exact (ALDS)",
            ),
            Method(
                "energy",
                error="energy",
                solver=min_sum,
                joint=joint_min_sum,
                summary="least sum of relative squared errors over the layers",
            ),
            Method(
                "activation",
                error="energy",
                solver=min_sum,
                joint=joint_min_sum,
                needs_data=True,
                summary="least sum of relative squared errors of the layers' outputs on data",
            ),
            # What the paper compares with, and its ablations. What one scalar leaves of the
            # budget is not spent: another rank in one layer alone would be another method.
            Method(
                "svd",
                error="energy",
                **_scalar(fractions_of_rank),
                candidates=list,
                near_slices=1,
                summary="the same fraction of the full rank in every layer, one slice",
            ),
            Method(
                "svd-energy",
                error="energy",
                **_scalar(errors_of_ranks),
                candidates=list,
                near_slices=1,
                summary="the same part of the squared singular values in every layer, one slice",
            ),
            Method(
                "l-rank",
                error="residual",
                **_scalar(hull_rates),
                candidates=list,
                near_slices=1,
                summary="least λ·cost + squared error of every layer, one λ, one slice",
            ),
            Method(
                "pca",
                error="energy",
                **_scalar(energy_drops),
                candidates=list,
                near_slices=1,
                needs_data=True,
                centred=True,
                summary="principal components of the layers' outputs on data, one slice",
            ),
            Method(
                "alds-error",
                error="slice",
                solver=min_max_ranks,
                joint=joint_min_max,
                candidates=list,
                near_slices=3,
                summary='ranks as "alds" chooses them, for slices nearest to 3',
            ),
            Method(
                "alds-simple",
                error="slice",
                **_scalar(fractions_of_rank),
                candidates=list,
                near_slices=3,
                summary="the same fraction of the full rank in every layer, slices nearest to 3",
            ),
            Method(
                "alds-simple-5",
                error="slice",
                **_scalar(fractions_of_rank),
                candidates=list,
                near_slices=5,
                summary="the same fraction of the full rank in every layer, slices nearest to 5",
            ),
        )
    }
)


#: What is used where no method is named, without calibration data and with some.
DEFAULT = "energy"
DEFAULT_WITH_DATA = "activation"


def get_method(name: str, error: str | None = None) -> Method:
    """Returns a method by its name, with another error measure if asked for.

    Args:
        name: One of the keys of `METHODS`.
        error: Error measure to use in place of the method's own.

    Returns:
        The `Method`.

    Raises:
        ValueError: If the method or the error measure is unknown, or the method measures on data.

    Example:
        >>> get_method("alds", error="spectral").error
        'spectral'
    """
    try:
        method = METHODS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"Expected a method, one of {sorted(METHODS)}. Received: method={name!r}"
        ) from None
    if error is None:
        return method
    if method.needs_data:
        raise ValueError(
            f"Expected no `error` with the method {name!r}: it measures the error of outputs. "
            f"Received: error={error!r}"
        )
    return replace(method, error=get_error(error).name)


def choose_method(name: str | None, *, has_data: bool, error: str | None = None) -> str:
    """Returns the name of the method to use, given whether there is calibration data.

    Args:
        name: One of the keys of `METHODS`, or None: `"activation"` with data, else `"energy"`,
            the better ones in the measured tables (docs/results.md).
        has_data: Whether there is calibration data.
        error: The error measure that is asked for, if any. With no name and no data the method is
            then `"alds"`, whose measures they are.

    Returns:
        A key of `METHODS`.

    Raises:
        ValueError: If the method is unknown, needs data and there is none, or does not use any.

    Example:
        >>> choose_method(None, has_data=True)
        'activation'
    """
    if name is None:
        if has_data:
            return DEFAULT_WITH_DATA
        return DEFAULT if error is None else "alds"
    method = get_method(name)
    if method.needs_data and not has_data:
        raise ValueError(
            f"Expected `calibration_data` for the method {name!r}. Received: calibration_data=None"
        )
    if has_data and not method.needs_data:
        users = [other.name for other in METHODS.values() if other.needs_data]
        raise ValueError(
            f"Expected a method that uses `calibration_data`, one of {users}, or no data. "
            f"Received: method={name!r}"
        )
    return name

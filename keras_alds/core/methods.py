"""What a method is: which error it measures, how the layers share the budget, what it does on data.

All methods of the package are listed in `keras_alds.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.calibration.whitening import output_spectra_many
from keras_alds.core.choices import ChoiceTable
from keras_alds.core.slicing import Array
from keras_alds.core.solvers import Solution, min_max, min_sum
from keras_alds.core.spectra import Spectra

#: Makes `(encoder, decoder, bias)` of a kernel, its moment, a rank and the bias, if there is one.
FactorizeWithBias = Callable[[Array, SecondMoment, int, "Array | None"], tuple[Array, Array, Array]]


@dataclass(frozen=True)
class Method:
    """A way to choose: an error measure, and a solver that picks one choice a layer.

    Attributes:
        name: Its name.
        error: Error measure of its choices; one of the keys of `keras_alds.core.errors.ERRORS`.
        solve: `solve(tables, budgets)` returns a `Solution` that is within the budgets; the
            tables are those of `choice_table` with this method's `error` and `near_slices`.
        near_slices: The method takes only the number of slices k that is nearest to this one.
            Defaults to all.
        needs_data: Whether it needs calibration data.
        spectra: `spectra(kernels, moments)` decomposes layers for what they see of the data.
        factorize_with_bias: Makes the factors of one slice and a new bias, which every layer that
            is factorized then has. Defaults to None: factors of any slices, and the old bias.
        obstacle: `obstacle(moment)` says why a layer that sees this cannot be factorized, or
            returns None.
        summary: One line for messages and documentation.
    """

    name: str
    error: str
    solve: Callable[[Sequence[ChoiceTable], Sequence[int]], Solution]
    near_slices: int | None = None
    needs_data: bool = False
    spectra: Callable[[Sequence[Array], Sequence[SecondMoment]], list[Spectra]] = (
        output_spectra_many
    )
    factorize_with_bias: FactorizeWithBias | None = None
    obstacle: Callable[[SecondMoment], str | None] = lambda moment: None
    summary: str = ""

    @property
    def folds(self) -> bool:
        """Whether it can choose among fold schemes: not on data, nor with slices of its own."""
        return not self.needs_data and self.near_slices is None


ALDS = Method(
    "alds",
    error="slice",
    solve=min_max,
    summary="least largest relative error over the layers, exact (ALDS)",
)
ENERGY = Method(
    "energy",
    error="energy",
    solve=min_sum,
    summary="least sum of relative squared errors over the layers",
)
ACTIVATION = Method(
    "activation",
    error="energy",
    solve=min_sum,
    needs_data=True,
    summary="least sum of relative squared errors of the layers' outputs on data",
)

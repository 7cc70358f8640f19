"""A method: its error measure, its split of the budget over the layers, and its use of data.

`keras_alds.methods` lists all methods of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from keras_alds.core.calibration.held_out import held_out_spectra_many
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.choices import ChoiceTable
from keras_alds.core.slicing import Array
from keras_alds.core.solvers import Solution, min_max, min_sum
from keras_alds.core.spectra import Spectra

#: Makes `(encoder, decoder, bias)` from a kernel, its second moment, a rank and the bias, if any.
FactorizeWithBias = Callable[[Array, SecondMoment, int, "Array | None"], tuple[Array, Array, Array]]
#: `decompose(kernels, moments, ranks)` makes spectra. The ranks are the largest ones that matter,
#: by number of slices, for every kernel.
Decompose = Callable[
    [Sequence[Array], Sequence[SecondMoment], Sequence[Mapping[int, int]]], list[Spectra]
]


@dataclass(frozen=True)
class Method:
    """An error measure, and a solver that picks one choice per layer.

    Attributes:
        name: Its name.
        error_measure: Error measure of its choices; one of the keys of
            `keras_alds.core.errors.ERRORS`.
        solve: `solve(tables, budgets)` returns a `Solution` within the budgets. The tables come
            from `choice_table` with this method's `error_measure` and `near_slices`.
        near_slices: The method uses only the number of slices k nearest to this one. Defaults to
            all.
        schemes: The fold schemes that it uses, if it does not choose among those of `slicing`.
        needs_data: Whether it needs calibration data.
        takes_data: Whether it can do with calibration data or without.
        synthetic: Whether it makes examples itself.
        package: An optional package that it needs, or None.
        published: Whether it is a published method, which any slices belong to.
        spectra: Decomposes kernels, given their inputs' second moments.
        factorize_with_bias: Makes the factors for one slice and a new bias, so that every
            factorized layer has a bias. Defaults to None: factors of any slices, and the old bias.
        obstacle: `obstacle(moment)` returns why a layer with this second moment cannot be
            factorized, or None.
        summary: One line for messages and documentation.
    """

    name: str
    error_measure: str
    solve: Callable[[Sequence[ChoiceTable], Sequence[int]], Solution]
    near_slices: int | None = None
    schemes: tuple[int, ...] | None = None
    needs_data: bool = False
    takes_data: bool = False
    synthetic: bool = False
    package: str | None = None
    published: bool = False
    spectra: Decompose = held_out_spectra_many
    factorize_with_bias: FactorizeWithBias | None = None
    obstacle: Callable[[SecondMoment], str | None] = lambda moment: None
    summary: str = ""

    @property
    def folds(self) -> bool:
        """Whether it can choose fold schemes: not with slices or factors of its own."""
        own = (self.near_slices, self.factorize_with_bias, self.schemes)
        return own == (None, None, None)

    @property
    def uses_data(self) -> bool:
        """Whether its errors are those of outputs, on the user's examples or its own."""
        return self.needs_data or self.synthetic


ALDS = Method(
    "alds",
    published=True,
    error_measure="slice",
    solve=min_max,
    summary="least largest relative error over the layers, exact (ALDS)",
)
ENERGY = Method(
    "energy",
    error_measure="energy",
    solve=min_sum,
    summary="least sum of relative squared errors over the layers",
)
ACTIVATION = Method(
    "activation",
    error_measure="energy",
    solve=min_sum,
    needs_data=True,
    summary="least sum of relative squared errors of the layers' outputs on data",
)
SYNTHETIC = Method(
    "synthetic",
    error_measure="energy",
    solve=min_sum,
    synthetic=True,
    summary="as activation, on noise that fits the model's BatchNormalization in place of data",
)

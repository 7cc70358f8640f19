"""`sensitivity`: what cutting each layer alone does to the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_alds import plots
from keras_alds._backend.layers import KerasModel
from keras_alds.choosing import calibrated, checked_options, selection_of
from keras_alds.core.checks import did_you_mean, is_fraction
from keras_alds.core.choices import ChoiceTable
from keras_alds.models.inventory import LayerRecord, check_is_model
from keras_alds.models.recompose import inspected, recomposed, to_recompose
from keras_alds.models.resources import Resource
from keras_alds.models.turns import alone
from keras_alds.options import LEAST_CR, SelectOptions, check_names, of_all_forms, takes_options
from keras_alds.resources import RESOURCES
from keras_alds.tables import Tabular, TextTable, counted, decimals

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """What cutting one layer does while all others stay as they are; made by `sensitivity`.

    The choice is the one with the least error that removes the fraction. All its figures are None
    if no allowed choice does.

    Attributes:
        layer: The layer's name, or its path inside nested models.
        kind: The layer's class name.
        params: Its parameters.
        removed: The fraction of the layer that the choice removes.
        slices: Number of channel slices k of the choice.
        rank: Its rank j.
        scheme: Its fold scheme.
        error: The relative squared error of the layer's outputs, on held-out examples.
        divergence: What that does to the model's outputs, estimated: the Kullback–Leibler
            divergence in nats of probabilities, and of scores before softmax; for other outputs,
            the squared error relative to their variance. None if it was not measured.
    """

    layer: str
    kind: str
    params: int
    removed: float | None = None
    slices: int | None = None
    rank: int | None = None
    scheme: int | None = None
    error: float | None = None
    divergence: float | None = None


_COLUMNS = tuple(field.name for field in dataclasses.fields(LayerSensitivity))


@dataclasses.dataclass(frozen=True, repr=False)
class Sensitivity(Tabular):
    """The result of `sensitivity`.

    Attributes:
        name: The model's name.
        objective: What the fraction counts: `"params"`, `"macs"` or `"latency"`.
        fraction: The fraction of each layer to remove.
        layers: A `LayerSensitivity` for every layer that can be factorized, in the model's order
            or as sorted.

    Example:
    ```python
    result = keras_alds.sensitivity(model, x, fraction=0.5, verbose=0)
    result.sorted_by("divergence").summary()
    spared = [row.layer for row in result.sorted_by("divergence").layers[:1]]
    small = keras_alds.compress(model, cr=0.3, exclude=spared, calibration_data=x)
    ```
    """

    name: str
    objective: str
    fraction: float
    layers: tuple[LayerSensitivity, ...]

    def __repr__(self) -> str:
        return (
            f"<Sensitivity of {self.name!r}: {counted(len(self.layers), 'layer')}, "
            f"{self.fraction:.0%} of each. summary() shows them>"
        )

    def sorted_by(self, column: str, *, ascending: bool = False) -> Sensitivity:
        """The same layers in another order; those without the figure are last.

        Args:
            column: A field of `LayerSensitivity`, such as `"divergence"`.
            ascending: Whether the smallest one is first. Defaults to False.

        Raises:
            ValueError: If `column` is none of them.
        """
        if column not in _COLUMNS:
            raise ValueError(
                f"Expected a column, one of {', '.join(map(repr, _COLUMNS))}. "
                f"Received: column={column!r}{did_you_mean(column, _COLUMNS)}"
            )
        known = [row for row in self.layers if getattr(row, column) is not None]
        known.sort(key=lambda row: getattr(row, column), reverse=not ascending)
        others = [row for row in self.layers if getattr(row, column) is None]
        return dataclasses.replace(self, layers=(*known, *others))

    def to_rows(self) -> list[dict[str, Any]]:
        """The layers as dicts."""
        return [dataclasses.asdict(row) for row in self.layers]

    def _table(self) -> TextTable:
        rows = [
            [
                f"{row.layer} ({row.kind})",
                f"{row.params:,}",
                _text(row.removed, ".2%"),
                _text(row.slices),
                _text(row.rank),
                _decimals(row.error),
                _decimals(row.divergence),
            ]
            for row in self.layers
        ]
        columns = ["Layer (type)", "Params", "Removed", "Slices", "Rank", "Error", "Output"]
        title = (
            f"Sensitivity of {self.name!r}: each layer alone, without {self.fraction:.0%} of "
            f"{RESOURCES[self.objective].counted} of its own"
        )
        lines = ["Output: what this layer alone does to the model's outputs, estimated"]
        if any(row.removed is None for row in self.layers):
            lines.append("–: no allowed choice removes so much of the layer")
        return TextTable(title, columns, rows, lines)

    def plot(self, ax: Any = None) -> Any:
        """Plots what each layer does to the model's outputs as bars, the first layer on top.

        This is `keras_alds.plots.sensitivity`.

        Args:
            ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

        Returns:
            The axes. `axes.figure.savefig("sensitivity.png")` writes a file.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return plots.sensitivity(self, ax=ax)


@takes_options(leave_out=("method", "error_measure"))
def sensitivity(
    model: KerasModel,
    calibration_data: Any,
    *,
    fraction: float = 0.5,
    verbose: int = 1,
    **options: Unpack[SelectOptions],
) -> Sensitivity:
    """Estimates how much compressing each layer alone changes the outputs of a model.

    For each layer, the choice is taken that removes at least `fraction` of it with the least error
    of its outputs. What this error does to the model's outputs is read from a curve: they were
    measured at errors of the layer near 0.02, 0.1 and 0.3, on held-out examples. `select` weighs
    layers by the same curves. Effects of much smaller errors are extrapolated, and may be several
    times too large or too small. Use the result to see which layers to spare with `bounds` or
    `exclude`.

    The model is not changed. A layer of a compressed model is looked at in its dense form.

    Args:
        model: A built Keras 3 or tf_keras model.
        calibration_data: As for `select`: a few hundred unlabelled examples, or `CalibrationStats`.
        fraction: Float, 0 < fraction < 1. The part to remove of what the objective counts in each
            layer. Defaults to 0.5.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.
        {options}

    Returns:
        A `Sensitivity`: a table that can be sorted, printed and plotted.

    Raises:
        TypeError: If an option's name is unknown.
        ValueError: As for `select`, or if `fraction` is not as above.

    Example:
    ```python
    result = keras_alds.sensitivity(model, x, verbose=0)
    result.sorted_by("divergence").summary()
    ```

    References:
        Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710, section
        3.2: the sensitivity of single layers.
    """
    check_names(options, "sensitivity", leave_out=("method", "error_measure"))
    if not is_fraction(fraction):
        raise ValueError(
            "Expected `fraction`, the part of each layer to remove, to be a number with "
            f"0 < fraction < 1. Received: fraction={fraction!r}"
        )
    if calibration_data is None:
        raise ValueError(
            "Expected `calibration_data`, to measure what layers do to the outputs. Received: None"
        )
    options = of_all_forms(options)
    checked = checked_options(LEAST_CR, options, has_data=True, caller="sensitivity")
    check_is_model(model)
    with alone(model):
        inventory = inspected(model, checked)
        with recomposed(inventory, to_recompose(inventory, checked)) as dense:
            selection = selection_of(dense, checked, verbose=verbose, stacklevel=2)
            selection, _ = calibrated(selection, calibration_data, verbose=verbose, stacklevel=2)
            pairs = zip(selection.inventory.candidates, selection.tables(), strict=True)
            resource = selection.resources[0]
            layers = tuple(_row(record, table, resource, fraction) for record, table in pairs)
    return Sensitivity(model.name, checked.objective, float(fraction), layers)


def _row(
    record: LayerRecord, table: ChoiceTable, resource: Resource, fraction: float
) -> LayerSensitivity:
    """The row of a layer, with the choice of the least error that removes enough."""
    row = LayerSensitivity(record.path, record.class_name, record.params)
    before, dense = resource.of(record), resource.costs(record).dense
    if before is None:
        return row
    removed = (dense - table.cost[:, 0]) / before
    enough = np.flatnonzero((table.slices > 0) & (removed >= fraction))
    if not enough.size:
        return row
    best = int(enough[table.error[enough].argmin()])
    choice = table[best]
    return dataclasses.replace(
        row,
        removed=float(removed[best]),
        slices=choice.channel_slices,
        rank=choice.rank,
        scheme=choice.scheme,
        error=choice.error,
        divergence=float(record.curve(np.array(choice.error))) if record.curve else None,
    )


def _text(figure: float | None, form: str = "") -> str:
    return "–" if figure is None else format(figure, form)


def _decimals(figure: float | None) -> str:
    return "–" if figure is None else decimals(figure)

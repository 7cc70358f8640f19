"""`report`: the sizes of two models side by side."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.layers import KerasModel
from keras_alds.models.inventory import (
    Inventory,
    contains_factorized,
    count_params,
    dense_params,
)
from keras_alds.models.memory import peak_entries
from keras_alds.models.resources import count_macs
from keras_alds.resources import removed_fraction
from keras_alds.tables import Tabular, TextTable


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """Figures of a model before and after compression, as returned by `report`.

    Attributes:
        rows: Name of the figure to `(before, after)`; None for an unknown figure.
    """

    rows: Mapping[str, tuple[Any, Any]]

    def __repr__(self) -> str:
        figures = ", ".join(
            f"{name} {_figure(before)} → {_figure(after)}"
            for name, (before, after) in self.rows.items()
        )
        return f"<Comparison: {figures}. summary() prints a table>"

    def to_rows(self) -> list[dict[str, Any]]:
        """The figures as dicts."""
        return [
            {"figure": name, "before": before, "after": after}
            for name, (before, after) in self.rows.items()
        ]

    def _table(self) -> TextTable:
        rows = [
            [name, _figure(before), _figure(after), _ratio(before, after)]
            for name, (before, after) in self.rows.items()
        ]
        columns = ["", "before", "after", "after / before"]
        return TextTable("Before and after compression", columns, rows)


def report(
    model: KerasModel, compressed: KerasModel, figures: Mapping[str, tuple[Any, Any]] | None = None
) -> Comparison:
    """Compares the sizes of two models.

    Args:
        model: The original model.
        compressed: The compressed model.
        figures: Further rows, name to `(before, after)`, such as accuracies or file sizes.

    Returns:
        A `Comparison` of the parameters, the removed fraction of parameters, the MACs of one
        forward pass (None if the input shape is unknown), the bytes of the weights, the bytes of
        activations that are live at once for one example (None for a subclassed model, or if a size
        is unknown), and `figures`. `Comparison.summary()` prints it.

    Raises:
        ValueError: If an argument is not a model.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    keras_alds.report(model, small).summary()
    ```
    """
    before, after = sizes(model), sizes(compressed)
    if (
        contains_factorized(model)
        and not contains_factorized(compressed)
        and dense_params(model) == after["parameters"]
    ):
        warnings.warn(
            "Expected the original model first, `report(model, compressed)`. Received: first "
            f"'{model.name}', which is compressed, and then '{compressed.name}', which has as many "
            "parameters as that had before.",
            stacklevel=2,
        )
    rows: dict[str, tuple[Any, Any]] = {key: (before[key], after[key]) for key in before}
    rows["cr (parameters removed)"] = (
        0.0,
        removed_fraction(count_params(model), count_params(compressed)),
    )
    return Comparison({**rows, **(figures or {})})


def sizes(model: Any) -> dict[str, int | None]:
    """Parameters, MACs, and bytes of the weights and the activations of one model."""
    try:
        macs: int | None = count_macs(model)
    except ValueError:
        if not hasattr(model, "weights"):
            raise
        macs = None
    backend = _backend.backend_of(model)
    size = sum(
        math.prod(tuple(weight.shape)) * tensors.dtype_size(weight.dtype)
        for weight in backend.weights(model)
    )
    try:
        entries = peak_entries(Inventory.of(model))
    except ValueError:
        entries = None
    return {
        "parameters": count_params(model),
        "MACs": macs,
        "bytes of weights": size,
        "bytes of activations, peak": entries and entries * tensors.dtype_size(model.compute_dtype),
    }


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _ratio(before: Any, after: Any) -> str:
    if isinstance(before, (int, float)) and isinstance(after, (int, float)) and before:
        return f"{after / before:.3f}"
    return ""

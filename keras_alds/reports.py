"""`report`: two models side by side, as a table and as a page."""

from __future__ import annotations

import dataclasses
import math
import os
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
from keras_alds.models.turns import alone
from keras_alds.plan import CompressionPlan, check_plan
from keras_alds.reporting.curves import Curve, error_curves
from keras_alds.reporting.html import Page, versions
from keras_alds.reporting.layers import LayerRow, choices_of, layer_rows
from keras_alds.resources import RESOURCES, removed_fraction
from keras_alds.tables import Tabular, TextTable, decimals
from keras_alds.writing import write_whole


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """Figures of a model before and after compression, as returned by `report`.

    Attributes:
        rows: Name of the figure to `(before, after)`; None for an unknown figure.
        models: The original and the compressed model, which `to_html` looks at.
        plan: The plan of the compression, or None if it is not known.
    """

    rows: Mapping[str, tuple[Any, Any]]
    models: tuple[Any, Any]
    plan: CompressionPlan | None = None

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

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str | None:
        """Makes a page of the figures, the layers, their error curves, and what was skipped.

        The page is one HTML file of its own, which loads nothing. It describes the two models as
        they are when this is called. The curves need the singular values of the original's kernels,
        as `select` does; they are kept with the model.

        Args:
            path: The file. An existing file is replaced, once the page is complete: a report can
                be made again. Defaults to None: the text is returned.

        Returns:
            The text of the page if `path` is None, else None.

        Raises:
            ValueError: If `path` is a folder, or in none that exists. Nothing is written then.

        Example:
        ```python
        plan = keras_alds.select(model, cr=0.5)
        small = keras_alds.compress(model, plan=plan)
        keras_alds.report(model, small, plan=plan).to_html("report.html")
        ```
        """
        if path is not None:
            _check_path(path)
        with alone(self.models[0]):
            text = self._page().text()
        if path is None:
            return text
        write_whole(path, text)
        return None

    def _page(self) -> Page:
        before, after = map(Inventory.of, self.models)
        choices = {} if self.plan is None else choices_of(before, after, self.plan)
        rows, strangers = layer_rows(before, after, choices)
        predicted = _predicted(self.plan)
        figures = [
            (name, _figure(old), _figure(new), _ratio(old, new), predicted.pop(name, ("", ""))[1])
            for name, (old, new) in self.rows.items()
        ]
        figures += [(name, old, "", "", new) for name, (old, new) in predicted.items()]
        return Page(
            names=(before.model.name, after.model.name),
            figures=figures,
            rows=rows,
            strangers=strangers,
            curves=_curves(before, rows, after.params),
            versions=versions(before.backend.name, before.backend.keras.__version__),
            cr=removed_fraction(before.params, after.params),
            plan=self.plan,
        )


def report(
    model: KerasModel,
    compressed: KerasModel,
    figures: Mapping[str, tuple[Any, Any]] | None = None,
    *,
    plan: CompressionPlan | None = None,
) -> Comparison:
    """Compares two models, as a table or a page.

    Args:
        model: The original model.
        compressed: The compressed model, of `compress`, `ALDSCompress`, `refine` or `expand`.
        figures: Further rows, name to `(before, after)`, such as accuracies or file sizes.
        plan: The plan of the compression, for what it predicted and why layers were skipped.
            Defaults to None: the page says what the layers of both models tell.

    Returns:
        A `Comparison` of the parameters, the removed fraction of parameters, the MACs of one
        forward pass (None if the input shape is unknown), the bytes of the weights, the bytes of
        activations that are live at once for one example (None for a subclassed model, or if a size
        is unknown), and `figures`. `Comparison.summary()` prints it, and
        `Comparison.to_html("report.html")` writes a page about both models.

    Raises:
        ValueError: If an argument is not a model, or the plan is for another model.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    keras_alds.report(model, small).summary()
    keras_alds.report(model, small).to_html("report.html")
    ```
    """
    if plan is not None:
        check_plan(plan)
        choices_of(Inventory.of(model), Inventory.of(compressed), plan)
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
    return Comparison({**rows, **(figures or {})}, (model, compressed), plan)


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


def _curves(before: Inventory, rows: list[LayerRow], after: int) -> tuple[list[Curve], Curve] | str:
    """The error curves, or why there are none."""
    try:
        return error_curves(before, rows, after)
    except ValueError as error:
        return str(error)


def _predicted(plan: CompressionPlan | None) -> dict[str, tuple[str, str]]:
    """What a plan says of the model before and after, by the names of the figures."""
    if plan is None:
        return {}
    names = {"params": "parameters", "macs": "MACs"}
    found = {"cr (parameters removed)": ("", _figure(plan.reduction("params")))}
    for name, cost in plan.costs.items():
        info = RESOURCES[name]
        label = names.get(name, f"{info.column} ({plan.runtime})")
        before, after = (f"{count / info.scale:,.{info.decimals}f}" for count in cost)
        found[label] = before, after
    found["largest error of a layer"] = "", _figure(plan.max_error)
    if plan.distance is not None:
        found["distance of the outputs, held-out examples"] = "", _figure(plan.distance)
    return found


def _check_path(path: str | os.PathLike[str]) -> None:
    full = os.path.abspath(path)
    if os.path.isdir(full) or not os.path.isdir(os.path.dirname(full)):
        raise ValueError(
            "Expected the path of a file for the report, in a folder that exists. "
            f"Received: path={os.fspath(path)!r}"
        )


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else decimals(value)


def _ratio(before: Any, after: Any) -> str:
    if isinstance(before, (int, float)) and isinstance(after, (int, float)) and before:
        return f"{after / before:.3f}"
    return ""

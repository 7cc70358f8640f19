"""Pictures of models: errors against sizes, singular values, errors after compression."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_alds._backend.layers import KerasModel
from keras_alds.choosing import calibrated, checked_options, selection_of, wants_data
from keras_alds.core.choices import ChoiceTable
from keras_alds.methods import get_method
from keras_alds.models.inventory import Inventory, LayerRecord, check_is_model
from keras_alds.models.matching import is_applied, match
from keras_alds.models.ranks import kernel_spectra
from keras_alds.models.selection import Selection
from keras_alds.models.synthetic import synthetic_stats, unsuitable
from keras_alds.models.turns import alone
from keras_alds.naming import check_exclude, described
from keras_alds.options import LEAST_CR, SelectOptions, check_names, of_all_forms, takes_options
from keras_alds.plan import CompressionPlan, LayerChoice, check_plan
from keras_alds.plots.axes import (
    COLOURS,
    GREY,
    bar_axes,
    depth_colours,
    depth_labels,
    legend_above,
    line_axes,
)
from keras_alds.plots.measured import errors_of_outputs
from keras_alds.resources import RESOURCES

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options()
def size_error(
    model: KerasModel,
    plan: CompressionPlan | None = None,
    *,
    calibration_data: Any = None,
    layers: Any = None,
    ax: Any = None,
    **options: Unpack[SelectOptions],
) -> Any:
    """Draws the error of every layer against its size, and what a plan has chosen.

    A line has the least error that the layer can have at each size. Its size is the fraction that
    is left of the layer, of what the objective counts. The colour tells the layer's depth. Without
    a target, all forms count, as with `target="size"`.

    Args:
        model: A built Keras 3 or tf_keras model that is not compressed.
        plan: A plan of the model, or None. Its choices are drawn as dots, and the method, error
            measure, objective and target are those of the plan. They lie on the lines if all other
            options and the data are those of the plan too. Defaults to None.
        calibration_data: As for `select`. Defaults to None.
        layers: The layers to draw, named as in `exclude`. Defaults to None: all that can be
            factorized.
        ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.
        {options}

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an option's name is unknown.
        ValueError: As for `select`; or if `plan` is not a plan of the model, or `layers` names no
            layer.

    Example:
    ```python
    plan = keras_alds.select(model, cr=0.5)
    ax = keras_alds.plots.size_error(model, plan, layers=["stem", "down"])
    ax.figure.savefig("errors.png")
    ```
    """
    check_names(options, "size_error", more=("plan", "calibration_data", "layers", "ax"))
    if plan is not None:
        check_plan(plan)
        options = {**_options_of(plan), **options}  # type: ignore[typeddict-item]
    has_data, options = calibration_data is not None, of_all_forms(options)
    checked = checked_options(LEAST_CR, options, has_data=has_data, caller="size_error")
    check_is_model(model)
    with alone(model):
        inventory = Inventory.of(model, checked.exclude)
        chosen = {} if plan is None else _chosen(inventory, plan)
        selection = selection_of(inventory, checked, verbose=0)
        selection = _with_data(selection, calibration_data)
        records = selection.inventory.candidates
        curves = dict(zip([r.path for r in records], _curves(selection), strict=True))
    curves = _named(curves, records, layers)
    ax = line_axes(ax)
    styles = zip(depth_colours(ax, len(curves)), depth_labels(list(curves)), strict=True)
    for (path, (sizes, errors)), (colour, label) in zip(curves.items(), styles, strict=True):
        ax.plot(sizes, errors, color=colour, linewidth=1.2, label=label)
        if path in chosen and checked.objective in chosen[path].costs:
            cost = chosen[path].costs[checked.objective]
            ax.plot(1 - cost.removed, chosen[path].error, "o", color=colour, markersize=5)
    counted = RESOURCES[checked.objective].counted.removeprefix("the ")
    ax.set_xlabel(f"fraction left of the layer's {counted}")
    ax.set_ylabel("relative error")
    ax.set_xlim(0, 1.02)
    _name_dots(ax, chosen.keys() & curves.keys())
    return ax


def _name_dots(ax: Any, chosen: Collection[str]) -> None:
    """The legend, with an entry for the dots if there are any."""
    if chosen:
        ax.plot([], [], "o", color=GREY, label="chosen")
    legend_above(ax)


def _chosen(inventory: Inventory, plan: CompressionPlan) -> dict[str, LayerChoice]:
    """The choices of the factorized layers, by the path of the layer in the model.

    Raises:
        ValueError: If the plan was made for another model.
    """
    applied = is_applied(inventory, plan)
    pairs = zip(inventory.records, plan.choices, strict=True) if applied else match(inventory, plan)
    return {record.path: choice for record, choice in pairs if choice.factorized}


def _options_of(plan: CompressionPlan) -> dict[str, Any]:
    """The options of `select` that a plan tells."""
    known = {"method": plan.method, "objective": plan.objective, "target": plan.target}
    if plan.error_measure != get_method(plan.method).error_measure:
        known["error_measure"] = plan.error_measure
    return {name: value for name, value in known.items() if value is not None}


def _with_data(selection: Selection, calibration_data: Any) -> Selection:
    """The selection with calibration statistics, or those of noise, as in `select`."""
    selection, calibration = calibrated(selection, calibration_data, verbose=0, stacklevel=3)
    if calibration is not None or not selection.method.synthetic:
        return selection
    if unsuitable(selection.inventory) is not None:
        return selection.without_data()
    return selection.calibrated(synthetic_stats(selection.inventory, verbose=0))


def _curves(selection: Selection) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sizes and least errors of each layer."""
    resource, found = selection.resources[0], []
    for record, table in zip(selection.inventory.candidates, selection.tables(), strict=True):
        before = resource.of(record) or 1
        front: ChoiceTable = table.front()
        left = 1 - (resource.costs(record).dense - front.cost[:, 0]) / before
        order = np.argsort(left)
        found.append((left[order], front.error[order]))
    return found


def _named(
    values: Mapping[str, Any], records: Sequence[LayerRecord], layers: Any
) -> dict[str, Any]:
    """The values of the layers that the user names."""
    if layers is None:
        return dict(values)
    items = check_exclude(layers, "layers")
    known = [record for record in records if record.path in values]
    for item in items:
        if not any(record.is_named_by(item) for record in known):
            raise ValueError(
                "Expected `layers` to name layers that can be factorized. "
                f"Received: {described(item)}, which names none"
            )
    return {r.path: values[r.path] for r in known if any(map(r.is_named_by, items))}


def singular_values(
    model: KerasModel, plan: CompressionPlan | None = None, *, layers: Any = None, ax: Any = None
) -> Any:
    """Draws the singular values of every layer's kernel, relative to the largest one.

    The kernel is unfolded to one matrix (fold scheme 0). Lines that fall fast belong to layers
    that lose little. A factorized layer is drawn by the product of its factors. The colour tells
    the layer's depth.

    Args:
        model: A built Keras 3 or tf_keras model.
        plan: A plan of the model, or None. Where it takes one slice in scheme 0, a dot shows the
            first singular value that it drops. Defaults to None.
        layers: The layers to draw, named as in `exclude`. Defaults to None: all that can be
            factorized.
        ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `model` is not a built model, `plan` is not a plan of it, or `layers` names
            no layer.

    Example:
    ```python
    keras_alds.plots.singular_values(model).figure.savefig("spectra.png")
    ```
    """
    check_is_model(model)
    if plan is not None:
        check_plan(plan)
    with alone(model):
        inventory = Inventory.of(model)
        choices = {} if plan is None else _chosen(inventory, plan)
        found = _named(kernel_spectra(inventory), inventory.records, layers)
    ax = line_axes(ax)
    one_slice = [(p, c) for p, c in choices.items() if (c.slices, c.scheme) == (1, 0)]
    chosen = {path: choice.rank or 0 for path, choice in one_slice}
    styles = zip(depth_colours(ax, len(found)), depth_labels(list(found)), strict=True)
    for (path, values), (colour, label) in zip(found.items(), styles, strict=True):
        relative = values / (values[0] or 1)
        places = np.arange(1, len(values) + 1) / len(values)
        ax.plot(places, relative, color=colour, linewidth=1.2, label=label)
        rank = chosen.get(path, len(values))
        if rank < len(values):
            ax.plot(places[rank], relative[rank], "o", color=colour, markersize=5)
    ax.set_yscale("log")
    ax.set_ylim(1e-3, 1.2)
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("index / full rank")
    ax.set_ylabel("singular value / largest")
    _name_dots(ax, chosen.keys() & found.keys())
    return ax


def output_errors(
    model: KerasModel,
    compressed: KerasModel,
    data: Any,
    *,
    plan: CompressionPlan | None = None,
    ax: Any = None,
) -> Any:
    """Draws how far the outputs of every factorized layer are from the original's.

    Both models run on the same examples, and each layer gets what the layers before it give. So
    errors add up, or are made up for by the layers after (`sequential`). The error is the squared
    distance relative to the squared outputs.

    Args:
        model: The original model, Keras 3 or tf_keras.
        compressed: The compressed model.
        data: Examples, of any type that `calibration_data` may have. Up to 1024 are used; take
            some that were not used to calibrate.
        plan: The plan, or None. If it was made with calibration data, dots show the errors in
            the plan: of each layer alone, with inputs of the original. Defaults to None.
        ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a model is none, the second is not the compressed form of the first, `plan`
            is not a plan of the first, or the data do not fit.

    Example:
    ```python
    plan = keras_alds.select(model, cr=0.3, calibration_data=x)
    small = keras_alds.compress(model, plan=plan, calibration_data=x)
    keras_alds.plots.output_errors(model, small, x, plan=plan).figure.savefig("outputs.png")
    ```
    """
    check_is_model(model)
    check_is_model(compressed)
    if plan is not None:
        check_plan(plan)
    choices = {} if plan is None else _chosen(Inventory.of(model), plan)
    errors = errors_of_outputs(model, compressed, data)
    ax = bar_axes(ax, list(errors))
    label = "compressed model"
    ax.barh(range(len(errors)), list(errors.values()), height=0.75, color=COLOURS[0], label=label)
    if plan is not None and wants_data(plan):
        rows = {path: row for row, path in enumerate(errors)}
        dots = [(c.error, rows[path]) for path, c in choices.items() if path in rows]
        ax.plot(
            *(zip(*dots, strict=True) if dots else ([], [])),
            "o", color=COLOURS[1], markeredgecolor="white", label="plan: this layer alone",
        )  # fmt: skip
        legend_above(ax)
    ax.set_xlabel("relative squared error of the layer's outputs")
    return ax

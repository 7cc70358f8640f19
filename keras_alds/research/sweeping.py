"""`sweep`: tabulates and plots accuracy against size for several methods and ratios."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from keras_alds import _backend, plots
from keras_alds._backend.layers import KerasModel
from keras_alds.api import compress, select
from keras_alds.methods import METHODS, get_method
from keras_alds.models.calibration import Calibration
from keras_alds.models.fit import check_sequential
from keras_alds.models.inventory import Inventory, count_params
from keras_alds.options import SelectOptions, check_cr, check_names, of_all_forms, takes_options
from keras_alds.plots.axes import new_figure
from keras_alds.progress import progress_bar
from keras_alds.resources import RESOURCES
from keras_alds.scores import check_evaluate, check_function, scored
from keras_alds.tables import Tabular, TextTable
from keras_alds.targets import SIZE

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_CRS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One compressed model of `sweep`, or the model itself (`method="dense"`, `cr=0`).

    Attributes:
        method: Name of the method.
        cr: The requested fraction to remove.
        removed: The fraction that was removed; None if `cr` is not reachable.
        params: Remaining parameters; None if `cr` is not reachable.
        score: The result of `evaluate` right after compression.
        retrained: Its result after retraining; None without retraining.
        seconds: Time to select and to compress, without calibration and evaluation.
        note: Why there are no figures, or None.
    """

    method: str
    cr: float
    removed: float | None
    params: int | None
    score: float | None
    retrained: float | None
    seconds: float | None
    note: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Sweep(Tabular):
    """The results of `sweep`.

    Attributes:
        rows: One row for the dense model, then one for every method and ratio.
        objective: What the ratios count: `"params"`, `"macs"` or `"latency"`.
        name: The model's name.

    Example:
    ```python
    accuracy = lambda model: float((model.predict(x, verbose=0).argmax(-1) == y).mean())
    result = keras_alds.sweep(model, accuracy, crs=[0.3, 0.5], methods=["alds", "svd"], verbose=0)
    print(result.to_markdown())
    result.to_csv("sweep.csv")
    ```
    """

    rows: tuple[SweepRow, ...]
    objective: str
    name: str

    def __repr__(self) -> str:
        crs = ", ".join(f"{cr:g}" for cr in self.crs)
        return (
            f"<Sweep of {self.name!r}: {len(self.methods)} methods, cr={crs} of {self.objective}, "
            f"dense score {self.dense.score}. summary() shows the scores>"
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in the order of the sweep."""
        return tuple(dict.fromkeys(row.method for row in self.rows if row.method != DENSE))

    @property
    def crs(self) -> tuple[float, ...]:
        """The ratios, in the order of the sweep."""
        return tuple(dict.fromkeys(row.cr for row in self.rows if row.method != DENSE))

    @property
    def dense(self) -> SweepRow:
        """The row of the model itself."""
        return self.rows[0]

    def to_markdown(self, *, retrained: bool = False, digits: int = 1) -> str:
        """A table of scores: one line per method, one column per ratio, `–` if not reachable.

        Args:
            retrained: Whether to take the scores after retraining.
            digits: Digits after the decimal point.
        """
        return self._scores(retrained, f".{digits}f", '`"{}"`').to_markdown()

    def to_rows(self) -> list[dict[str, Any]]:
        """All rows as dicts."""
        return [dataclasses.asdict(row) for row in self.rows]

    def _table(self) -> TextTable:
        return self._scores(self.dense.retrained is not None, ".4g", "{}")

    def _scores(self, retrained: bool, form: str, name: str) -> TextTable:
        """The scores; `form` and `name` are the formats of a score and of a method's name."""
        figures = {(row.method, row.cr): _score(row, retrained) for row in self.rows}
        base = _text(_score(self.dense, retrained), form)
        columns = [f"cr ({DENSE}: {base})", *(f"{cr:g}" for cr in self.crs)]
        rows = [
            [name.format(method), *(_text(figures[method, cr], form) for cr in self.crs)]
            for method in self.methods
        ]
        counted = RESOURCES[self.objective].counted
        when = "after retraining" if retrained else "no retraining"
        title = f"Sweep of {self.name!r}: scores by the fraction of {counted} to remove, {when}"
        return TextTable(title, columns, rows)

    def plot(self, path: str | os.PathLike[str], *, label: str = "score") -> None:
        """Plots the scores against the size, like Figure 1 of the paper, into an image file.

        The size is the achieved one, not the requested one. A second panel shows the scores after
        retraining, if there was any.

        Args:
            path: File to write; its suffix sets the format.
            label: Name of the scores.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        panels = [False, True] if self.dense.retrained is not None else [False]
        figure = new_figure(1.6 + 5.6 * len(panels), 4.4)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, retrained in zip(axes, panels, strict=True):
            plots.scores(self, retrained=retrained, label=label, ax=axis)
            axis.get_legend().remove()
            axis.set_title("after retraining" if retrained else "no retraining")
            axis.label_outer()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
        figure.savefig(path, dpi=110)


@takes_options(leave_out=("method", "error_measure"))
def sweep(
    model: KerasModel,
    evaluate: Callable[[Any], float],
    *,
    methods: str | Iterable[str] | None = None,
    crs: float | Iterable[float] = DEFAULT_CRS,
    calibration_data: Any = None,
    retrain: Callable[[Any], object] | None = None,
    sequential: bool | None = None,
    verbose: int = 1,
    **options: Unpack[SelectOptions],
) -> Sweep:
    """Compresses a model with every method to every ratio, and evaluates each result.

    All methods share the budget, size model and cloning of `compress`. `model` is unchanged.
    Methods that do not choose among fold schemes use scheme 0. The dense model is evaluated too,
    and a copy of it is retrained like the others, to show the effect of retraining itself.

    Args:
        model: A built Keras 3 or tf_keras model.
        evaluate: `evaluate(model)` returns the score of a model, such as its accuracy.
        methods: Names of methods. Defaults to all; those that need `calibration_data` or an
            optional package only with these, and `"tucker"` and `"cp"` only without a target and
            latency.
        crs: Fractions to remove. Defaults to 0.2, 0.3 … 0.7.
        calibration_data: As for `select`, for the methods that use it; the statistics are
            collected once.
        retrain: `retrain(model)` retrains a compressed model in place. It should set its seeds, so
            that all models get the same batches. Defaults to None: no retraining.
        sequential: As for `compress`, for the methods that support it.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.
        {options}

    Without a target, all methods may use all forms, as with `target="size"`.

    Returns:
        A `Sweep`: rows, Markdown, CSV and a plot. A ratio that a method cannot reach gives a row
        with a note and no figures.

    Raises:
        TypeError: If an option's name is unknown.
        ValueError: If `evaluate` or `retrain` is not a function, `evaluate` returns no number, a
            method or ratio is invalid, a method lacks the calibration data it needs, or the model
            cannot be compressed at all.

    Example:
    ```python
    def accuracy(model):
        return float((model.predict(x, verbose=0).argmax(-1) == y).mean())


    result = keras_alds.sweep(
        model, accuracy, methods=["svd", "pca"], crs=[0.3, 0.5], calibration_data=x, verbose=0
    )
    print(result.to_markdown(digits=2))
    ```

    References:
        Figure 1 of arXiv 2107.11442.
    """
    check_names(options, "sweep", leave_out=("method", "error_measure"))
    check_evaluate(evaluate)
    if retrain is not None:
        check_function(retrain, "retrain", "`lambda model: model.fit(x, y)`, or None")
    check_sequential(sequential, calibration_data)
    crs = (float(crs),) if isinstance(crs, (int, float)) else tuple(crs)
    for cr in crs:
        check_cr(cr)
    chosen = _chosen(methods, options, has_data=calibration_data is not None)
    if not crs or not chosen:
        raise ValueError(
            f"Expected at least one method and one ratio. Received: methods={chosen!r}, crs={crs!r}"
        )
    options = of_all_forms(options)
    # Raises errors about the model or the options early.
    select(model, min(crs), verbose=verbose, **options)
    calibration = None
    if calibration_data is not None:
        inventory = Inventory.of(model)
        calibration = Calibration.of(inventory, calibration_data, stacklevel=2)
        calibration.collected(inventory, verbose=verbose, stacklevel=2)
    rows = []
    with progress_bar(verbose) as progress:
        task = progress.add_task("dense", total=1 + len(chosen) * len(crs))
        rows.append(_dense_row(model, evaluate, retrain))
        progress.advance(task)
        for name in chosen:
            method = METHODS[name]
            data = calibration if method.needs_data or method.takes_data else None
            original = method.factorize_with_bias is not None
            one_by_one = None if data is None or original else sequential
            mine = {**options, "method": name}
            if not method.folds:
                mine["schemes"] = None
            for cr in crs:
                progress.update(task, description=f"{name}, cr={cr:g}")
                rows.append(_row(model, cr, data, mine, one_by_one, evaluate, retrain))
                progress.advance(task)
    return Sweep(tuple(rows), options.get("objective", "params"), model.name)


def _chosen(
    methods: str | Iterable[str] | None, options: Mapping[str, Any], *, has_data: bool
) -> list[str]:
    """The names of the methods; by default all whose requirements are met."""
    if methods is None:
        for_target = of_all_forms(options).get("target") != SIZE
        return [
            name
            for name, method in METHODS.items()
            if (has_data or not method.needs_data)
            and (method.package is None or importlib.util.find_spec(method.package))
            and not (method.schemes and for_target)
        ]
    names = list(dict.fromkeys([methods] if isinstance(methods, str) else methods))
    for name in names:
        if get_method(name).needs_data and not has_data:
            raise ValueError(
                f"Expected `calibration_data` for the method {name!r}. "
                "Received: calibration_data=None"
            )
    return names


def _dense_row(
    model: Any, evaluate: Callable[[Any], float], retrain: Callable[[Any], object] | None
) -> SweepRow:
    score, retrained = scored(evaluate, model), None
    if retrain is not None:
        backend = _backend.backend_of(model)
        with backend.creation_scope(model):
            copy = backend.copy_model(model, stacklevel=3)
        retrain(copy)
        retrained = scored(evaluate, copy)
    return SweepRow(DENSE, 0.0, 0.0, count_params(model), score, retrained, None)


def _row(
    model: Any,
    cr: float,
    calibration: Calibration | None,
    options: dict[str, Any],
    sequential: bool | None,
    evaluate: Callable[[Any], float],
    retrain: Callable[[Any], object] | None,
) -> SweepRow:
    start, method = time.perf_counter(), options["method"]
    try:
        plan = select(model, cr, calibration_data=calibration, verbose=0, **options)
    except ValueError as error:
        return SweepRow(method, cr, None, None, None, None, None, str(error))
    small = compress(
        model, plan=plan, calibration_data=calibration, sequential=sequential, verbose=0
    )
    seconds = time.perf_counter() - start
    score, retrained = scored(evaluate, small), None
    if retrain is not None:
        retrain(small)
        retrained = scored(evaluate, small)
    return SweepRow(method, cr, plan.cr, plan.params_after, score, retrained, seconds)


def _score(row: SweepRow, retrained: bool) -> float | None:
    return row.retrained if retrained else row.score


def _text(figure: float | None, form: str) -> str:
    return "–" if figure is None else format(figure, form)

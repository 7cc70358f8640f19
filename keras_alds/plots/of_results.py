"""Pictures of results: sweeps, searches, sensitivities, and ranks in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras_alds.core.checks import did_you_mean
from keras_alds.plots.axes import (
    COLOURS,
    GREY,
    MARKERS,
    bar_axes,
    depth_colours,
    depth_labels,
    legend_above,
    line_axes,
)
from keras_alds.resources import RESOURCES
from keras_alds.scores import Scored, frontier

if TYPE_CHECKING:
    from keras_alds.monitoring import RankMonitor
    from keras_alds.research.sweeping import Sweep
    from keras_alds.searching import SearchResult
    from keras_alds.sensitivities import Sensitivity

#: The ranks that `RankMonitor` measures.
RANKS = ("stable_rank", "effective_rank", "energy_rank")


def scores(
    result: Sweep | SearchResult, *, retrained: bool = False, label: str = "score", ax: Any = None
) -> Any:
    """Draws scores against the size that is left, one line for each method.

    The size is the one that was reached, of what the objective counts: parameters,
    multiply–accumulates or latency. Grey circles are the frontier: models for which no other is at
    least 0.01 smaller and at least as good. For a search, the least allowed score and the chosen
    model are marked.

    Args:
        result: What `sweep` or `search` returned.
        retrained: Whether to take a sweep's scores after retraining. Defaults to False.
        label: String, the name of the scores. Defaults to `"score"`.
        ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `result` is something else, or `retrained` is True without retraining.

    Example:
    ```python
    accuracy = lambda model: float((model.predict(x, verbose=0).argmax(-1) == y).mean())
    result = keras_alds.sweep(model, accuracy, methods=["alds", "svd"], crs=0.5, verbose=0)
    keras_alds.plots.scores(result, label="accuracy").figure.savefig("accuracy.png")
    ```
    """
    search = hasattr(result, "max_drop")
    if not search and not hasattr(result, "methods"):
        raise ValueError(
            "Expected `result` to be a Sweep or a SearchResult. "
            f"Received: result of type {type(result).__name__}"
        )
    dense = getattr(result, "dense", None)
    if retrained and (dense is None or dense.retrained is None):
        raise ValueError(
            "Expected a sweep with `retrain=`, to draw its scores after retraining. "
            f"Received: retrained=True, and a {type(result).__name__} without"
        )
    curves = _of_search(result) if search else _of_sweep(result, retrained)
    ax = line_axes(ax)
    # The same ratio gives sizes that differ a little between methods.
    every = {Scored(round(p.size, 2), p.score): p for points in curves.values() for p in points}
    best = [every[key] for key in frontier(every)]
    ax.plot(
        *_columns(best),
        "o",
        color=GREY,
        alpha=0.5,
        markersize=14,
        markeredgewidth=0,
        label="frontier",
    )
    for index, (name, points) in enumerate(curves.items()):
        if name == "dense":
            ax.axhline(points[0].score, color=GREY, linestyle=":", label=name)
            continue
        ax.plot(
            *_columns(sorted(points)),
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
            color=COLOURS[index % len(COLOURS)],
            linestyle="-" if index < len(COLOURS) else "--",
            label=name,
        )
    if search:
        _mark(ax, result)
    ax.set_xlabel(f"fraction of {RESOURCES[result.objective].counted} that is left")
    ax.set_ylabel(label)
    legend_above(ax)
    return ax


def _columns(points: Sequence[Scored]) -> tuple[list[float], list[float]]:
    """The sizes and the scores of points."""
    return [point.size for point in points], [point.score for point in points]


def _of_sweep(sweep: Any, retrained: bool) -> dict[str, list[Scored]]:
    """The sizes and scores of each method, and of the dense model last."""
    curves: dict[str, list[Scored]] = {method: [] for method in (*sweep.methods, "dense")}
    for row in sweep.rows:
        if row.removed is not None:
            score = row.retrained if retrained else row.score
            curves[row.method].append(Scored(1 - row.removed, score))
    return curves


def _of_search(search: Any) -> dict[str, list[Scored]]:
    points = [Scored(1 - point.removed, point.score) for point in search.points]
    return {"models": [*points, Scored(1.0, search.dense_score)]}


def _mark(ax: Any, search: Any) -> None:
    """Marks what a search was allowed, and what it took."""
    ax.axhline(search.limit, color=GREY, linestyle=":", label="limit")
    if search.best is not None:
        taken = [1 - search.best.removed], [search.best.score]
        ax.plot(*taken, "*", markersize=14, color=COLOURS[1], label="taken")


def sensitivity(result: Sensitivity, *, ax: Any = None) -> Any:
    """Draws what cutting each layer alone does to the model's outputs, the first layer on top.

    Layers without a figure are left out.

    Args:
        result: What `keras_alds.sensitivity` returned. `result.sorted_by("divergence")` has the
            layer that matters most on top.
        ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `result` is something else.

    Example:
    ```python
    result = keras_alds.sensitivity(model, x, verbose=0)
    keras_alds.plots.sensitivity(result).figure.savefig("sensitivity.png")
    ```
    """
    if not hasattr(result, "fraction"):
        raise ValueError(
            "Expected `result` to be a Sensitivity. "
            f"Received: result of type {type(result).__name__}"
        )
    rows = [row for row in result.layers if row.divergence is not None]
    ax = bar_axes(ax, [row.layer for row in rows])
    ax.barh(range(len(rows)), [row.divergence for row in rows], height=0.75, color=COLOURS[0])
    ax.set_xlabel(f"divergence of the outputs without {result.fraction:.0%} of the layer")
    return ax


def rank_history(monitor: RankMonitor, column: str = "effective_rank", *, ax: Any = None) -> Any:
    """Draws one of the ranks of every layer, divided by its full rank, against the epochs.

    The colour tells a layer's depth.

    Args:
        monitor: A `RankMonitor` after a training.
        column: `"stable_rank"`, `"effective_rank"` or `"energy_rank"`. Defaults to
            `"effective_rank"`.
        ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `monitor` is something else, or `column` is none of these.

    Example:
    ```python
    monitor = keras_alds.RankMonitor()
    model.fit(x, y, epochs=2, callbacks=[monitor], verbose=0)
    keras_alds.plots.rank_history(monitor, "stable_rank").figure.savefig("ranks.png")
    ```
    """
    if not isinstance(getattr(monitor, "history", None), list):
        raise ValueError(
            "Expected `monitor` to be a RankMonitor. "
            f"Received: monitor of type {type(monitor).__name__}"
        )
    if column not in RANKS:
        raise ValueError(
            f"Expected a rank, one of {', '.join(map(repr, RANKS))}. "
            f"Received: column={column!r}{did_you_mean(column, RANKS)}"
        )
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in monitor.history:
        points = lines.setdefault(row["layer"], [])
        points.append((row["epoch"], row[column] / row["full_rank"]))
    ax = line_axes(ax)
    styles = zip(depth_colours(ax, len(lines)), depth_labels(list(lines)), strict=True)
    for points, (colour, label) in zip(lines.values(), styles, strict=True):
        ax.plot(*zip(*points, strict=True), color=colour, label=label)
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{column.replace('_', ' ')} / full rank")
    ax.set_ylim(0, 1.02)
    if lines:
        legend_above(ax)
    return ax

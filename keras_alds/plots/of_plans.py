"""Pictures of a plan: ranks, and where parameters, MACs and latency go."""

from __future__ import annotations

from typing import Any

from keras_alds.core.chains import is_chain
from keras_alds.core.checks import positive_int
from keras_alds.core.slicing import convolution_unfolding, full_rank
from keras_alds.plan import CompressionPlan, LayerChoice, check_plan
from keras_alds.plots.axes import COLOURS, GREY, bar_axes, legend_above, note_at_end
from keras_alds.resources import RESOURCES, Cost


def ranks(plan: CompressionPlan, *, ax: Any = None) -> Any:
    """Draws the rank of every layer before and after, and its slices.

    The grey bar is the full rank of the layer's matrix, in the fold scheme that was chosen. The
    coloured bar is the rank of each slice: `3 × 16` means three slices of rank 16. Layers that
    stay dense have a grey bar only; those without a kernel to factorize are left out.

    Args:
        plan: The plan.
        ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `plan` is not a plan.

    Example:
    ```python
    plan = keras_alds.select(model, cr=0.5)
    keras_alds.plots.ranks(plan).figure.savefig("ranks.png")
    ```
    """
    check_plan(plan)
    choices = [choice for choice in plan.choices if choice.has_kernel and choice.kernel_shape]
    full = [_full_rank(choice) for choice in choices]
    ax = bar_axes(ax, [choice.layer for choice in choices])
    rows = range(len(choices))
    ax.barh(rows, full, height=0.75, color=GREY, label="full rank")
    ax.barh(
        rows,
        [choice.rank or 0 for choice in choices],
        height=0.75,
        color=COLOURS[0],
        label="rank of each slice",
    )
    for row, (choice, most) in enumerate(zip(choices, full, strict=True)):
        slices = f"{choice.slices} × " if choice.slices != 1 else ""
        text = f"{slices}{choice.rank}" if choice.factorized else "dense"
        note_at_end(ax, row, max(most, choice.rank or 0), text)
    ax.set_xlim(0, 1.2 * max(full, default=1))
    ax.set_xlabel("rank")
    legend_above(ax)
    return ax


def _full_rank(choice: LayerChoice) -> int:
    """The smaller side of the unfolded kernel."""
    shape = choice.kernel_shape or (0, 0)
    scheme = 0 if is_chain(choice.scheme) else choice.scheme or 0
    unfolding = convolution_unfolding(len(shape) - 2, scheme)
    return full_rank(unfolding.shape(shape), slices=1)


def costs(
    plan: CompressionPlan, resource: str | None = None, *, most: int = 20, ax: Any = None
) -> Any:
    """Draws where the parameters, multiply–accumulates or the latency go, before and after.

    The layer that used most is on top. The percentage is what the plan removes of the layer.

    Args:
        plan: The plan.
        resource: `"params"`, `"macs"` or `"latency"`. Others than the parameters are known if the
            plan limits them. Defaults to None: what the plan's `objective` counts.
        most: Integer >= 1. The most layers to show; one more bar is the sum of the others.
            Defaults to 20.
        ax: Axes of matplotlib to draw on. Defaults to None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `plan` is not a plan or does not know the resource, or `most` is not as
            above.

    Example:
    ```python
    plan = keras_alds.select(model, cr={"params": 0.5, "macs": 0.3})
    keras_alds.plots.costs(plan, "macs").figure.savefig("macs.png")
    ```
    """
    check_plan(plan)
    most = positive_int(most, "most")
    name = resource or plan.objective
    if name not in plan.costs:
        raise ValueError(
            f"Expected a resource that the plan counts, one of {', '.join(map(repr, plan.costs))}. "
            f"Received: resource={resource!r}"
        )
    info = RESOURCES[name]
    known = [(c.layer, c.costs[name]) for c in plan.choices if name in c.costs]
    known.sort(key=lambda item: -item[1].before)
    if len(known) > most:
        others = [cost for _, cost in known[most:]]
        total = Cost(sum(c.before for c in others), sum(c.after for c in others))
        known = [*known[:most], (f"{len(others)} more", total)]
    ax = bar_axes(ax, [layer for layer, _ in known])
    rows = range(len(known))
    before = [cost.before / info.scale for _, cost in known]
    after = [cost.after / info.scale for _, cost in known]
    ax.barh(rows, before, height=0.75, color=GREY, label="before")
    ax.barh(rows, after, height=0.75, color=COLOURS[0], label="after")
    for row, (_, cost) in enumerate(known):
        if cost.saved:
            note_at_end(ax, row, max(before[row], after[row]), f"−{cost.removed:.0%}")
    ax.set_xlim(0, 1.15 * max(before, default=1))
    _thousands(ax)
    ax.set_xlabel(f"{info.column}, {plan.costs[name].removed:.0%} removed in all")
    legend_above(ax)
    return ax


def _thousands(ax: Any) -> None:
    ax.xaxis.set_major_formatter(_short_number)
    ax.xaxis.get_major_locator().set_params(nbins=6)


def _short_number(value: float, _: Any = None) -> str:
    """A number of at most a few characters.

    >>> [_short_number(value) for value in (0, 1500, 250_000, 4_000_000)]
    ['0', '1.5k', '250k', '4M']
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"

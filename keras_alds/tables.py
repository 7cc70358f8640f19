"""Prints tables, and the table of a plan."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from keras_alds.plan import CompressionPlan

PrintFn = Callable[[str], object]


def print_plan(
    plan: CompressionPlan, *, print_fn: PrintFn | None = None, line_length: int | None = None
) -> None:
    """Prints the choices of `plan`; see `CompressionPlan.summary`."""
    macs = plan.macs_before is not None
    columns = ["Layer (type)", "Kernel", "Slices", "Rank", "Params"]
    if plan.folded:
        columns.insert(2, "Scheme")
    latency = plan.latency_before is not None
    columns += (["MACs"] if macs else []) + (["Latency, µs"] if latency else []) + ["Error"]
    rows, without_kernel = [], []
    for choice in plan.choices:
        if not choice.has_kernel:
            without_kernel.append(choice)
            continue
        row = [
            f"{choice.layer} ({choice.kind})",
            "×".join(map(str, choice.kernel_shape or ())) or "–",
            str(choice.slices or "–"),
            str(choice.rank or "–"),
            _change(choice.params_before, choice.params_after),
        ]
        if plan.folded:
            row.insert(2, str(choice.scheme) if choice.factorized else "–")
        if macs:
            row.append(_change(choice.macs_before or 0, choice.macs_after or 0))
        if latency:
            row.append(_microseconds(choice.latency_before, choice.latency_after))
        row.append(f"{choice.error:.4f}" if choice.factorized else f"skipped: {choice.reason}")
        rows.append(row)
    lines = [
        f"Total params: {_change(plan.params_before, plan.params_after)}"
        f" ({plan.reduction('params'):.2%} removed)"
    ]
    if macs:
        lines.append(
            f"Total MACs: {_change(plan.macs_before or 0, plan.macs_after or 0)}"
            f" ({plan.reduction('macs'):.2%} removed)"
        )
    if latency:
        lines.append(
            f"Predicted latency, µs ({plan.latency_runtime}): "
            f"{_microseconds(plan.latency_before, plan.latency_after)}"
            f" ({plan.reduction('latency'):.2%} removed)"
        )
    lines += _target_lines(plan)
    lines += [f"{choice.layer}: {choice.note}" for choice in plan.choices if choice.note]
    if without_kernel:
        kinds = ", ".join(sorted({choice.kind for choice in without_kernel}))
        params = sum(choice.params_before for choice in without_kernel)
        lines.append(
            f"Left alone, with no kernel to factorize: {len(without_kernel)} layers ({kinds}), "
            f"{params:,} params"
        )
    title = (
        f"Compression plan: cr={plan.requested_cr:g} of {plan.objective} requested, "
        f"{plan.cr:.4f} achieved; {_second(plan)}"
        f"method={plan.method!r}, error={plan.error_measure!r}"
    )
    print_table(title, columns, rows, lines, print_fn=print_fn, line_length=line_length)


def _target_lines(plan: CompressionPlan) -> list[str]:
    """The plan's target and, with calibration data, the error that its constraints add."""
    if plan.target is None:
        return []
    line = f"Target: {plan.target!r}"
    own, free = plan.output_error, plan.output_error_without_target
    if own is None or free is None:
        return [line]
    ratio = f" ({own / free:.2f} times)" if free > 0 else ""
    return [
        f"{line}; sum of the relative errors of the layers' outputs: {own:.4f}, and {free:.4f} "
        f"without its constraints{ratio}. Measure the model's accuracy with `evaluate`"
    ]


def _second(plan: CompressionPlan) -> str:
    """The second limit of a joint budget."""
    if plan.requested_macs_cr is None:
        return ""
    return f"{plan.requested_macs_cr:g} of macs requested, {plan.reduction('macs'):.4f} achieved; "


def _microseconds(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "–"
    old, new = f"{before / 1000:,.1f}", f"{after / 1000:,.1f}"
    return old if before == after else f"{old} → {new}"


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    lines: Sequence[str] = (),
    *,
    print_fn: PrintFn | None = None,
    line_length: int | None = None,
) -> None:
    """Prints a table: in colour on a terminal, as plain Markdown anywhere else.

    Args:
        title: Line above the table.
        columns: Column headers; the first column is aligned left, the others right.
        rows: The cells.
        lines: Lines below the table.
        print_fn: Called once with the whole text; default: standard output.
        line_length: Width in characters; default: the terminal's, else as wide as needed.
    """
    console = Console(width=line_length, highlight=False)
    plain = print_fn is not None or not console.is_terminal
    buffer = io.StringIO()
    if plain:
        console = Console(width=line_length or 400, file=buffer, highlight=False)
    table = Table(box=box.MARKDOWN if plain else box.ROUNDED, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(title, style=None if plain else "bold")
    console.print(table)
    for line in lines:
        console.print(line)
    if plain:
        text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
        (print_fn or print)(text)

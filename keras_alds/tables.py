"""Tables of results: printed, in notebooks, as Markdown, CSV and data frames. A plan's table."""

from __future__ import annotations

import abc
import csv
import dataclasses
import functools
import html
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from keras_alds.core.chains import NAMES
from keras_alds.extras import imported
from keras_alds.resources import RESOURCES

if TYPE_CHECKING:
    from keras_alds.plan import CompressionPlan

PrintFn = Callable[[str], object]

#: The width of what is not printed to a terminal.
WIDTH = 100
# The most rows in a notebook.
_HTML_ROWS = 30
# What differs between the reasons of two layers: shapes, names, numbers.
_DETAIL = re.compile(r"\([^()]*\)|'[^']*'|\d+")


def counted(count: int, noun: str) -> str:
    """A number with its noun, in the plural unless the number is 1."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def decimals(value: float) -> str:
    """A number with four decimals; with a power of ten if that is nothing but zeros."""
    text = f"{value:.4f}"
    return text if value == 0 or float(text) else f"{value:.0e}"


class SkippedLayers(NamedTuple):
    """Layers that are skipped for one reason.

    Attributes:
        code: The reason in a word.
        reason: The reason. What differs between the layers is left out.
        layers: Their paths.
        params: Their parameters in all.
    """

    code: str
    reason: str
    layers: Sequence[str]
    params: int

    @classmethod
    def by_reason(cls, skipped: Iterable[tuple[str, int, str, str]]) -> list[SkippedLayers]:
        """Groups some layers, given as path, parameters, reason in a word, and reason."""
        groups: dict[tuple[str, str], list[tuple[str, int, str]]] = {}
        for path, params, code, reason in skipped:
            groups.setdefault((code, _DETAIL.sub("…", reason)), []).append((path, params, reason))
        found = []
        for (code, general), members in groups.items():
            paths, params_of, reasons = zip(*members, strict=True)
            reason = general if len(set(reasons)) > 1 else reasons[0]
            found.append(cls(code, reason, paths, sum(params_of)))
        return found

    def named(self, most: int) -> str:
        """The first paths."""
        return ", ".join(self.layers[:most]) + ", …" * (len(self.layers) > most)

    def __str__(self) -> str:
        size = f"{counted(len(self.layers), 'layer')}, {self.params:,} params"
        return f"Skipped ({self.code}): {size} ({self.named(3)}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table for people.

    Attributes:
        title: Line above the table.
        columns: Column headers; the first column is aligned left, the others right.
        rows: The cells.
        lines: Lines below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()

    def print(self, print_fn: PrintFn | None = None, line_length: int | None = None) -> None:
        """Prints the table: in colour on a terminal, as plain Markdown anywhere else.

        Args:
            print_fn: Called once with the whole text; default: standard output.
            line_length: Width in characters; default: the terminal's, else 100.
        """
        made = functools.partial(Console, highlight=False, markup=False)  # names are no markup
        console = made(width=line_length)
        plain = print_fn is not None or not console.is_terminal
        buffer = io.StringIO()
        if plain:
            console = made(width=line_length or WIDTH, file=buffer)
        table = Table(box=box.MARKDOWN if plain else box.ROUNDED, header_style="bold")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(self.title, style=None if plain else "bold")
        console.print(table)
        for line in self.lines:
            console.print(line)
        if plain:
            text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
            (print_fn or print)(text)

    def to_markdown(self) -> str:
        """The columns and rows in Markdown, one line for each row however long it is."""
        rows = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
        )

    def to_html(self) -> str:
        """The table for a notebook. Of a long one, the first rows are shown."""
        left = len(self.rows) - _HTML_ROWS
        more = [f"… {counted(left, 'more row')}. summary() prints all"] if left > 0 else []
        lines = "<br>".join(html.escape(line) for line in [*more, *self.lines])
        return (
            '<div style="overflow-x: auto">'
            f"<p><strong>{html.escape(self.title)}</strong></p>"
            f"<table><thead>{_html_row(self.columns, 'th')}</thead><tbody>"
            + "".join(_html_row(row, "td") for row in self.rows[:_HTML_ROWS])
            + f"</tbody></table><p>{lines}</p></div>"
        )


def _html_row(cells: Sequence[str], tag: str) -> str:
    sides = ["left", *["right"] * (len(cells) - 1)]
    found = [
        f'<{tag} style="text-align: {side}; white-space: nowrap">{html.escape(cell)}</{tag}>'
        for side, cell in zip(sides, cells, strict=True)
    ]
    return f"<tr>{''.join(found)}</tr>"


class Tabular(abc.ABC):
    """A result that is a table. Notebooks show it as one."""

    @abc.abstractmethod
    def to_rows(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain values."""

    @abc.abstractmethod
    def _table(self) -> TextTable:
        """The table for people."""

    def summary(self, print_fn: PrintFn | None = None, line_length: int | None = None) -> None:
        """Prints the table.

        Args:
            print_fn: Called with the text; default: standard output, in colour on a terminal.
            line_length: Width in characters; default: the terminal's, else 100.
        """
        self._table().print(print_fn, line_length)

    def to_markdown(self) -> str:
        """The table that `summary` prints, in Markdown, without the lines around it."""
        return self._table().to_markdown()

    def to_dataframe(self) -> Any:
        """The rows as a `pandas.DataFrame`, with all digits.

        Raises:
            ImportError: If pandas is not installed.
        """
        return imported("pandas", "a data frame", "pandas").DataFrame(self.to_rows())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows to `path` as CSV, with all digits; a file that is there is replaced."""
        write_csv(path, self.to_rows())

    def _repr_html_(self) -> str:
        return self._table().to_html()


def write_csv(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
) -> None:
    """Writes rows as a CSV file; its columns are those of the first row if none are given."""
    if columns is None:
        columns = list(rows[0]) if rows else []
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plan_table(plan: CompressionPlan, *, show_skipped: bool = False) -> TextTable:
    """The choices of `plan`; see `CompressionPlan.summary`."""
    resources = [RESOURCES[name] for name in plan.costs]
    columns = ["Layer (type)", "Kernel", *(["Scheme"] if plan.folded else []), "Slices", "Rank"]
    columns += [*(info.column for info in resources), "Error"]
    measured = any(choice.divergence is not None for choice in plan.choices)
    columns += ["Output"] * measured
    without_kernel = [choice for choice in plan.choices if not choice.has_kernel]
    skipped = [
        (choice.layer, choice.params_before, str(choice.reason_code), choice.reason or "")
        for choice in plan.choices
        if choice.has_kernel and not choice.factorized
    ]
    rows = []
    for choice in plan.choices:
        if not choice.has_kernel or not (choice.factorized or show_skipped):
            continue
        row = [
            f"{choice.layer} ({choice.kind})",
            "×".join(map(str, choice.kernel_shape or ())) or "–",
            str(choice.slices or "–"),
            f"{choice.input_rank} → {choice.rank}"
            if choice.input_rank
            else str(choice.rank or "–"),
            *(info.text(choice.costs.get(info.name)) for info in resources),
        ]
        if plan.folded:
            scheme = NAMES.get(choice.scheme or 0, str(choice.scheme))
            row.insert(2, scheme if choice.factorized else "–")
        row.append(decimals(choice.error) if choice.factorized else str(choice.reason_code))
        if measured:
            row.append("–" if choice.divergence is None else decimals(choice.divergence))
        rows.append(row)
    lines = []
    for info in resources:
        runtime = f" ({plan.runtime})" if info.measured else ""
        cost = plan.costs[info.name]
        lines.append(f"{info.total}{runtime}: {info.text(cost)} ({cost.removed:.2%} removed)")
    lines += [*_memory_lines(plan), *_target_lines(plan), *_output_lines(plan)]
    lines += [f"{choice.layer}: {choice.note}" for choice in plan.choices if choice.note]
    lines += map(str, SkippedLayers.by_reason(skipped))
    if without_kernel:
        kinds = ", ".join(sorted({choice.kind for choice in without_kernel}))
        params = sum(choice.params_before for choice in without_kernel)
        lines.append(
            f"Without a kernel to factorize: {counted(len(without_kernel), 'layer')} ({kinds}), "
            f"{params:,} params"
        )
    limits = "".join(
        f"{cr:g} of {name} requested, {plan.reduction(name):.4f} achieved; "
        for name, cr in plan.requested.items()
    )
    title = (
        f"Compression plan: cr={limits}method={plan.method!r}, error_measure={plan.error_measure!r}"
    )
    return TextTable(title, columns, rows, lines)


def _output_lines(plan: CompressionPlan) -> list[str]:
    """What the plan does to the model's outputs on held-out examples, as far as it is known."""
    lines = []
    if any(choice.divergence is not None for choice in plan.choices):
        lines.append("Output: what this layer alone does to the model's outputs, estimated")
    if plan.trials:
        tried = ", ".join(f"{name} {decimals(distance)}" for name, distance in plan.trials.items())
        lines.append(
            "Distance of the outputs from the original's on held-out examples: "
            f"{decimals(plan.distance or 0)}. Tried: {tried}"
        )
    return lines


def _memory_lines(plan: CompressionPlan) -> list[str]:
    """The peak of the activation memory, if it is known."""
    if plan.memory is None:
        return []
    entries, in_float = (
        " → ".join(f"{size * n / 1000:,.1f}" for n in dict.fromkeys(plan.memory)) for size in (1, 4)
    )
    removed = plan.memory.removed
    change = f"{removed:.2%} removed" if removed >= 0 else f"{-removed:.2%} added"
    return [f"Peak activation memory, kB: {entries} in int8, {in_float} in float32 ({change})"]


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
        f"without its constraints{ratio}. This is no accuracy; call `model.evaluate`"
    ]

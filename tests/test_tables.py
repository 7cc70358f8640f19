"""Results as tables: in notebooks, Markdown, CSV files and data frames."""

from __future__ import annotations

import csv
import html.parser
import sys
from typing import Any

import pytest

from keras_alds.litert.comparison import FileComparison, FileFigures
from keras_alds.plan import CompressionPlan, LayerChoice
from keras_alds.reports import Comparison
from keras_alds.research.sweeping import Sweep, SweepRow
from keras_alds.resources import Cost
from keras_alds.searching import SearchPoint, SearchResult
from keras_alds.sensitivities import LayerSensitivity, Sensitivity
from keras_alds.tables import decimals

# What HTML, Markdown and the printed tables could take for their own.
NAME = "<b>conv|[bold]1</b>"


def a_plan(layers: int = 1) -> CompressionPlan:
    costs = {"params": Cost(432, 300), "macs": Cost(1000, 700)}
    kernel = {"kind": "Conv2D", "kernel_shape": (3, 3, 3, 16)}
    chosen = LayerChoice(
        layer=NAME, slices=3, rank=4, scheme=0, costs=costs, error=0.25, reason=None, **kernel
    )
    dense = LayerChoice(
        layer="head", slices=None, rank=None, scheme=None, costs={"params": Cost(10, 10)},
        error=0.0, reason="too <small>", reason_code="too_small", **kernel,
    )  # fmt: skip
    requested = {"params": 0.3}
    return CompressionPlan(
        requested, "alds", "slice", "params", costs, (chosen,) * layers + (dense,)
    )


def results() -> list[Any]:
    """A result of every kind, with the name that is hard to print."""
    plan = a_plan()
    files = [FileFigures(n, n, n, n, n, n, None, {NAME: n / 10}) for n in (8, 4)]
    dense = SweepRow("dense", 0.0, 0.0, 100, 0.9, None, None)
    return [
        plan,
        Comparison({NAME: (8, 4), "accuracy": (0.9, 0.8)}, models=(None, None)),
        Sensitivity(NAME, "params", 0.5, (LayerSensitivity(NAME, "Dense", 7, 0.5, 1, 2, 0, 0.25),)),
        SearchResult(NAME, "params", 0.1, 0.9, (SearchPoint(plan, 0.85, 1.0),), None),
        Sweep((dense, SweepRow(NAME, 0.5, 0.51, 49, 0.8, None, 2.0)), "params", "net"),
        FileComparison(*files, latency_ratio=None),
    ]


class Cells(html.parser.HTMLParser):
    """Reads the cells of a table; fails on tags that are not ours."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in ("div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "br"), tag
        if tag != "br":
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["td"]:
            self.cells[-1] += data


@pytest.mark.parametrize("result", results(), ids=lambda result: type(result).__name__)
def test_every_result_is_a_table(result, tmp_path):
    printed: list[str] = []
    result.summary(print_fn=printed.append, line_length=300)
    body = [line for line in printed[0].splitlines() if line.startswith("|")]
    page = Cells(result._repr_html_())
    assert NAME in page.text
    cells = page.cells
    assert [
        c.strip() for line in body[2:] for c in line.replace(NAME, "*").strip("|").split("|")
    ] == [cell.replace(NAME, "*") for cell in cells]
    markdown = result.to_markdown().replace("\\|", "¦").replace('`"', "").replace('"`', "")
    markdown = markdown.splitlines()
    assert [c.strip() for line in markdown[2:] for c in line.strip("|").split("|")] == [
        cell.replace("|", "¦") for cell in cells
    ]
    rows = result.to_rows()
    result.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert read == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]


def test_rows_have_all_figures():
    plan, comparison, _, search, sweep, files = results()
    first, last = plan.to_rows()
    assert first["kernel_shape"] == (3, 3, 3, 16)
    assert (first["slices"], first["rank"], first["error"]) == (3, 4, 0.25)
    assert (first["params_before"], first["macs_after"]) == (432, 700)
    assert (last["macs_after"], last["reason_code"]) == (None, "too_small")
    assert comparison.to_rows()[1] == {"figure": "accuracy", "before": 0.9, "after": 0.8}
    dense, taken = search.to_rows()
    assert (dense["score"], dense["taken"]) == (0.9, False)
    assert (taken["cr"], taken["removed"]) == (0.3, 1 - 300 / 432)
    assert taken["within_limit"] is taken["taken"] is True
    assert [row["score"] for row in sweep.to_rows()] == [0.9, 0.8]
    assert files.to_rows()[-1] == {"figure": NAME, "original": 0.8, "compressed": 0.4}


def test_small_numbers_are_not_nothing_but_zeros():
    assert [decimals(value) for value in (0.0, 0.25, 6e-5, 2.8e-5)] == (
        ["0.0000", "0.2500", "0.0001", "3e-05"]
    )


def test_a_notebook_shows_the_first_rows_of_a_long_table():
    text = a_plan(layers=40)._repr_html_()
    assert text.count("<tr>") == 31
    assert "… 10 more rows. summary() prints all<br>" in text
    assert "too &lt;small&gt;" in text


def test_data_frames(monkeypatch):
    plan = a_plan()
    pytest.importorskip("pandas")
    frame = plan.to_dataframe()
    assert frame["layer"].tolist() == [NAME, "head"]
    assert frame.loc[0, "params_after"] == 300
    assert frame["rank"].isna().tolist() == [False, True]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pandas is needed for a data frame and is not"):
        plan.to_dataframe()

"""The page of a report: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import html
import importlib.metadata
import importlib.resources
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from keras_alds._version import __version__
from keras_alds.core.chains import NAMES
from keras_alds.methods import METHODS
from keras_alds.plan import CompressionPlan, Skip
from keras_alds.reporting.curves import Curve
from keras_alds.reporting.layers import LayerRow, Pair
from keras_alds.tables import SkippedLayers, counted, decimals

# The browser is told to load nothing either: the report may hold names that came from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
# Layers without a kernel only fill the table; the list of skipped layers counts them.
_BARE = (Skip.NO_KERNEL,)


@dataclasses.dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        names: The names of the two models.
        figures: Rows of the table of figures: name, before, after, after / before, predicted.
        rows: The layers.
        strangers: The paths of layers of the compressed model that belong to no row.
        curves: Those of the layers, and that of the model; or why there are none.
        versions: Name and version of what made the models.
        cr: The fraction of parameters that was removed.
        plan: The plan, or None if it is not known.
    """

    names: tuple[str, str]
    figures: Sequence[Sequence[str]]
    rows: Sequence[LayerRow]
    strangers: Sequence[str]
    curves: tuple[list[Curve], Curve] | str
    versions: Mapping[str, str]
    cr: float
    plan: CompressionPlan | None

    def text(self) -> str:
        """The page as HTML."""
        title = f"Compression of {self.names[0]}"
        sections = "".join(
            (
                _section("Figures", self._figures()),
                _section("Error against size", self._charts()),
                _section("Layers", self._layers()),
                _section("Skipped layers", self._skipped()),
                _section("Repeat it", self._repeat()),
                _section("Versions", _table(("", "version"), self.versions.items(), "plain")),
            )
        )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{_safe(title)}</title>\n<link rel="icon" href="data:,">\n'
            f"<style>\n{_read('page.css')}</style>\n</head>\n<body>\n"
            f"<header><div><h1>{_safe(title)}</h1>{_paragraph(self._summary(), 'soft')}</div>"
            '<button id="theme" type="button" aria-label="Light or dark">◐</button></header>\n'
            f"<main>{sections}</main>\n"
            f'<script type="application/json" id="data">{self._data()}</script>\n'
            f"<script>\n{_read('page.js')}</script>\n</body>\n</html>\n"
        )

    def _summary(self) -> str:
        today = datetime.datetime.now(datetime.timezone.utc).date()
        factorized = sum(row.rank is not None or row.expanded for row in self.rows)
        return (
            f"{self.cr:.1%} of the parameters removed; {factorized} of "
            f"{counted(len(self.rows), 'layer')} with weights factorized. {today.isoformat()}"
        )

    def _figures(self) -> str:
        heads = ["", "before", "after", "after / before", "predicted by the plan"]
        note = "Before and after are of the two models as they are now."
        if self.plan is None:
            heads.pop()
            note += " `report(model, compressed, plan=plan)` adds what the plan predicted."
        rows = [row[: len(heads)] for row in self.figures]
        return _table(heads, rows, "stack figures") + _paragraph(note, "soft")

    # -- The curves --------------------------------------------------------------------------

    def _charts(self) -> str:
        if isinstance(self.curves, str):
            return _paragraph(f"There are no curves. {self.curves}")
        return (
            '<div class="charts">'
            '<div class="chart" id="model-chart"><h3>The model</h3></div>'
            '<div class="chart" id="layer-chart"><h3>Each layer</h3></div></div>'
            "<noscript><p>The curves need JavaScript.</p></noscript>"
            + _paragraph(
                "Point at a curve, or choose a layer in the table. A curve is the least distance "
                "from the original weights, ‖W − E D‖ / ‖W‖, for each size; of the model, it is "
                "the root of the mean square over its layers. A dot is the compressed model as it "
                "is now. It lies above its curve if calibration data, a runtime or training asked "
                "for other factors than the nearest ones.",
                "soft",
            )
        )

    def _data(self) -> str:
        if isinstance(self.curves, str):
            return "null"
        layers, model = self.curves
        data = {"layers": [_curve(curve) for curve in layers], "model": _curve(model)}
        # "</script>" in a name would end the element.
        return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")

    # -- The layers --------------------------------------------------------------------------

    def _layers(self) -> str:
        shown = [row for row in self.rows if not row.skipped or row.skipped.code not in _BARE]
        most = max((row.params[0] or 0 for row in shown), default=1)
        planned = self.plan is not None
        heads = ["Layer", "Parameters", "MACs", "Slices", "Rank", "Error"]
        heads += ["Error, planned"] * planned + ["What happened"]
        head = "".join(f'<th scope="col"><button type="button">{h}</button></th>' for h in heads)
        curves = set() if isinstance(self.curves, str) else {c.name for c in self.curves[0]}
        body = "".join(_layer(row, most, planned, row.path in curves) for row in shown)
        return (
            '<div class="tools"><input id="search" type="search" aria-label="Search the layers" '
            'placeholder="Search: name, class, reason"><span class="soft" id="count"></span></div>'
            f'<table id="layers" class="stack"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
            + _paragraph(
                "Error: the distance of the product of the factors from the original kernel now, "
                "‖W − E D‖ / ‖W‖."
                + (
                    f" Planned: the error measure “{self.plan.error_measure}”." if self.plan else ""
                ),
                "soft",
            )
            + self._unknown()
        )

    def _unknown(self) -> str:
        """What the page cannot know of an expanded model."""
        text = ""
        if any(row.expanded for row in self.rows):
            text = (
                "The compressed model is expanded: stock layers stand for the factors of a layer. "
                "Their slices and ranks are those of the plan, or unknown, and no error is "
                "measured. "
            )
        if self.strangers:
            text += "Layers of the compressed model that belong to no row: "
            text += ", ".join(self.strangers)
        return _paragraph(text, "soft") if text else ""

    def _skipped(self) -> str:
        groups = SkippedLayers.by_reason(
            (row.path, row.params[0] or 0, row.skipped.code.value, row.skipped.detail)
            for row in self.rows
            if row.skipped is not None
        )
        if not groups:
            return _paragraph("None: every layer with weights is factorized.")
        groups.sort(key=lambda group: -group.params)
        rows = [(g.reason, f"{len(g.layers):,}", f"{g.params:,}", g.named(6)) for g in groups]
        return _table(("Reason", "layers", "parameters", "which"), rows, "stack")

    # -- What repeats it ---------------------------------------------------------------------

    def _repeat(self) -> str:
        cr = math.floor(self.cr * 1e4) / 1e4  # rounded up, it may be out of reach
        if self.plan is None and cr <= 0:
            return _paragraph("There is nothing to repeat: no parameters were removed.")
        if self.plan is None:
            return _code(f"small = keras_alds.compress(model, cr={cr:g})") + _paragraph(
                "This asks for the same ratio, with default options. A report that knows the plan "
                "says what repeats it exactly.",
                "soft",
            )
        method = METHODS.get(self.plan.method)
        data = ", calibration_data=x" if method is not None and method.needs_data else ""
        plan = json.dumps(self.plan.to_dict(), indent=1)
        link = base64.b64encode(plan.encode()).decode()
        requested = ", ".join(f"{cr:g} of {name}" for name, cr in self.plan.requested.items())
        return (
            f'<p><a download="plan.json" href="data:application/json;base64,{link}">Save plan.json'
            "</a>, then:</p>"
            + _code(
                'plan = keras_alds.CompressionPlan.load("plan.json")\n'
                f"small = keras_alds.compress(model, plan=plan{data})"
            )
            + _paragraph(
                f"The plan was made with method={self.plan.method!r}, "
                f"error_measure={self.plan.error_measure!r}, cr: {requested}. With the weights of "
                "the original, and the same calibration data if there were some, it gives the same "
                "factors. Training since then has to be repeated too.",
                "soft",
            )
        )


def versions(backend_name: str, backend_version: str) -> dict[str, str]:
    """The versions that a report names, by what they are of.

    Args:
        backend_name: Keras 3 or tf_keras, as its module is called.
        backend_version: Its version.
    """
    found = {"keras_alds": __version__, backend_name: backend_version}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["tensorflow"] = importlib.metadata.version("tensorflow")
    return {**found, "numpy": np.__version__, "Python": platform.python_version()}


def _layer(row: LayerRow, most: int, planned: bool, has_curve: bool) -> str:
    """The row of a layer in the table. The keys are what it is sorted by."""
    shape = "×".join(map(str, row.kernel_shape or ()))
    name = _safe(row.path)
    if has_curve:
        name = f'<button type="button" class="pick">{name}</button>'
    name += f'<br><span class="soft">{_safe(row.kind)} {shape}</span>'
    cells = [
        _cell("Layer", row.path, name),
        _cell(
            "Parameters", row.params[1], f"<span>{_pair(row.params)}{_bar(row.params, most)}</span>"
        ),
        _cell("MACs", row.macs[1], _pair(row.macs)),
        _cell("Slices", row.slices, _number(row.slices)),
        _cell("Rank", row.rank, _number(row.rank)),
        _cell("Error", row.measured, _number(row.measured)),
    ]
    if planned:
        cells.append(_cell("Error, planned", row.predicted, _number(row.predicted)))
    what = row.skipped.detail if row.skipped else "expanded" if row.expanded else "factorized"
    if row.scheme:
        what += f", {NAMES.get(row.scheme, f'fold scheme {row.scheme}')}"
    if row.note:
        what += f". {row.note}"
    cells.append(_cell("What happened", what, _safe(what), "text"))
    return f'<tr data-path="{_safe(row.path)}">{"".join(cells)}</tr>'


def _cell(label: str, key: object, shown: str, kind: str = "") -> str:
    key = "" if key is None else key
    attribute = f' class="{kind}"' if kind else ""
    return f'<td{attribute} data-label="{label}" data-key="{_safe(str(key))}">{shown}</td>'


def _pair(pair: Pair) -> str:
    before, after = (_number(count) or "–" for count in pair)
    if pair == (None, None):
        return ""
    return before if before == after else f"{before} →\u00a0{after}"


def _bar(pair: Pair, most: int) -> str:
    """A bar as long as the layer's share of the largest one; what is left of it is filled."""
    before, after = pair
    if not before or after is None:
        return ""
    width, left = 100 * before / most, 100 * min(after / before, 1)
    return f'<span class="bar" style="width:{width:.1f}%"><i style="width:{left:.1f}%"></i></span>'


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else decimals(value)


def _curve(curve: Curve) -> dict[str, object]:
    def short(point: tuple[float, float]) -> list[float]:
        return [round(float(value), 5) for value in point]

    return {
        "name": curve.name,
        "points": [short(point) for point in curve.points],
        "chosen": None if curve.chosen is None else short(curve.chosen),
    }


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    head = "".join(f'<th scope="col">{_safe(text)}</th>' for text in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{_safe(label)}">{_safe(text)}</td>'
            for label, text in zip(heads, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n"


def _paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{_safe(text)}</p>"


def _code(text: str) -> str:
    return f"<pre><code>{_safe(text)}</code></pre>"


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _read(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

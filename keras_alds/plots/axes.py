"""What all pictures share: new axes, colours, horizontal bars, legends."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

from keras_alds.extras import matplotlib

# Colours of Okabe and Ito that show on white and on black, for all kinds of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
#: What was before, or is not chosen.
GREY = "0.6"
MARKERS = "osD^v<>PX*pd"
# Characters of a layer's name beside its bar, and inches of a bar.
_NAME, _BAR = 28, 0.24
# Inches of a legend's entry without its name, and of a letter.
_HANDLE, _LETTER = 0.4, 0.062
# Lines with names of their own in a legend.
_MOST_NAMES = 8


def axes_or_new(ax: Any, height: float = 4.4) -> Any:
    """The given axes, or those of a new figure, `height` inches high."""
    if ax is not None:
        return ax
    return new_figure(6.4, height).add_subplot(axes_class=_shown())


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches, which pyplot does not know of."""
    return matplotlib("figure").Figure(figsize=(width, height), layout="constrained")


@functools.cache
def _shown() -> Any:
    """Axes that notebooks show as a picture: pyplot, which does that, does not know them."""

    class Axes(matplotlib("axes").Axes):  # type: ignore[misc]
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.figure.savefig(buffer, format="png")
            return buffer.getvalue()

    return Axes


def bar_axes(ax: Any, names: Sequence[str]) -> Any:
    """Axes with a row for each name, the first on top."""
    ax = axes_or_new(ax, height=1.3 + _BAR * len(names))
    # Numbers, not names, as positions: two layers may have one name after shortening.
    size = min(10.0, 72 * _inches(ax)[1] / max(len(names), 1))
    ax.set_yticks(range(len(names)), [shortened(name) for name in names], fontsize=size)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    _plain(ax, "x")
    return ax


def line_axes(ax: Any) -> Any:
    """Axes with a grid, for lines."""
    ax = axes_or_new(ax)
    _plain(ax, "both")
    return ax


def _plain(ax: Any, grid: str) -> None:
    ax.grid(visible=True, axis=grid, alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def shortened(name: str) -> str:
    """A name with its middle left out if it is long: layers differ at both ends.

    >>> shortened("backbone/stage_4/block_12/expand/conv")
    'backbone/stag…12/expand/conv'
    """
    if len(name) <= _NAME:
        return name
    end = _NAME // 2
    return f"{name[: _NAME - 1 - end]}…{name[-end:]}"


def note_at_end(ax: Any, row: int, end: float, text: str) -> None:
    """A text right of a bar."""
    size = 0.85 * ax.get_yticklabels()[row].get_fontsize()
    ax.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center", fontsize=size)


def legend_above(ax: Any) -> None:
    """A legend above the axes, where it hides nothing, in as many columns as fit."""
    names = ax.get_legend_handles_labels()[1]
    longest = max(map(len, names), default=0)
    columns = int(_inches(ax)[0] / (_HANDLE + _LETTER * longest))
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3}
    ax.legend(**place, ncols=min(max(columns, 1), 3), frameon=False, fontsize="small")


def _inches(ax: Any) -> tuple[float, float]:
    """The width and height of axes."""
    extent = ax.get_window_extent()
    return extent.width / ax.figure.dpi, extent.height / ax.figure.dpi


def depth_colours(ax: Any, count: int) -> list[Any]:
    """A colour for each layer by its depth.

    The end of the colour map that would vanish on the background is left out.
    """
    colours = matplotlib("cm").ScalarMappable(cmap="viridis").cmap
    light = sum(matplotlib("colors").to_rgb(ax.get_facecolor())) > 1.5
    low, high = (0.0, 0.85) if light else (0.25, 1.0)
    return [colours(low + (high - low) * i / max(1, count - 1)) for i in range(count)]


def depth_labels(names: Sequence[str]) -> list[str | None]:
    """A legend's label for each layer: all names, or of many layers the first and last one."""
    if len(names) <= _MOST_NAMES:
        return [shortened(name) for name in names]
    labels: list[str | None] = [None] * len(names)
    labels[0], labels[-1] = f"first: {shortened(names[0])}", f"last: {shortened(names[-1])}"
    return labels

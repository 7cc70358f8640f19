"""What all pictures share: new axes and given ones, names, colours, a missing matplotlib."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from keras_alds.plots.axes import axes_or_new, bar_axes, depth_colours, depth_labels, legend_above


def test_new_axes_belong_to_no_global_figure_and_are_a_picture():
    ax = axes_or_new(None)
    ax.plot([0, 1], [2, 3])
    assert plt.get_fignums() == []
    assert ax._repr_png_().startswith(b"\x89PNG")
    given = Figure().subplots()
    assert axes_or_new(given) is given


def test_long_names_keep_both_ends_and_rows_of_their_own():
    names = [f"backbone/{'deep/' * 9}block_{index}/conv" for index in (1, 2)]
    names[1] = names[0]
    ax = bar_axes(None, [*names, "head"])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["backbone/deep…p/block_1/conv"] * 2 + ["head"]
    assert ax.get_yticks().tolist() == [0, 1, 2]
    assert ax.yaxis_inverted()  # the first one is on top
    assert depth_labels(["a", "b"]) == ["a", "b"]
    assert depth_labels(["a"] * 9 + ["b"]) == ["first: a", *[None] * 8, "last: b"]


def test_many_rows_get_smaller_names_in_given_axes():
    sizes = [
        bar_axes(Figure(figsize=(4, 3)).subplots(), ["layer"] * count)
        .get_yticklabels()[0]
        .get_fontsize()
        for count in (5, 40)
    ]
    assert sizes[0] == 10
    assert sizes[1] < 72 * 3 / 40  # points of a row


def test_lines_show_on_white_and_on_black():
    for style, visible in (("default", lambda light: light < 0.8), ("dark_background", None)):
        with plt.style.context(style):
            ax = Figure().subplots()
        luminances = [0.2 * r + 0.7 * g + 0.1 * b for r, g, b, _ in depth_colours(ax, 9)]
        assert len(luminances) == 9
        assert luminances == sorted(luminances)  # the first layers are dark
        visible = visible or (lambda light: light > 0.2)
        assert all(map(visible, luminances))


def test_a_legend_fits_the_width():
    columns = []
    for width in (4, 8):
        ax = Figure(figsize=(width, 3)).subplots()
        for index in range(5):
            ax.plot([0], label=f"method-number-{index}")
        legend_above(ax)
        columns.append(ax.get_legend()._ncols)
    assert columns == [2, 3]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'is not installed. Remedy: pip install "keras_alds\[p'):
        axes_or_new(None)

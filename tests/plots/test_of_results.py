"""Pictures of results: the points are those of the sweep, the search, the history."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from keras_alds import SearchResult, plots
from keras_alds.research.sweeping import Sweep, SweepRow

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure


def row(method, cr, score, retrained=None):
    note = None if score else "out of reach"
    return SweepRow(method, cr, cr if score else None, 100, score, retrained, 1.0, note)


@pytest.fixture
def sweep():
    rows = (
        row("dense", 0.0, 90.0, 91.0),
        *(row("alds", 0.5, 80.0, 89.0), row("alds", 0.25, 88.0, 90.0)),
        *(row("svd", 0.5, 70.0, 88.0), row("svd", 0.25, 89.0, 89.5), row("svd", 0.9, None)),
    )
    return Sweep(rows, "macs", "net")


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_scores_of_a_sweep(sweep):
    given = Figure().subplots()
    ax = plots.scores(sweep, label="top-1", ax=given)
    assert ax is given
    frontier, alds, svd, dense = ax.lines
    assert points(frontier) == [(0.5, 80.0), (0.75, 89.0), (1.0, 90.0)]
    assert points(alds) == [(0.5, 80.0), (0.75, 88.0)]
    assert points(svd) == [(0.5, 70.0), (0.75, 89.0)]
    assert [line.get_label() for line in (alds, svd, dense)] == ["alds", "svd", "dense"]
    assert alds.get_color() != svd.get_color()
    assert set(dense.get_ydata()) == {90.0}
    assert ax.get_ylabel() == "top-1"
    assert ax.get_xlabel() == "fraction of the multiply–accumulates that is left"
    after = plots.scores(sweep, retrained=True)
    assert points(after.lines[0]) == [(0.5, 89.0), (0.75, 90.0), (1.0, 91.0)]
    assert points(after.lines[2]) == [(0.5, 88.0), (0.75, 89.5)]


def test_a_method_that_reaches_nothing_keeps_its_colour_and_name():
    rows = (row("dense", 0.0, 90.0), row("pca", 0.5, None), row("svd", 0.5, 80.0))
    _, pca, svd, _ = plots.scores(Sweep(rows, "params", "net")).lines
    assert (points(pca), pca.get_label()) == ([], "pca")
    assert points(svd) == [(0.5, 80.0)]


def test_sizes_that_hardly_differ_count_as_equal_on_the_frontier():
    rows = (row("dense", 0.0, 90.0), row("alds", 0.701, 80.0), row("svd", 0.703, 20.0))
    frontier = plots.scores(Sweep(rows, "params", "net")).lines[0]
    assert points(frontier) == [(pytest.approx(0.299), 80.0), (1.0, 90.0)]


def test_scores_that_are_no_numbers_are_not_on_the_frontier():
    rows = (row("dense", 0.0, 90.0), row("alds", 0.7, math.nan), row("svd", 0.5, 80.0))
    frontier = plots.scores(Sweep(rows, "params", "net")).lines[0]
    assert points(frontier) == [(0.5, 80.0), (1.0, 90.0)]
    none = plots.scores(Sweep((row("dense", 0.0, math.nan),), "params", "net")).lines[0]
    assert points(none) == []


def test_the_file_of_a_sweep_has_a_panel_for_each_score(sweep, tmp_path):
    sweep.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_refused(sweep):
    for draw, text in (
        (plots.scores, "to be a Sweep or a SearchResult. Received: result of type dict"),
        (plots.sensitivity, "to be a Sensitivity. Received: result of type dict"),
        (plots.rank_history, "to be a RankMonitor. Received: monitor of type dict"),
    ):
        with pytest.raises(ValueError, match=text):
            draw({})
    rows = (row("dense", 0.0, 90.0), row("svd", 0.5, 80.0))
    with pytest.raises(ValueError, match="Expected a sweep with `retrain=`"):
        plots.scores(Sweep(rows, "params", "net"), retrained=True)
    search = SearchResult("net", "params", 0.1, 0.9, (), None)
    with pytest.raises(ValueError, match="retrained=True, and a SearchResult without"):
        plots.scores(search, retrained=True)
    with pytest.raises(ValueError, match="Did you mean 'stable_rank'"):
        plots.rank_history(SimpleNamespace(history=[]), "stable_ranks")
    assert plots.rank_history(SimpleNamespace(history=[])).lines[:] == []

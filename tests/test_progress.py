"""The progress bar in a notebook, and that all of the package uses it."""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import rich
import zoo
from rich.progress import Progress

import keras_alds
from keras_alds import progress as progress_module
from keras_alds.progress import lines_without_terminal, progress_bar

PACKAGE = Path(__file__).resolve().parent.parent / "keras_alds"


@pytest.fixture
def notebook(monkeypatch):
    """rich as it is in a notebook without ipywidgets."""
    if importlib.util.find_spec("ipywidgets"):
        pytest.skip("ipywidgets is installed")
    rich.reconfigure(force_jupyter=True, file=io.StringIO())
    yield
    rich.reconfigure()


def steps():
    with progress_bar(verbose=1) as progress:
        return list(progress.track(range(3)))


def test_no_warning_in_a_notebook(notebook):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps() == [0, 1, 2]


def test_it_is_shown_where_it_can_be():
    rich.reconfigure(force_terminal=True, file=(text := io.StringIO()))
    try:
        steps()
    finally:
        rich.reconfigure()
    assert "100%" in text.getvalue()


def test_lines_stand_for_it_where_a_command_asks_for_them(monkeypatch, capsys):
    steps()
    monkeypatch.setattr(progress_module, "SECONDS", 0.0)
    steps()
    assert "Working" not in "".join(capsys.readouterr())
    with lines_without_terminal():
        assert steps() == [0, 1, 2]
        with progress_bar(verbose=0) as progress:
            progress.advance(progress.add_task("silent"))
    out, lines = capsys.readouterr()
    assert out == ""
    assert "Working...: 3 of 3, 0 s\n" in lines
    assert "silent" not in lines


@pytest.mark.parametrize("verbose", [0, 1])
@pytest.mark.parametrize("function", ["select", "compress", "apply_plan"])
def test_silence(monkeypatch, keras_module, function, verbose):
    disabled = []

    def progress(disable=False, **options):
        disabled.append(disable)
        return Progress(disable=True, **options)

    model = zoo.functional(keras_module)
    data = np.random.default_rng(0).normal(size=(16, *zoo.IMAGE)).astype("float32")
    options = {"calibration_data": data, "verbose": verbose}
    plan = keras_alds.select(model, 0.3, calibration_data=data, verbose=0)
    monkeypatch.setattr(progress_module, "Progress", progress)
    if function == "select":
        keras_alds.select(model, 0.3, **options)
    elif function == "compress":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The refinement was undone")
            keras_alds.compress(model, 0.3, refine=1, **options)
    else:
        keras_alds.apply_plan(model, plan, **options)
    assert disabled
    assert all(disabled) == (verbose == 0)


def test_no_other_is_made():
    made = [path.name for path in PACKAGE.rglob("*.py") if "Progress(" in path.read_text("utf-8")]
    assert made == ["progress.py"]

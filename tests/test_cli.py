"""The command line: what it writes, and how it complains."""

from __future__ import annotations

import subprocess
import sys

import pytest
import zoo

from keras_alds import CompressionPlan, select
from keras_alds.cli import main


@pytest.fixture
def saved(keras_module, tmp_path):
    model = zoo.functional(keras_module)
    path = tmp_path / "model.keras"
    model.save(path)
    return model, path, ["--keras", keras_module.__name__]


def complaint(capsys, *arguments):
    """What a command writes to standard error; it must be one line and end with status 2."""
    with pytest.raises(SystemExit) as info:
        main([str(argument) for argument in arguments])
    assert info.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_plan(saved, tmp_path, capsys):
    model, path, options = saved
    output = tmp_path / "plan.json"
    arguments = ["plan", str(path), *options, "--cr", "0.4", "--max-slices", "4"]
    assert main([*arguments, "--exclude", "head", "--output", str(output)]) == 0
    assert CompressionPlan.load(output) == select(model, 0.4, max_slices=4, exclude=["head"])
    assert "Compression plan: cr=0.4 of params requested" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:You are saving")
def test_bad_input_ends_with_status_2(saved, tmp_path, capsys):
    _, path, options = saved
    assert "which is missing" in complaint(capsys, "plan", tmp_path / "none.keras")
    (tmp_path / "bad.keras").write_text("no model")
    assert "Expected a model that" in complaint(capsys, "plan", tmp_path / "bad.keras", *options)
    assert "0 < cr < 1" in complaint(capsys, "plan", path, *options, "--cr", "50")
    assert "is not reachable" in complaint(capsys, "plan", path, *options, "--cr", "0.9999")
    assert "invalid choice" in complaint(capsys, "plan", path, "--method", "magic")
    assert "required: command" in complaint(capsys)


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "keras_alds", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("keras_alds 0.")

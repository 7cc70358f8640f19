"""The scripts and notebooks of `examples/` run, in a short mode, and keep what they promise."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import matplotlib as mpl
import pytest

import keras_alds

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
Run = Callable[..., str]

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a script in this process, as TensorFlow takes long to load, in a folder of its own."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *arguments: str) -> str:
        script = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)]


SHORT = ("--epochs", "1", "--limit", "64")


def test_prune_and_quantize(run: Run):
    pytest.importorskip("tensorflow_model_optimization")
    printed = run("prune_and_quantize.py", *SHORT, "--filters", "32")
    rows = re.findall(r"^(.*?) +[\d.]+% +([\d,]+) +([\d,]+)$", printed, flags=re.M)
    assert [row[0] for row in rows][-1] == "compressed, pruned and trained for int8"
    sizes, zipped = ([numbers(row[column])[0] for row in rows] for column in (1, 2))
    assert sizes[1] < 0.3 * sizes[0]
    assert sizes[2] < 0.4 * sizes[1]
    assert zipped[3] < 0.85 * zipped[2]  # zeros


def test_latency(run: Run):
    printed = run(
        "latency.py", *SHORT, "--filters", "16", "64", "--size", "8", "--cr", "0.1", "--runs", "5"
    )
    assert "Predicted latency" in printed
    kinds = re.findall(r"10% of the (\w+) removed: latency × [\d.]+, parameters × ", printed)
    assert kinds == ["latency", "parameters"]


def test_applications(run: Run, tmp_path: Path):
    keras.utils.save_img(tmp_path / "photo.png", [[[0, 99, 0]] * 48] * 40, scale=False)
    (image,) = runpy.run_path(str(EXAMPLES / "applications.py"))["load_images"](tmp_path, 32)
    assert image.shape == (32, 32, 3)
    assert (image == [0, 99, 0]).all()
    name = ("--module", "mobilenet", "--name", "MobileNet")
    options = (*name, "--weights", "none", "--size", "32", "--output", "out/small.keras")
    with pytest.warns(UserWarning, match="Expected `calibration_data`"):
        printed = run("applications.py", *options)
    before, after = numbers(re.search(r"\| parameters +\|(.*)\|.*\|", printed)[1])
    assert before == 4_253_864
    assert after <= 0.7 * before
    assert keras.saving.load_model("out/small.keras").count_params() == after


def test_old_script(run: Run):
    tf_keras = pytest.importorskip("tf_keras")
    with pytest.warns(UserWarning, match="HDF5"):
        printed = run("old_script.py", "--limit", "64")
    before, _, after = numbers(re.search(r"^parameters: .*, in .*: .*$", printed, flags=re.M)[0])
    assert after <= 0.3 * before
    assert tf_keras.models.load_model("digits.h5").count_params() == after


def test_old_script_shows_its_two_lines():
    text = (EXAMPLES / "old_script.py").read_text(encoding="utf-8")
    docstring, code = text.split('"""')[1], text.split('"""')[2]
    added = [line[5:].strip() for line in docstring.splitlines() if line.startswith("    +")]
    ours = [line.strip() for line in code.splitlines() if "keras_alds" in line]
    assert len(added) == len(ours) == 2
    assert added == ours


def test_subclassed(run: Run):
    printed = run("subclassed.py", "--epochs", "2", "--limit", "64")
    assert "is now a FactorizedConv2D" in printed
    before, after = numbers(re.search(r"^parameters: (.*), accuracy", printed, flags=re.M)[1])
    assert after <= 0.4 * before


def test_keyword_spotting(run: Run):
    printed = run("keyword_spotting.py", *SHORT)
    bytes_before, bytes_after = numbers(re.search(r"\| bytes +\|(.*)\|.*\|", printed)[1])
    assert bytes_after < 0.5 * bytes_before


def test_lstm(run: Run, tmp_path: Path):
    printed = run("lstm.py", *SHORT)
    assert "is now a FactorizedLSTM" in printed
    file = keras_alds.litert.read_file(Path("runs/lstm.tflite").read_bytes())
    before, after = numbers(re.search(r"\| bytes of weights +\|(.*)\|.*\|", printed)[1])
    assert 4 * file.parameters < 0.5 * before
    assert after < 0.5 * before


# What makes a notebook short.
PARAMETERS = {"epochs": 1, "limit": 64, "size": 8, "filters": (16, 64), "runs": 5}
PARAMETERS |= {"cr": 0.1, "ratios": (0.1,)}


def notebook_tools() -> dict[str, Any]:
    pytest.importorskip("nbclient")
    return runpy.run_path(str(EXAMPLES / "notebooks" / "run.py"))


@pytest.mark.long
def test_a_notebook_runs_in_jupyter():
    pytest.importorskip("ipykernel")
    tools = notebook_tools()
    notebook = tools["read"](EXAMPLES / "notebooks" / "first_compression.ipynb", PARAMETERS)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    tools["execute"](notebook)
    assert "FactorizedConv2D" in notebook.cells[-2].outputs[0].text


@pytest.mark.long  # the scripts of these names do the same
@pytest.mark.parametrize("name", ["latency", "prune_and_quantize"])
def test_notebooks_run(name: str, run: Run, capsys: pytest.CaptureFixture[str]):
    """In this process, as a kernel takes long to start."""
    if name == "prune_and_quantize":
        pytest.importorskip("tensorflow_model_optimization")
    mpl.use("Agg")
    notebook = notebook_tools()["read"](EXAMPLES / "notebooks" / f"{name}.ipynb", PARAMETERS)
    values: dict[str, Any] = {"__name__": name}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, name, "exec"), values)
    expected = {"latency": "of the parameters removed: latency ×", "prune_and_quantize": "int8 50"}
    assert expected[name] in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_outputs_of_one_run(path: Path):
    notebook = pytest.importorskip("nbformat").read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert len(outputs) > 5
    assert not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size < 100_000
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_example_is_listed_and_run():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    for path in [*EXAMPLES.glob("*.py"), *NOTEBOOKS]:
        if path.name == "common.py":
            continue
        assert f"](../{path.relative_to(ROOT).as_posix()})" in page, path.name
        assert path.name in tests or f'"{path.stem}"' in tests, path.name
        if path.suffix == ".py":
            assert f"python examples/{path.name}" in path.read_text(encoding="utf-8")

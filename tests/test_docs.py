"""README, docs and docstrings tell the truth: their code runs, their links and texts are right."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
import runpy
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_alds

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_alds"
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
#: Each of these is one script, and the third one goes on with a file of the first.
TUTORIALS = [
    DOCS / "tutorials" / f"{name}.md"
    for name in (
        "first-compression",
        "in-fit",
        "to-the-phone",
        "old-tf-keras-script",
        "transformer",
    )
]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages([str(PACKAGE)], prefix="keras_alds.")
)
#: A placeholder for what depends on the case, in docs/errors.md.
GAP = "…"
STRIPPED = " '`(),.;:="
WARN = ("warnings.warn", "self.warn")
SLOW = ".* in groups of fewer than 32 channels"


def cnn() -> Any:
    layers = keras.layers
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="stem")(inputs)
    x = layers.Conv2D(24, 3, strides=2, activation="relu", name="down")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(48, activation="relu", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(10, name="head")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


class MyModel(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.conv = keras.layers.Conv2D(16, 3, activation="relu")
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.head = keras.layers.Dense(10)

    def build(self, input_shape: Any) -> None:
        self.conv.build(input_shape)
        self.head.build((None, 16))
        self.built = True

    def call(self, inputs: Any) -> Any:
        return self.head(self.pool(self.conv(inputs)))

    def get_config(self) -> dict[str, Any]:
        return {}


def namespace() -> dict[str, Any]:
    """What the pages take for granted."""
    rng = np.random.default_rng(0)
    model = cnn()
    return {
        "__name__": "snippet",
        "keras": keras,
        "keras_alds": keras_alds,
        "np": np,
        "model": model,
        "x": rng.normal(size=(24, 12, 12, 3)).astype("float32"),
        "y": rng.integers(0, 10, 24),
        "MyModel": MyModel,
    }


def run_snippets(snippets: list[tuple[int, str]], where: str, values: dict[str, Any]) -> None:
    """Runs code blocks one after another; a traceback shows the line of the page."""
    for line, code in snippets:
        exec(compile("\n" * line + code, where, "exec"), values)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """`(line, code)` of the fenced Python blocks of a text."""
    return [
        (text.count("\n", 0, match.start(2)), textwrap.dedent(match.group(2)))
        for match in re.finditer(r"^( *)```python\n(.*?)^\1```", text, flags=re.M | re.S)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page not in TUTORIALS and "```python" in page.read_text(encoding="utf-8")
    ],
    ids=name_of,
)
def test_pages_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tf_keras")
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        # The guide shows an `exclude` entry that matches nothing, and saves an .h5 file.
        warnings.filterwarnings("ignore", "`exclude` entry")
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
        warnings.filterwarnings("error", SLOW)  # no page shows how to make slow files
        # Every section starts anew.
        starts = [
            0,
            *(match.start() for match in re.finditer(r"^## ", text, flags=re.M)),
            len(text),
        ]
        for start, end in itertools.pairwise(starts):
            above = text.count("\n", 0, start)
            blocks = [(above + line, code) for line, code in python_blocks(text[start:end])]
            run_snippets(blocks, str(page), namespace())


def test_tutorials_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("sklearn", "tf_keras", "ai_edge_litert"):
        pytest.importorskip(package)
    assert {*TUTORIALS, DOCS / "tutorials" / "index.md"} == {*(DOCS / "tutorials").glob("*.md")}
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
        warnings.filterwarnings("error", SLOW)
        for page in TUTORIALS:
            blocks = python_blocks(page.read_text(encoding="utf-8"))
            run_snippets(blocks, str(page), {"__name__": "snippet"})
    for file in ("small.keras", "history.csv", "small.tflite", "small.h5", "transformer.keras"):
        assert Path(file).exists()


# The package, its public names, and those of its public submodules.
DOCUMENTED = {
    "keras_alds": keras_alds,
    **{name: getattr(keras_alds, name) for name in keras_alds.__all__ if name[0] != "_"},
    **{
        f"{name}.{thing}": getattr(getattr(keras_alds, name), thing)
        for name in ("layers", "litert", "plots", "tfmot")
        for thing in getattr(keras_alds, name).__all__
    },
}
DOCSTRING_SNIPPETS = [
    (name, blocks)
    for name, thing in DOCUMENTED.items()
    if (blocks := python_blocks(inspect.getdoc(thing) or ""))
]


def test_some_docstrings_hold_snippets():
    assert {"select", "compress", "ALDSCompress"} <= {name for name, _ in DOCSTRING_SNIPPETS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What an earlier process has saved, and the model that it was."""
    folder = tmp_path_factory.mktemp("saved")
    trained = MyModel()
    trained.build((None, 32, 32, 3))
    plan = keras_alds.select(trained, cr=0.4)
    small = keras_alds.compress(trained, plan=plan)
    small.save_weights(folder / "compressed.weights.h5")
    plan.save(folder / "plan.json")
    return folder, small


@pytest.mark.parametrize(
    ("name", "blocks"), DOCSTRING_SNIPPETS, ids=[n for n, _ in DOCSTRING_SNIPPETS]
)
def test_docstring_snippets_run(
    name: str,
    blocks: list[tuple[int, str]],
    saved: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    values = namespace()
    folder, small = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with warnings.catch_warnings():
        # The package's own docstring shows `fit` without its number of epochs.
        warnings.filterwarnings("ignore", "The model (was not|will not be) compressed")
        warnings.filterwarnings("error", SLOW)
        run_snippets(blocks, name, values)
    if name == "apply_plan":
        np.testing.assert_array_equal(values["model"].conv.encoder, small.conv.encoder)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str):
    if name == "keras_alds.tf_keras":
        pytest.importorskip("tf_keras")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0, "see the captured output"


def test_there_are_doctests():
    found = [
        test
        for name in MODULES
        if name != "keras_alds.tf_keras"
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        if test.examples
    ]
    assert len(found) > 20


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def as_text(node: ast.expr) -> str:
    """A string or f-string, with a gap for every value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(as_text(part) for part in node.values)
    return GAP


def message_texts() -> list[tuple[str, str]]:
    """`(place, longest constant part of the first sentence)` of every error and warning text."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call = node.exc
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in WARN:
                call = node
            else:
                continue
            sentence = re.split(r"Received:|\. [A-Z]", as_text(call.args[0]) if call.args else "")[
                0
            ]
            part = max((part.strip(STRIPPED) for part in sentence.split(GAP)), key=len)
            if len(part) >= 10:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", part))
    return found


def test_every_error_and_warning_has_a_remedy():
    page = " ".join((ROOT / "docs" / "errors.md").read_text(encoding="utf-8").split())
    texts = message_texts()
    assert len(texts) > 40
    missing = [(place, text) for place, text in texts if " ".join(text.split()) not in page]
    assert not missing, "\n".join(f"{place}: {text}" for place, text in missing)


def test_documented_texts_exist():
    source = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            source += as_text(node).split(GAP) if isinstance(node, ast.expr) else []
    code = "\n".join(source)
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| .+ \|$", page, flags=re.M)
    gone = []
    for row in rows:
        if row in ("text", "reason"):
            continue
        parts = [part.strip(STRIPPED) for part in row.split(GAP)]
        gone += [(row, part) for part in parts if len(part) > 6 and part not in code]
    assert len(rows) > 60
    assert not gone


@pytest.fixture
def run_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a script of `examples/`, in this process: TensorFlow takes long to load."""

    def run(name: str, *arguments: str) -> str:
        script = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keras", pytest.param("tf_keras", marks=pytest.mark.long)])
def test_digits_example_runs(kind: str, tmp_path: Path, run_example: Callable[..., str]):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip(kind)
    options = ("--epochs", "2", "--at-epoch", "1", "--keras", kind, "--output", str(tmp_path))
    printed = run_example("digits.py", *options)
    assert "loaded again and predicts the same" in printed
    assert re.search(r"\| parameters +\| +252,842 \| +6[0-3],\d{3} \|", printed)
    history = (tmp_path / "history.csv").read_text(encoding="utf-8").splitlines()
    assert len(history) == 3
    assert "alds_cr" in history[0]
    assert keras_alds.CompressionPlan.load(tmp_path / "plan.json").cr >= 0.75
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_low_rank_bias_example_runs(tmp_path: Path, run_example: Callable[..., str]):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    options = ("--steps", "20", "--points", "2", "--output", str(tmp_path))
    kinds = ("--weight-decays", "0.5", "--batch-sizes", "8", "full")
    printed = run_example("low_rank_bias.py", *kinds, *options)
    rows = re.findall(r"^\| 0.5 \| (8|full) \| [\d.]+ .* \|$", printed, flags=re.M)
    assert rows == ["8", "full"]
    ranks = (tmp_path / "ranks.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[:4] for line in ranks[1:]] == [
        ["0.5", size, "0", step] for size in rows for step in ("10", "20")
    ]
    assert (tmp_path / "low_rank_bias.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        pytest.param("keras", "resnet20_cifar10.keras", marks=pytest.mark.long),
        ("tf_keras", "mlperf_tiny_resnet8_cifar10.h5"),
    ],
)
def test_cifar10_example_runs(
    kind: str, file: str, data_dir: Path, tmp_path: Path, run_example: Callable[..., str]
):
    pytest.importorskip(kind)
    printed = run_example(
        "cifar10.py",
        *("--model", str(data_dir / file), "--keras", kind, "--cr", "0.3", "--epochs", "1"),
        *("--data", str(data_dir / "cifar10_dev.npz"), "--limit", "64", "--output", str(tmp_path)),
    )
    scores = "scores (logits)" if kind == "keras" else "probabilities"
    assert f"The model gives {scores}." in printed
    assert "loaded again and predicts the same" in printed
    assert "accuracy, not retrained" in printed
    assert keras_alds.CompressionPlan.load(tmp_path / "plan.json").cr >= 0.3

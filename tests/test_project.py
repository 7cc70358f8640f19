"""The project's own rules: imports, the two README commands, documented public names."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keras_alds

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_alds"
MODULES = sorted(PACKAGE.rglob("*.py"))
# No module of the package may import what is not listed for its first part.
ALLOWED = {
    "_version": set(),
    "core": {"core"},
    "methods": {"core", "research"},
    "targets": {"core"},
    "plan": {"core"},
    "_backend": {"_backend"},
    "layers": {"core", "_backend", "layers"},
    "tf_keras": {"core", "_backend", "layers"},
    "rewrite": {"core", "methods", "plan", "_backend", "layers", "rewrite"},
    "options": {"core", "methods", "targets", "plan", "rewrite", "litert"},
    "problem": {"core", "methods", "targets", "plan", "options", "_backend", "rewrite", "litert"},
    "compress": {"core", "methods", "plan", "options", "problem", "_backend", "rewrite"},
    "report": {"core", "plan", "rewrite"},
    "research": {"core", "research"},
    "research/retraining": {"_backend"},
    "research/sweeping": {"methods", "options", "problem", "_backend", "rewrite", "compress"},
    "callbacks": {
        "core",
        "methods",
        "plan",
        "options",
        "problem",
        "_backend",
        "rewrite",
        "compress",
    },
    "litert": {
        "core",
        "targets",
        "plan",
        "problem",
        "_backend",
        "rewrite",
        "compress",
        "report",
        "litert",
    },
    "tfmot": {"core", "plan", "_backend", "rewrite", "compress", "report", "litert"},
    "cli": {
        "_version",
        "methods",
        "targets",
        "plan",
        "options",
        "_backend",
        "rewrite",
        "compress",
        "report",
        "callbacks",
        "litert",
        "research",
    },
    "__main__": {"cli"},
    "__init__": {
        "_version",
        "callbacks",
        "compress",
        "litert",
        "layers",
        "plan",
        "report",
        "rewrite",
        "research",
        "tf_keras",
        "tfmot",
    },
}
# Records that the package makes and hands out: nobody constructs them.
RECORDS = {
    "FileComparison",
    "FileFigures",
    "Latency",
    "LayerChoice",
    "LiteRTFile",
    "Operator",
    "SweepRow",
    "Tensor",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def part_of(path: Path) -> str:
    module = path.relative_to(PACKAGE).with_suffix("")
    return str(module.as_posix()) if module.as_posix() in ALLOWED else module.parts[0]


def imports(tree: ast.AST, *, lazy: bool = True) -> set[str]:
    """Full names of the modules that a module imports; without `lazy` only at its top level."""
    found: set[str] = set()
    for node in ast.walk(tree) if lazy else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def own(names: set[str]) -> set[str]:
    """The first part of every module of this package among `names`."""
    return {name.split(".")[1] for name in names if name.startswith("keras_alds.")}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the constants that are docstrings."""
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }


def test_every_module_has_an_import_rule():
    assert {part_of(path) for path in MODULES} <= set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path):
    part = part_of(path)
    tree = parse(path)
    # A plan prints itself, and only then needs the report.
    found = own(imports(tree, lazy=part != "plan"))
    assert found <= ALLOWED[part], f"{name_of(path)} imports {sorted(found - ALLOWED[part])}"


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "core"], ids=name_of)
def test_core_is_numpy_and_scipy_only(path: Path):
    outside = {name.split(".")[0] for name in imports(parse(path))} - {"keras_alds"}
    assert outside <= {*sys.stdlib_module_names, "numpy", "scipy", "threadpoolctl"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_backend_tells_the_kerases_apart(path: Path):
    if part_of(path) in ("_backend", "tf_keras"):
        return
    tree = parse(path)
    assert "tf_keras" not in {name.split(".")[0] for name in imports(tree)}
    skip = docstrings(tree)
    named = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and node.value in ("keras", "tf_keras")
        and id(node) not in skip
    ]
    assert not named, f"{name_of(path)} names a Keras in lines {named}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part_of(p) in ("kinds", "layers")], ids=name_of
)
def test_layers_take_tensorflow_from_the_backend(path: Path):
    assert "tensorflow" not in {name.split(".")[0] for name in imports(parse(path))}


def test_import_brings_no_optional_package():
    optional = ("matplotlib", "sklearn", "tensorflow_model_optimization", "ai_edge_litert")
    # TensorFlow and Keras import some of them by themselves where they are installed.
    code = f"""
import sys
import tensorflow, keras
before = set(sys.modules)
import keras_alds
print([name for name in {optional} if name in set(sys.modules) - before], keras_alds.__version__)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"[] {keras_alds.__version__}"


def readme_commands() -> list[str]:
    """The commands in README's `sh` blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)


def test_readme_gives_the_two_commands_and_ci_runs_the_second():
    run, test = (command.strip() for command in readme_commands()[:2])
    for command in (run, test):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert "\n" not in command
    assert run.endswith("examples/digits.py")
    assert test.endswith("-m pytest -n 2")
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert steps[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in steps
    assert steps[-1] == test
    for check in ("ruff format --check", "ruff check", "mypy"):
        assert any(line.startswith(f".venv/bin/{check}") for line in steps), check
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, "not executable"


def test_contributing_gives_three_commands():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)
    assert block is not None
    commands = block.group(1).strip().splitlines()
    assert len(commands) == 3
    assert ".ci/run" in commands


def test_version_is_the_one_of_the_changelog():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["metadata"]["version"] == "attr: keras_alds._version.__version__"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, flags=re.M)
    assert newest is not None
    assert newest.group(1) == keras_alds.__version__


def test_supported_pythons_agree():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    named = re.findall(r"Python :: (3\.\d+)", config["metadata"]["classifiers"])
    assert config["options"]["python_requires"] == f">={named[0]}"
    assert config["mypy"]["python_version"] == named[0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {named[0]} to {named[-1]}" in readme


SUBMODULES = {
    name: importlib.import_module(f"keras_alds.{name}") for name in keras_alds._LAZY_MODULES
}
PUBLIC = [n for n in keras_alds.__all__ if not n.startswith("_") and n not in SUBMODULES]
# Public names of the whole package, those of its public submodules with the module before them.
DOCUMENTED = [
    *PUBLIC,
    *(f"{name}.{thing}" for name, module in SUBMODULES.items() for thing in module.__all__),
]


def public(name: str) -> object:
    return functools.reduce(getattr, name.split("."), keras_alds)


def test_all_is_sorted_and_complete():
    assert keras_alds.__all__ == sorted(keras_alds.__all__)
    visible = {
        name
        for name, value in vars(keras_alds).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert visible - set(keras_alds._LAZY) == set(PUBLIC) - set(keras_alds._LAZY)
    assert set(keras_alds._LAZY) <= set(PUBLIC)
    assert {*PUBLIC, *SUBMODULES} <= set(dir(keras_alds))
    for name, module in SUBMODULES.items():
        assert module.__all__ == sorted(module.__all__), name
        assert inspect.getdoc(module), name


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_names_are_documented(name: str):
    thing = public(name)
    text = inspect.getdoc(thing) or ""
    assert re.match(r"\S.*[.:]\n", text + "\n"), "no summary line"
    if inspect.isclass(thing):
        constructor = inspect.signature(thing).parameters
        sections = ["Attributes:"] if hasattr(thing, "__dataclass_fields__") else ["Args:"]
    else:
        signature = inspect.signature(thing)
        constructor = signature.parameters
        sections = ["Args:", "Raises:"]
        if signature.return_annotation not in (None, "None"):
            sections.append("Returns:")
    if name.split(".")[-1] not in RECORDS:
        sections.append("Example:")
    missing = [section for section in sections if section not in text]
    assert not missing
    undocumented = [
        parameter.name
        for parameter in constructor.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        or parameter.kind is parameter.KEYWORD_ONLY
        if not re.search(rf"^\s+{parameter.name}:", text, flags=re.M)
    ]
    assert not undocumented


def test_options_after_the_first_arguments_are_keyword_only():
    for function, positional in (("select", 2), ("compress", 2), ("apply_plan", 2)):
        parameters = inspect.signature(getattr(keras_alds, function)).parameters.values()
        assert sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == positional, function


def tracked_files() -> list[Path]:
    """The project's text files: those that git knows, or all outside of caches."""
    run = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = run.stdout.splitlines() if run.returncode == 0 else []
    if not names:
        pytest.skip("not a git clone")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_absolute_paths_of_a_machine():
    pattern = re.compile(r"(?<![\w.~])/(?:work|tmp|home|root|Users)/\w")
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        found += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(lines, 1)
            if pattern.search(line)
        ]
    assert not found

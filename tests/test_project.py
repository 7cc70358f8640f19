"""The project's own rules: imports, sizes, the two README commands, documented public names."""

from __future__ import annotations

import ast
import configparser
import functools
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import keras_alds

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_alds"
MODULES = sorted(PACKAGE.rglob("*.py"))
# The parts of the package, from the bottom up. A module imports its own part and those of rows
# above its own.
ROWS = (
    ("_version", "core", "_backend", "naming", "resources", "extras", "writing"),
    ("tables", "progress", "scores"),
    ("targets", "plan", "research"),
    ("methods", "kinds"),
    ("options",),
    ("models",),
    ("reporting",),
    ("litert", "refinement", "narrowing", "reports", "backups", "boards"),
    ("choosing",),
    ("api", "distillation", "rewinding"),
    ("stages", "plots"),
    ("callbacks", "monitoring", "tfmot", "research/sweeping", "searching", "sensitivities"),
    ("layers", "tf_keras", "cli"),
    ("__main__",),
    ("__init__",),
)
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}
#: Where TensorFlow may be imported.
TENSORFLOW = ("_backend", "litert", "tfmot", "tf_keras")
#: Where the names of Keras 3 and tf_keras are written: what tells them apart, what registers the
#: layers for both, and what a user types.
NAMED = ("_backend", "tf_keras", "__init__", "cli")
LONGEST_FUNCTION = 60
# Records that nobody constructs, and what makes each. Their docstrings name it; it has an example.
RECORDS = {
    "LayerChoice": "select",
    "LayerSensitivity": "sensitivity",
    "NarrowedLayer": "narrow",
    "Narrowing": "narrow",
    "Refinement": "refine",
    "SearchPoint": "search",
    "SweepRow": "sweep",
    "litert.FileComparison": "litert.compare",
    "litert.FileFigures": "litert.compare",
    "litert.Latency": "litert.benchmark",
    "litert.LiteRTFile": "litert.read_file",
    "litert.Operator": "litert.read_file",
    "litert.Tensor": "litert.read_file",
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    module = path.relative_to(PACKAGE).with_suffix("")
    return module.as_posix() if module.as_posix() in ROW else module.parts[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in MODULES}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def statements(node: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    """All nodes below `node` that run, without `lazy` only those that run at the import.

    What stands under `if TYPE_CHECKING` never runs.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from (inner for other in child.orelse for inner in ast.walk(other))
        elif lazy or not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child
            yield from statements(child, lazy=lazy)


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Full names of what a module imports, those in `importlib.import_module` too."""
    found: set[str] = set()
    for node in statements(parse(path), lazy=lazy):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= computed(node.args[0])
    return found


def computed(name: ast.expr) -> set[str]:
    """The names that a string or f-string may stand for: any module of ours that fits it."""
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    if None not in texts:
        return {"".join(texts)}
    pattern = "".join(".+" if text is None else re.escape(text) for text in texts)
    return {module for module in PATHS if texts[0] and re.fullmatch(pattern, module)}


def outside(path: Path, *, lazy: bool = True) -> set[str]:
    """The packages that a module imports, the standard library and its own left out."""
    names = {name.split(".")[0] for name in imports(path, lazy=lazy)}
    return names - {"keras_alds", *sys.stdlib_module_names}


def imported_modules(path: Path) -> set[str]:
    """The modules of this package that a module imports, at its top or lazily."""
    found = set()
    for name in imports(path):
        while name and name not in PATHS:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module_name(path)}


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """The constants that are docstrings."""
    return {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }


def test_every_module_has_a_row():
    assert {part_of(path) for path in MODULES} <= set(ROW)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path):
    part = part_of(path)
    found = {part_of(PATHS[module]) for module in imported_modules(path)} - {part}
    upwards = {other for other in found if ROW[other] >= ROW[part]}
    assert not upwards, f"{name_of(path)} imports {sorted(upwards)}"


def test_no_modules_import_each_other():
    graph = {module_name(path): imported_modules(path) for path in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_core_is_numpy_and_scipy_only():
    found = {path for path in MODULES if part_of(path) == "core"}
    assert set().union(*map(outside, found)) <= {"numpy", "scipy", "threadpoolctl"}


def test_tensorflow_is_imported_where_it_belongs():
    elsewhere = [path for path in MODULES if part_of(path) not in TENSORFLOW]
    assert [name_of(path) for path in elsewhere if "tensorflow" in outside(path)] == []


def test_what_is_imported_at_once_is_required():
    """Optional packages are imported where they are used, tf_keras in the module of its name."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    required = re.findall(r"^\w+", config["options"]["install_requires"], flags=re.M)
    known = {*required, "h5py", "flatbuffers"}  # Keras and TensorFlow require these
    found = {name_of(path): more for path in MODULES if (more := outside(path, lazy=False) - known)}
    assert found == {"tf_keras.py": {"tf_keras"}}


def test_only_the_backend_tells_keras_3_and_tf_keras_apart():
    found = []
    for path in MODULES:
        if part_of(path) in NAMED:
            continue
        assert "tf_keras" not in outside(path), name_of(path)
        tree = parse(path)
        skip = docstrings(tree)
        found += [
            f"{name_of(path)}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and node.value in ("keras", "tf_keras")
            and node not in skip
        ]
    assert not found


def test_no_function_has_the_name_of_a_module_beside_it():
    """`from keras_alds.litert import convert` must not depend on what was imported before."""
    found = []
    for path in MODULES:
        if path.name != "__init__.py":
            continue
        package = module_name(path)
        names = set(keras_alds._HOMES) if package == "keras_alds" else set()
        for node in ast.iter_child_nodes(parse(path)):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.ImportFrom) and node.module != package:
                names.update(alias.asname or alias.name for alias in node.names)
        found += [f"{package}.{name}" for name in names if f"{package}.{name}" in PATHS]
    assert not found


def test_no_function_is_long():
    long = {}
    for path in MODULES:
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                if lines > LONGEST_FUNCTION:
                    long[f"{name_of(path)}:{node.name}"] = lines
    assert not long


# Private names: of functions, variables and attributes, no special ones such as `__init__`.
PRIVATE = re.compile(r"_\w*[a-z]\w*")


def is_own(value: ast.AST) -> bool:
    """Whether an attribute is taken of `self`, `cls` or `super()`."""
    if isinstance(value, ast.Call):
        value = value.func
    return isinstance(value, ast.Name) and value.id in ("self", "cls", "super")


def attributes(tree: ast.AST) -> set[str]:
    """Private names that are attributes of other objects than `self`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and not is_own(node.value)
        and PRIVATE.fullmatch(node.attr)
        and (not node.attr.endswith("__") or node.attr == "__internal__")
    }


def private_names(tree: ast.AST) -> set[str]:
    """These, and private names that stand in strings."""
    return attributes(tree) | {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and PRIVATE.fullmatch(node.value)
        and not node.value.endswith("__")
    }


def defined_names(tree: ast.AST) -> set[str]:
    """Names of functions, classes, variables and attributes that a module makes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and is_own(node.value):
                found.add(node.attr)
    return found


def backend_names() -> set[str]:
    """The private names of others that `_backend` uses."""
    return set().union(*(private_names(parse(p)) for p in MODULES if part_of(p) == "_backend"))


def test_private_names_are_used_in_the_backend_only():
    trees = [parse(path) for path in MODULES if part_of(path) != "_backend"]
    own = set().union(*map(defined_names, trees))
    names = set().union(*map(attributes, trees))
    strings = set().union(*map(private_names, trees)) & backend_names()
    assert (names | strings) - own == set()


def test_every_private_name_of_the_backend_has_a_test():
    tests = parse(ROOT / "tests" / "_backend" / "test_private_names.py")
    tested = {node.name for node in tests.body if isinstance(node, ast.FunctionDef)}
    missing = {name for name in backend_names() if f"test_{name.strip('_')}" not in tested}
    assert not missing
    documented = [
        node for node in tests.body if isinstance(node, ast.FunctionDef) and node.name in tested
    ]
    assert all(ast.get_docstring(node) for node in documented if node.name.startswith("test_"))


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
    name: importlib.import_module(f"keras_alds.{name}")
    for name in ("layers", "litert", "plots", "tfmot")
}
PUBLIC = [n for n in keras_alds.__all__ if not n.startswith("_") and n not in SUBMODULES]
# Public names of the whole package, those of its public submodules with the module before them.
DOCUMENTED = [
    *PUBLIC,
    *(
        f"{name}.{thing}"
        for name, module in SUBMODULES.items()
        for thing in module.__all__
        if thing != "choose_form"  # the arguments are what a layer knows of itself
    ),
]


def public(name: str) -> object:
    return functools.reduce(getattr, name.split("."), keras_alds)


def test_all_is_sorted_and_complete():
    assert keras_alds.__all__ == sorted(keras_alds.__all__)
    lazy = set(keras_alds._HOMES)
    assert {*lazy, "__version__"} <= set(keras_alds.__all__)
    assert set(keras_alds.__all__) <= {*lazy, *SUBMODULES, "__version__"}
    assert set(keras_alds._MODULES) == {*SUBMODULES, "tf_keras"}
    assert {*PUBLIC, *SUBMODULES} <= set(dir(keras_alds))
    for name, module in SUBMODULES.items():
        assert module.__all__ == sorted(module.__all__), name
        assert inspect.getdoc(module), name


def test_all_files_of_the_package_are_installed():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    patterns = {
        (package, pattern.strip())
        for package, line in config["options.package_data"].items()
        for pattern in line.split(",")
    }
    files = {p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    missing = {
        name_of(path)
        for path in files - set(MODULES)
        if not any(
            ".".join(path.relative_to(ROOT).parts[:-1]) == package and path.match(pattern)
            for package, pattern in patterns
        )
    }
    assert not missing


def test_type_checkers_see_the_names_where_they_are():
    (block,) = [node for node in parse(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "keras_alds"
        for alias in node.names
    }
    assert seen == {name: f"keras_alds.{home}" for name, home in keras_alds._HOMES.items()}


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
    if name in RECORDS:
        maker = RECORDS[name]
        assert f"{maker.split('.')[-1]}`" in text, f"does not name `{maker}`, which makes it"
        assert "Example:" in (inspect.getdoc(public(maker)) or "")
    else:
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
    for function, positional in (
        ("select", 2),
        ("compress", 2),
        ("apply_plan", 2),
        ("refine", 3),
        ("search", 2),
        ("sensitivity", 2),
        ("narrow", 2),
        ("narrow_heads", 2),
    ):
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

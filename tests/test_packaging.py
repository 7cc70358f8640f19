"""The wheel and the source archive hold what they should, and work where they are installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import keras_alds

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_alds"
#: Runs in the installed copy, and in no environment that holds another one.
IMPORT = """
import os
import sys
import keras_alds
assert os.path.dirname(os.path.dirname(keras_alds.__file__)) == os.getcwd(), keras_alds.__file__
assert keras_alds.__version__ == {version!r}
import keras_alds.core.solvers
from keras_alds.cli import main
assert not {{"keras", "tensorflow"}} & set(sys.modules)
"""


def run(*arguments: str, **options: str) -> str:
    found = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **options
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def sources() -> set[str]:
    """The files of the package, as Git knows them or would know them."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_built_files_install_and_work(tmp_path: Path):
    pytest.importorskip("build")
    # The wheel is built from the source archive, so that this is complete too.
    run("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    (archive,) = tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        text = file.read(metadata).decode()
        (entries,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "keras_alds = keras_alds.cli:main" in file.read(entries).decode()
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert "keras_alds/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert sources() | {"README.md", "LICENSE", "setup.cfg", "pyproject.toml"} <= packed
    assert f"Version: {keras_alds.__version__}" in text
    assert "Requires-Dist: keras>=" in text
    for extra in ("litert", "tfmot", "plots"):
        assert f"Provides-Extra: {extra}\n" in text
    assert not re.search(r"^Requires-Dist: (pytest|ruff|mypy)\b(?!.*extra)", text, flags=re.M)

    target = tmp_path / "installed"
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", "install", *options, "--target", str(target), str(wheel))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = IMPORT.format(version=keras_alds.__version__)
    run("-c", code, cwd=str(target), env=environment)


def test_citation_names_the_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {keras_alds.__version__}\n" in text
    assert "arXiv:2107.11442" in text

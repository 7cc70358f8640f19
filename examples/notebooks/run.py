"""Runs the notebooks and writes their outputs into them.

    python examples/notebooks/run.py                 # all of this folder
    python examples/notebooks/run.py latency.ipynb

The tests run them too, with small parameters, and write nothing. `pip install "keras_alds[dev]"`
installs what is needed.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parent


def read(path: Path, parameters: Mapping[str, Any] | None = None) -> nbformat.NotebookNode:
    """A notebook; its cell with the tag `parameters` gets other values for those given."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in (parameters or {}).items())
    return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in a new process and an empty folder; the outputs are in the cells."""
    metadata = copy.deepcopy(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": folder}}
        ).execute()
    notebook.metadata = metadata  # without the version of Python
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if "outputs" in cell:  # without TensorFlow's messages, and the ends of progress bars
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and output.get("text") != "\n"
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", help="file names (default: all)")
    names = parser.parse_args().notebooks or sorted(path.name for path in FOLDER.glob("*.ipynb"))
    for name in names:
        notebook = read(FOLDER / name)
        execute(notebook)
        nbformat.write(notebook, FOLDER / name)
        print(f"{name}: {(FOLDER / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

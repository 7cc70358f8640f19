"""Runs a part of the tests with older and newer versions, each in a fresh environment.

    python benchmarks/versions.py            # oldest, middle and newest versions
    python benchmarks/versions.py newest     # one of them

prints a Markdown table. It takes the Python that it is started with, and makes the environments in
a temporary folder (`--folder` keeps them).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = {
    "oldest": ["tensorflow==2.19.*", "keras==3.8.*", "tf_keras==2.19.*"],
    "middle": ["tensorflow==2.19.*", "keras==3.11.*", "tf_keras==2.19.*"],
    "newest": ["tensorflow", "keras", "tf_keras"],
}
SHOWN = ("tensorflow", "keras", "tf_keras", "numpy")
#: Selecting, compressing, training on, saving, loading in a fresh process, conversion.
TESTS = (
    *("tests/core/test_solvers.py", "tests/test_api.py", "tests/test_callbacks.py"),
    *("tests/test_callbacks_optimizers.py", "tests/test_callbacks_saved.py"),
    *("tests/test_callbacks_again.py", "tests/test_life.py", "tests/litert/test_conversion.py"),
)


def python_of(folder: Path, pins: list[str]) -> Path:
    """The Python of an environment with these packages, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        packages = [*pins, "tensorflow-model-optimization", "ai-edge-litert", "pytest"]
        packages += ["pytest-xdist", "matplotlib", "scikit-learn", "cloudpickle", "hypothesis"]
        packages += ["tensorboard"]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages, "-e", str(ROOT)], check=True)
    return python


def versions(python: Path) -> list[str]:
    code = f"from importlib.metadata import version; print(*map(version, {SHOWN}))"
    return subprocess.check_output([python, "-c", code], text=True).split()


def last_line(python: Path) -> str:
    """What pytest says at its end, without the time."""
    options = ["-q", "-n", "2", "--everything", "-p", "no:cacheprovider"]
    command = [python, "-m", "pytest", *options, *TESTS]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(*re.findall(r"^(?:FAILED|ERROR).*", run.stdout, re.MULTILINE), sep="\n", file=sys.stderr)
    last = run.stdout.strip().splitlines()[-1].strip("= ")
    return re.sub(r"(, \d+ warnings?)? in .*", "", last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="|".join(PINS), help="default: all")
    parser.add_argument("--folder", type=Path, help="keep the environments here")
    options = parser.parse_args()
    if unknown := [row for row in options.rows if row not in PINS]:
        parser.error(f"expected {', '.join(PINS)}. Received: {unknown[0]}")
    print("| Python | TensorFlow | Keras | tf_keras | NumPy | tests |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for row in options.rows or PINS:
            python = python_of((options.folder or Path(temporary)) / row, PINS[row])
            found = [platform.python_version(), *versions(python), last_line(python)]
            print(f"| {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()

"""The command line: `keras_alds <command>`, or `python -m keras_alds <command>`.

Each command is a line in `COMMANDS` and a module here with two functions, `add_arguments(parser)`
and `run(arguments)`. The module is imported when its command is used, and TensorFlow when it runs.
Like argparse's own errors, bad input prints one line on standard error and exits with status 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from keras_alds._version import __version__

#: The commands: description and module of each.
COMMANDS = {
    "plan": ("choose slices and ranks for a model and print them", "plan"),
    "sweep": ("compare methods: accuracy against size, as tables and a plot", "sweep"),
    "latency": ("measure a model's layers with LiteRT on this machine", "latency"),
    "latency-files": ("write files to measure on a device with benchmark_model", "latency_files"),
    "latency-read": ("make a latency table from the log of benchmark_model", "latency_read"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of the command line.

    Args:
        argv: The arguments after the program's name. Defaults to those of the process.

    Returns:
        The exit status 0.

    Raises:
        SystemExit: With status 2 for invalid arguments or input, with 0 after `--help` and
            `--version`.

    Example:
        >>> main(["--version"])  # doctest: +SKIP
        keras_alds 0.1.0
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="keras_alds", description="Low-rank compression of trained Keras models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for name, (text, module) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name in argv:
            home = importlib.import_module(f"keras_alds.cli.{module}")
            home.add_arguments(command)
            command.set_defaults(run=home.run)
    arguments = parser.parse_args(argv)
    quiet_tensorflow()
    try:
        arguments.run(arguments)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def quiet_tensorflow() -> None:
    """Imports TensorFlow without its log, unless the user has set a log level."""
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # TensorFlow 2.21 writes some lines whatever the level is, and writes them without Python.
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        importlib.import_module("keras")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)

"""The command line: `python -m keras_alds <command>`, or `keras_alds <command>`.

A command is one function `add_…(commands)` in `COMMANDS`: it adds its parser and says with
`set_defaults(run=…)` what is to run. Bad input ends with one line on standard error and exit
status 2, as argparse's own complaints do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keras_alds import _backend
from keras_alds._version import __version__
from keras_alds.compress import OBJECTIVES, select
from keras_alds.core.methods import METHODS
from keras_alds.core.targets import TARGETS

Commands = Any  # argparse gives this class no public name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of the command line.

    Args:
        argv: The arguments after the program's name. Defaults to those of the process.

    Returns:
        The exit status 0.

    Raises:
        SystemExit: With status 2 for arguments or input that cannot be used, with 0 after
            `--help` and `--version`.

    Example:
        >>> main(["--version"])  # doctest: +SKIP
        keras_alds 0.1.0
    """
    parser = argparse.ArgumentParser(
        prog="keras_alds", description="Low-rank compression of trained Keras models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `read_model` reads."""
    parser.add_argument("model", type=Path, help="a saved model, .keras or .h5")
    parser.add_argument(
        "--keras", choices=_backend.KERASES, default=_backend.KERASES[0], help="what loads it"
    )


def read_model(arguments: argparse.Namespace) -> Any:
    """The model of a command that was made with `add_model`, without its compile state."""
    return _backend.load_model(arguments.model, arguments.keras)


def add_plan(commands: Commands) -> None:
    """`plan`: choose slices and ranks, print them, save them."""
    parser = commands.add_parser("plan", help="choose slices and ranks for a model and print them")
    add_model(parser)
    parser.add_argument("--cr", type=float, default=0.5, help="fraction to remove (default: 0.5)")
    without_data = [name for name, method in METHODS.items() if not method.needs_data]
    parser.add_argument("--method", choices=without_data, help="default: that of `select`")
    parser.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVES[0])
    parser.add_argument("--exclude", nargs="*", default=[], help="layers to leave alone")
    parser.add_argument("--max-slices", type=int, help="largest number of slices")
    parser.add_argument("--target", choices=TARGETS, help="the runtime that the model is for")
    parser.add_argument("--output", type=Path, help="write the plan to this JSON file")
    parser.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> None:
    """Runs the command `plan`."""
    plan = select(
        read_model(arguments),
        arguments.cr,
        method=arguments.method,
        objective=arguments.objective,
        exclude=arguments.exclude,
        max_slices=arguments.max_slices,
        target=arguments.target,
    )
    plan.summary()
    if arguments.output:
        plan.save(arguments.output)


COMMANDS: tuple[Callable[[Commands], None], ...] = (add_plan,)

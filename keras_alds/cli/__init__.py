"""The command line: `keras_alds <command>`, or `python -m keras_alds <command>`.

Each command is a line in `COMMANDS` and a module here with `USAGE`, `EXAMPLES` and two functions,
`add_arguments(parser)` and `run(arguments)`, which returns an `Answer`. The module is imported when
its command is used, and TensorFlow when it runs. Answers go to standard output, progress, warnings
and errors to standard error. Like argparse's own errors, bad input prints one line and exits with
status 2. Files are written as `outputs.py` says.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from keras_alds._version import __version__
from keras_alds.cli.answers import as_json
from keras_alds.cli.outputs import Outputs

#: The commands: description and module of each.
COMMANDS = {
    "demo": ("train, compress and retrain a small network, in a minute", "demo"),
    "inspect": ("tell what can be compressed in a model, how far, and what is skipped", "look"),
    "compress": ("make a model smaller, and write a .tflite file and a report", "compress"),
    "plan": ("choose slices and ranks for a model and print them", "plan"),
    "convert": ("write a model as a LiteRT file", "convert"),
    "compare": ("compare two models or files: size, latency, accuracy", "compare"),
    "sweep": ("compare methods: accuracy against size, as tables and a plot", "sweep"),
    "latency": ("measure a model's layers with LiteRT on this machine", "latency"),
    "latency-files": ("write files to measure on a device with benchmark_model", "latency_files"),
    "latency-read": ("make a latency table from the log of benchmark_model", "latency_read"),
}
INTERRUPTED, TERMINATED = 130, 143
#: Options of several values.
SEVERAL = ("--crs", "--exclude", "--learning-rates", "--methods")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors also say what to do about options that took too much."""

    takes_several = False

    def error(self, message: str) -> NoReturn:
        if self.takes_several and "the following arguments are required" in message:
            message += (
                ". Options of several values, such as --exclude, take all that follows: write the "
                "files first, as in `model.keras --exclude head`"
            )
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of the command line.

    Args:
        argv: The arguments after the program's name. Defaults to those of the process.

    Returns:
        The exit status 0.

    Raises:
        SystemExit: With status 2 for invalid arguments or input, with 0 after `--help` and
            `--version`, and with 130 or 143 if the command was interrupted or terminated.

    Example:
        >>> main(["--version"])  # doctest: +SKIP
        keras_alds 0.1.0
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(argv)
    arguments = parser.parse_args(argv)
    try:
        with _terminated_as_an_error():
            _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {_in_one_line(error)}\n")
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, f"{parser.prog}: interrupted\n")
    return 0


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command that is used."""
    parser = _Parser(
        prog="keras_alds",
        description="Low-rank compression of trained Keras models.",
        epilog="Start with `keras_alds inspect model.keras`, and then "
        "`keras_alds compress model.keras --cr 0.5 -o small.keras`. `keras_alds COMMAND --help` "
        "shows the arguments of a command, and examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for name, (text, module) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in argv:
            home = importlib.import_module(f"keras_alds.cli.{module}")
            home.add_arguments(command)
            command.add_argument(
                "--json", action="store_true", help="print one JSON document, and nothing else"
            )
            command.usage = f"keras_alds {name} {home.USAGE}"
            command.epilog = "examples:\n  " + "\n  ".join(home.EXAMPLES.strip().splitlines())
            command.set_defaults(run=home.run, command=name)
            command.takes_several = not set(SEVERAL).isdisjoint(argv)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    with Outputs(arguments).kept_tidy() as outputs:
        arguments.outputs = outputs
        quiet_tensorflow()
        from keras_alds.progress import lines_without_terminal

        # What libraries print is not the answer.
        with contextlib.redirect_stdout(sys.stderr), _short_warnings(), lines_without_terminal():
            answer = arguments.run(arguments)
        written = outputs.publish()
    if arguments.json:
        print(as_json({"command": arguments.command, **answer.document, "written": written}))
        return
    answer.show()
    for place in written.values():
        print(f"Written: {place}")


def _in_one_line(error: BaseException) -> str:
    """An error's text; the system's errors say which file is meant."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"Expected a file that can be used. Received: {error.filename} ({error.strerror})"
    return " ".join(text.split())


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Prints warnings in one line, without the place in the code."""

    def show(message: Any, *_: Any, **__: Any) -> None:
        print(f"keras_alds: warning: {' '.join(str(message).split())}", file=sys.stderr)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def _terminated_as_an_error() -> Iterator[None]:
    """Lets SIGTERM end the process by an exception, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_tensorflow() -> None:
    """Imports TensorFlow without its log, unless the user has set a lower log level."""
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") != "3":
        return
    # TensorFlow 2.21 writes some lines whatever the level is, and writes them without Python.
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        importlib.import_module("keras")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)

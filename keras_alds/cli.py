"""The command line: `python -m keras_alds <command>`, or `keras_alds <command>`.

A command is one function `add_…(commands)` in `COMMANDS`: it adds its parser and says with
`set_defaults(run=…)` what is to run. Bad input ends with one line on standard error and exit
status 2, as argparse's own complaints do.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._version import __version__
from keras_alds.compress import select
from keras_alds.litert import device
from keras_alds.methods import METHODS
from keras_alds.options import OBJECTIVES
from keras_alds.research.retraining import retrainer
from keras_alds.research.sweeping import DEFAULT_CRS, check_plots, sweep
from keras_alds.targets import TARGETS

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


SCHEMES_HELP = "fold schemes to choose from: all, or numbers as in 0,3 (default: 0)"


def read_schemes(text: str) -> str | list[int]:
    """The fold schemes of an argument: `all`, or numbers with commas between."""
    return text if text == "all" else [int(part) for part in text.split(",")]


def add_plan(commands: Commands) -> None:
    """`plan`: choose slices and ranks, print them, save them."""
    parser = commands.add_parser("plan", help="choose slices and ranks for a model and print them")
    add_model(parser)
    parser.add_argument("--cr", type=float, default=0.5, help="fraction to remove (default: 0.5)")
    without_data = [name for name, method in METHODS.items() if not method.needs_data]
    parser.add_argument("--method", choices=without_data, help="default: that of `select`")
    parser.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVES[0])
    parser.add_argument("--latency", type=Path, help="a latency table; default: measured here")
    parser.add_argument("--exclude", nargs="*", default=[], help="layers to leave alone")
    parser.add_argument("--max-slices", type=int, help="largest number of slices")
    parser.add_argument("--target", choices=TARGETS, help="the runtime that the model is for")
    parser.add_argument("--schemes", type=read_schemes, default=0, help=SCHEMES_HELP)
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
        latency=arguments.latency,
        schemes=arguments.schemes,
    )
    plan.summary()
    if arguments.output:
        plan.save(arguments.output)


def add_sweep(commands: Commands) -> None:
    """`sweep`: methods × ratios → tables and a plot."""
    parser = commands.add_parser(
        "sweep",
        help="compare methods: accuracy against size, as tables and a plot",
        description="Compresses an image classifier by every method to every ratio, and prints "
        "the top-1 accuracy in % as Markdown. The .npz file holds x_test and y_test, for "
        "calibration x_train, for retraining y_train too; the model gets the pixels as they are.",
    )
    add_model(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, help=".npz file of images and labels")
    add("--scale", type=float, default=1.0, help="multiply the pixels by this (default: 1)")
    add("--methods", nargs="+", choices=list(METHODS), help="default: all")
    add("--crs", type=float, nargs="+", default=DEFAULT_CRS, help="fractions to remove")
    add("--objective", choices=OBJECTIVES, default=OBJECTIVES[0], help="what the fractions count")
    add("--exclude", nargs="*", default=[], help="layers to leave alone")
    add("--max-slices", type=int, help="largest number of slices (default: no limit)")
    add("--latency", type=Path, help="CSV file of latencies, for --objective latency")
    add("--schemes", type=read_schemes, default=0, help=SCHEMES_HELP)
    add("--calibration", type=int, default=512, help="unlabelled x_train (default: 512; 0: none)")
    add("--test", type=int, help="images to test with (default: all)")
    add("--epochs", type=int, default=0, help="epochs of retraining (default: 0, none)")
    add("--train", type=int, help="images to retrain with (default: all)")
    add(
        "--learning-rates",
        type=float,
        nargs="+",
        default=(0.01, 0.001),
        help="those of the last epochs of the training, in order: they are gone through again "
        "(learning-rate rewinding), each for an equal part of --epochs (default: 0.01 0.001)",
    )
    add("--batch-size", type=int, default=128, help="images in a batch of retraining")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="crops and flips")
    add("--csv", type=Path, help="write all figures to this file")
    add("--markdown", type=Path, help="write the tables to this file")
    add("--plot", type=Path, help="write the plot to this picture")
    parser.set_defaults(run=run_sweep)


def run_sweep(arguments: argparse.Namespace) -> None:
    """Runs the command `sweep`."""
    if arguments.epochs < 0 or arguments.calibration < 0:
        raise ValueError(
            "Expected --epochs and --calibration to be 0 or more. "
            f"Received: {arguments.epochs} and {arguments.calibration}"
        )
    if arguments.plot is not None:
        check_plots()
    model = read_model(arguments)
    x_test, y_test = read_images(arguments, "test", arguments.test)
    logits = scores(model, x_test[:64])
    from_logits = bool((logits < 0).any() or not np.allclose(logits.sum(-1), 1, atol=1e-3))
    calibration = retrain = None
    if arguments.calibration and any(METHODS[n].needs_data for n in arguments.methods or METHODS):
        calibration, _ = read_images(arguments, "train", arguments.calibration, labels=False)
    if arguments.epochs:
        x_train, y_train = read_images(arguments, "train", arguments.train)
        retrain = retrainer(
            x_train,
            y_train,
            learning_rates=arguments.learning_rates,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            augment=arguments.augment,
            from_logits=from_logits,
        )
    result = sweep(
        model,
        lambda candidate: 100 * float(np.mean(scores(candidate, x_test).argmax(-1) == y_test)),
        methods=arguments.methods,
        crs=arguments.crs,
        objective=arguments.objective,
        calibration_data=calibration,
        retrain=retrain,
        exclude=arguments.exclude,
        max_slices=arguments.max_slices,
        latency=arguments.latency,
        schemes=arguments.schemes,
    )
    text = f"No retraining, top-1 in %, {len(x_test):,} images:\n\n{result.to_markdown()}\n"
    if retrain is not None:
        text += (
            f"\nAfter {arguments.epochs} epoch{'s' * (arguments.epochs > 1)} of {len(x_train):,} "
            "images:\n\n"
            f"{result.to_markdown(retrained=True)}\n"
        )
    print(text, end="")
    if arguments.csv:
        result.to_csv(arguments.csv)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.plot:
        result.plot(arguments.plot, label="top-1 accuracy, %")


def read_images(
    arguments: argparse.Namespace, part: str, limit: int | None, *, labels: bool = True
) -> tuple[Any, Any]:
    """Images in float32 and their classes, None without `labels`, from a command's .npz file."""
    images, classes = f"x_{part}", f"y_{part}"
    names = (images, classes) if labels else (images,)
    try:
        with np.load(arguments.data) as file:
            arrays = {name: file[name] for name in names if name in file}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected {arguments.data} to be an .npz file of arrays. "
            f"Received: one that cannot be read as such ({error})"
        ) from error
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(
            f"Expected {arguments.data} to hold {' and '.join(names)}. Received: no "
            + " and no ".join(missing)
        )
    x = arrays[images][:limit].astype("float32") * arguments.scale
    if not labels:
        return x, None
    y = arrays[classes]
    if y.size != len(arrays[images]):
        raise ValueError(
            f"Expected one class, a number, for each image in {images}. "
            f"Received: {classes} of shape {y.shape} for {len(arrays[images])} images"
        )
    return x, y.reshape(-1)[:limit]


def scores(model: Any, x: Any) -> Any:
    """The class scores of a classifier, `[n, classes]`."""
    outputs = model.predict(x, batch_size=250, verbose=0)
    if not isinstance(outputs, np.ndarray) or outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(
            "Expected a classifier with one score for each class. Received: outputs of shape "
            f"{getattr(outputs, 'shape', type(outputs).__name__)}. Use `keras_alds.sweep` with an "
            "`evaluate` of your own."
        )
    return outputs


def add_latency(commands: Commands) -> None:
    """`latency`: measure a model's layers here."""
    parser = commands.add_parser("latency", help="measure a model's layers with LiteRT, here")
    add_model(parser)
    device.add_options(parser)
    parser.add_argument("--max-slices", type=int, help="largest number of slices")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.set_defaults(run=lambda given: device.run_measure(read_model(given), given))


def add_latency_files(commands: Commands) -> None:
    """`latency-files`: write what is to be measured on a device."""
    parser = commands.add_parser(
        "latency-files", help="write the files to be measured on a device by benchmark_model"
    )
    add_model(parser)
    parser.add_argument("folder", type=Path, help="folder to write to")
    device.add_options(parser)
    parser.add_argument("--max-slices", type=int, default=4, help="default: 4")
    parser.set_defaults(run=lambda given: device.run_write(read_model(given), given))


def add_latency_read(commands: Commands) -> None:
    """`latency-read`: make a latency table of the benchmark tool's log."""
    parser = commands.add_parser(
        "latency-read", help="make a latency table of what benchmark_model printed"
    )
    parser.add_argument("folder", type=Path, help="the folder of latency-files")
    parser.add_argument("log", type=Path, help="what benchmark_model printed")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.set_defaults(run=device.run_read)


COMMANDS: tuple[Callable[[Commands], None], ...] = (
    add_plan,
    add_sweep,
    add_latency,
    add_latency_files,
    add_latency_read,
)

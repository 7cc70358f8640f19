"""`keras_alds compare`: two models or files side by side, in the LiteRT runtime."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from keras_alds.cli.answers import Answer
from keras_alds.cli.converting import (
    add_quantize,
    check_conversion,
    check_representative,
    is_litert,
)
from keras_alds.cli.data import Inputs, add_examples, read_examples, read_labelled
from keras_alds.cli.models import add_loading, read_model

USAGE = "FIRST SECOND [--data SOURCE] [options]"
EXAMPLES = """
keras_alds compare model.keras small.keras
keras_alds compare model.keras small.keras --data images.npz --quantize int8
keras_alds compare before.tflite after.tflite --data images.npz --runs 200 --threads 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Compares two models or .tflite files: bytes, parameters, MACs, latency and memory with "
        "LiteRT on this machine, and with --data the accuracy. Models are converted first."
    )
    parser.add_argument("first", type=Path, help="a saved model or .tflite file: the original")
    parser.add_argument("second", type=Path, help="another one: the smaller one")
    add_loading(parser)
    help = "examples with labels (in an .npz file x_test and y_test, or x and y)"
    add_examples(parser, "--data", help, most=None)
    add_quantize(parser)
    parser.add_argument(
        "--representative",
        metavar="SOURCE",
        help="unlabelled examples for int8, if models are converted (default: those of --data)",
    )
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default: 1)")
    parser.add_argument("--runs", type=int, default=100, help="timed runs; 0: none (default: 100)")


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    from keras_alds.litert import compare

    source = arguments.representative or arguments.data
    paths = (arguments.first, arguments.second)
    models = [path for path in paths if not is_litert(path)]
    if arguments.quantize and not models:
        raise ValueError(
            f"Expected a model to convert, with --quantize {arguments.quantize}. Received: two "
            ".tflite files, which are compared as they are"
        )
    check_representative(arguments.quantize, arguments.representative)
    check_conversion(arguments.quantize, source, "--representative")
    first, second = (_read(arguments, path) for path in paths)
    data = representative = None
    if arguments.data is not None:
        data = read_labelled(arguments, arguments.data, _inputs(first), "test")
    if models and arguments.quantize == "int8":
        model = second if isinstance(first, bytes) else first
        representative = read_examples(arguments, source, model)
    result = compare(
        first,
        second,
        data,
        metric=None if data is None else "accuracy",
        quantize=arguments.quantize,
        representative_data=representative,
        threads=arguments.threads,
        runs=arguments.runs,
    )
    document = {
        "first": _figures(result.original),
        "second": _figures(result.compressed),
        "latency_ratio": result.latency_ratio,
    }
    return Answer(document, result.summary)


def _read(arguments: argparse.Namespace, path: Path) -> Any:
    """A model, or the bytes of a LiteRT file."""
    if not is_litert(path):
        return read_model(arguments, path)
    if not path.is_file():
        raise ValueError(f"Expected a .tflite file. Received: {path}, which does not exist")
    return path.read_bytes()


def _inputs(item: Any) -> Inputs:
    """The inputs of a model or file."""
    from keras_alds.litert import read_file

    if not isinstance(item, bytes):
        return Inputs.of(item)
    tensors = read_file(item).inputs
    return Inputs(tuple(t.name for t in tensors), tuple(t.shape[1:] for t in tensors))


def _figures(figures: Any) -> dict[str, Any]:
    """The figures of one file, with seconds of latency."""
    latency = figures.latency
    found = {field.name: getattr(figures, field.name) for field in dataclasses.fields(figures)}
    return {**found, "latency": latency and dataclasses.asdict(latency)}

"""`keras_alds latency`: measure a model's layers on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from keras_alds.cli.answers import Answer
from keras_alds.cli.models import add_model, read_model
from keras_alds.cli.outputs import add_output
from keras_alds.options import add_flags, flags

USAGE = "MODEL -o FILE [options]"
EXAMPLES = """
keras_alds latency model.keras -o latency.csv
keras_alds latency model.keras --quantize int8 --threads 4 -o latency.csv
keras_alds plan model.keras --objective latency --latency-table latency.csv
"""
OPTIONS = ("quantize", "target", "exclude", "max_slices")


def add_settings(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds the arguments that `latency` and `latency-files` share."""
    add_model(parser)
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default: 1)")
    add_flags(parser, OPTIONS)
    parser.set_defaults(target="litert", **defaults)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_settings` as keyword arguments."""
    return {**flags(arguments, OPTIONS), "threads": arguments.threads}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_settings(parser)
    add_table(parser)


def add_table(parser: argparse.ArgumentParser) -> None:
    """Adds the argument for the table to write."""
    add_output(parser, "-o", "--output", endings=(".csv",), required=True, help="CSV file to write")


def write(table: Any, arguments: argparse.Namespace) -> Answer:
    """Saves a latency table."""
    table.save(arguments.outputs.path("output"))
    figures = {"total_ns": table.total, "layers": len(table.layers), "noise": table.noise}
    text = f"{table.total / 1000:,.1f} µs; {len(table.layers)} layers; noise {table.noise:.1%}"
    return Answer(figures, lambda: print(text))


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    from keras_alds.litert import measure_latency

    return write(measure_latency(read_model(arguments), **settings(arguments)), arguments)

"""`keras_alds latency`: measure a model's layers on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from keras_alds.cli.models import add_model, read_model
from keras_alds.options import add_flags, flags

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
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the argument for the file to write."""
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")


def write(table: Any, output: Path) -> None:
    """Saves a latency table and prints its total."""
    table.save(output)
    print(
        f"{table.total / 1000:,.1f} µs; {len(table.layers)} layers in {output}; "
        f"noise {table.noise:.1%}"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from keras_alds.litert import measure_latency

    write(measure_latency(read_model(arguments), **settings(arguments)), arguments.output)

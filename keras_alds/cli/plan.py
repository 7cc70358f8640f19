"""`keras_alds plan`: choose slices and ranks, print them, save them."""

from __future__ import annotations

import argparse
from pathlib import Path

from keras_alds.cli.models import add_model, read_model
from keras_alds.options import add_flags, flags

OPTIONS = (
    *("method", "objective", "latency_table", "exclude", "max_slices", "rank_multiple", "target"),
    *("quantize", "schemes"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model(parser)
    parser.add_argument("--cr", type=float, default=0.5, help="fraction to remove (default: 0.5)")
    add_flags(parser, OPTIONS)
    parser.add_argument("--output", type=Path, help="write the plan to this JSON file")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from keras_alds.api import select

    plan = select(read_model(arguments), arguments.cr, **flags(arguments, OPTIONS))
    plan.summary()
    if arguments.output:
        plan.save(arguments.output)

"""`keras_alds latency-files`: write the files to measure on a device."""

from __future__ import annotations

import argparse
from pathlib import Path

from keras_alds.cli import latency
from keras_alds.cli.models import read_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    latency.add_settings(parser, max_slices=4)
    parser.add_argument("folder", type=Path, help="folder to write to")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from keras_alds.litert import write_latency_files

    settings = latency.settings(arguments)
    count = write_latency_files(read_model(arguments), arguments.folder, **settings)
    print(f"{count} files in {arguments.folder}")

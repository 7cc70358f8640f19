"""`keras_alds latency-files`: write the files to measure on a device."""

from __future__ import annotations

import argparse

from keras_alds.cli import latency
from keras_alds.cli.answers import Answer
from keras_alds.cli.models import read_model
from keras_alds.cli.outputs import add_output

USAGE = "MODEL FOLDER [options]"
EXAMPLES = """
keras_alds latency-files model.keras files
keras_alds latency-files model.keras files --quantize int8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    latency.add_settings(parser, max_slices=4)
    add_output(parser, "folder", endings=(), help="folder to write to")


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    from keras_alds.litert import write_latency_files

    settings = latency.settings(arguments)
    folder = arguments.outputs.path("folder")
    count = write_latency_files(read_model(arguments), folder, **settings)
    return Answer({"files": count}, lambda: print(f"{count} files in {arguments.folder}"))

"""`keras_alds latency-read`: make a latency table from the benchmark tool's log."""

from __future__ import annotations

import argparse
from pathlib import Path

from keras_alds.cli import latency
from keras_alds.cli.answers import Answer

USAGE = "FOLDER LOG -o FILE [options]"
EXAMPLES = """
keras_alds latency-read files log.txt -o phone.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("folder", type=Path, help="the folder that latency-files wrote")
    parser.add_argument("log", type=Path, help="the log of benchmark_model")
    latency.add_table(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    from keras_alds.litert import read_latency_log

    return latency.write(read_latency_log(arguments.folder, arguments.log), arguments)

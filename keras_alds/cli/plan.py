"""`keras_alds plan`: choose slices and ranks, print them, save them."""

from __future__ import annotations

import argparse

from keras_alds.cli.answers import Answer
from keras_alds.cli.data import add_examples, read_examples
from keras_alds.cli.models import add_model, read_model
from keras_alds.cli.outputs import add_output
from keras_alds.cli.select_options import add_choosing, add_cr, choosing

USAGE = "MODEL [--cr FRACTION] [-o FILE] [options]"
EXAMPLES = """
keras_alds plan model.keras --cr 0.5
keras_alds plan model.keras --cr 0.5 --calibration images.npz -o plan.json
keras_alds plan model.keras --cr params=0.5,macs=0.4 --exclude head
keras_alds compress model.keras --plan plan.json --calibration images.npz -o small.keras
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model(parser)
    add_cr(parser, 0.5)
    add_output(parser, "-o", "--output", endings=(".json",), help="write the plan to this file")
    add_examples(parser, "--calibration", "unlabelled examples")
    add_choosing(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    from keras_alds.api import select

    model = read_model(arguments)
    options = choosing(arguments)
    data = read_examples(arguments, arguments.calibration, model)
    plan = select(model, arguments.cr, calibration_data=data, **options)
    if (path := arguments.outputs.path("output")) is not None:
        plan.save(path)
    return Answer({"plan": plan.to_dict()}, plan.summary)

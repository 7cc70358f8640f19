"""`keras_alds convert`: from a saved model to a LiteRT file."""

from __future__ import annotations

import argparse
from typing import Any

from keras_alds.cli.answers import Answer
from keras_alds.cli.converting import add_quantize, check_conversion, check_representative, convert
from keras_alds.cli.data import add_examples, read_examples
from keras_alds.cli.models import add_model, read_model
from keras_alds.cli.outputs import add_output

USAGE = "MODEL -o FILE [--quantize FORMAT] [options]"
EXAMPLES = """
keras_alds convert small.keras -o small.tflite
keras_alds convert small.keras -o small.tflite --quantize float16
keras_alds convert small.keras -o small.tflite --quantize int8 --representative images.npz
"""
TYPES = ("float32", "int8", "uint8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model(parser)
    add_output(
        parser, "-o", "--output", endings=(".tflite",), required=True, help="the file to write"
    )
    add_quantize(parser)
    add_examples(parser, "--representative", "unlabelled examples for int8")
    for name in ("input", "output"):
        parser.add_argument(
            f"--{name}-type",
            choices=TYPES,
            default=TYPES[0],
            help=f"type of the {name}s of an int8 file (default: float32)",
        )
    parser.add_argument("--batch-size", type=int, default=1, help="examples in a run (default: 1)")


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    check_representative(arguments.quantize, arguments.representative)
    check_conversion(arguments.quantize, arguments.representative, "--representative")
    model = read_model(arguments)
    settings: dict[str, Any] = {
        "inference_input_type": arguments.input_type,
        "inference_output_type": arguments.output_type,
        "batch_size": arguments.batch_size,
    }
    data = read_examples(arguments, arguments.representative, model)
    size = convert(model, arguments.outputs.path("output"), arguments, data, **settings)
    quantize = arguments.quantize or "float32"
    text = f"{size:,} bytes in {quantize}. The file was loaded and run once."
    return Answer({"bytes": size, "quantize": quantize}, lambda: print(text))

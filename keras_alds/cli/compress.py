"""`keras_alds compress`: from a saved model to a smaller one, a .tflite file and a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from keras_alds.cli.answers import Answer
from keras_alds.cli.converting import add_quantize, check_conversion, convert
from keras_alds.cli.data import add_examples, read_examples
from keras_alds.cli.models import add_model, read_model
from keras_alds.cli.outputs import MODEL_ENDINGS, add_output
from keras_alds.cli.select_options import add_choosing, add_cr, choosing

USAGE = "MODEL --cr FRACTION [-o FILE] [--tflite FILE] [--report FILE] [options]"
EXAMPLES = """
keras_alds compress model.keras --cr 0.5 -o small.keras
keras_alds compress model.keras --cr 0.5 --calibration images.npz --report r.html -o small.keras
keras_alds compress model.keras --cr 0.5 --calibration photos --tflite small.tflite --quantize int8
keras_alds compress model.keras --cr 0.1 --objective latency --calibration x.npz -o fast.keras
keras_alds compress model.keras --plan plan.json --calibration images.npz -o small.keras
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model(parser)
    add_cr(parser)
    parser.add_argument("--plan", type=Path, help="follow this plan, instead of --cr and options")
    add_examples(parser, "--calibration", "unlabelled examples; a few hundred keep the accuracy")
    out = parser.add_argument_group("what to write")
    add_output(out, "-o", "--output", endings=MODEL_ENDINGS, help="write the model: .keras or .h5")
    out.add_argument("--expand", action="store_true", help="write stock layers into the model")
    add_output(out, "--tflite", endings=(".tflite",), help="write a LiteRT file")
    add_quantize(out)
    add_output(out, "--report", endings=(".html", ".htm"), help="write a report as a web page")
    add_output(out, "--save-plan", endings=(".json",), help="write the plan")
    add_choosing(parser, without=("quantize",))
    more = parser.add_argument_group("how to fit")
    more.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        help="fit the layers one after the other (default: what is better)",
    )
    more.add_argument(
        "--refine", type=int, metavar="STEPS", help="train without labels afterwards; 200 is usual"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    from keras_alds.api import compressed_and_plan
    from keras_alds.reports import report

    plan = _checked(arguments)
    model = read_model(arguments)
    data = read_examples(arguments, arguments.calibration, model)
    small, plan = compressed_and_plan(
        model,
        arguments.cr,
        _options(arguments),
        plan=plan,
        calibration_data=data,
        sequential=arguments.sequential,
        refine=arguments.refine or False,
        stacklevel=1,
    )
    figures = _write(arguments, model, small, plan, data)
    comparison = report(model, small, figures, plan=plan)
    if (path := arguments.outputs.path("report")) is not None:
        comparison.to_html(path)
    document = {"figures": comparison.rows, "plan": None if plan is None else plan.to_dict()}
    return Answer(document, comparison.summary)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `select`. There, `quantize` is the number format of measured latencies."""
    measured = arguments.objective == "latency" and arguments.quantize == "int8"
    return {**choosing(arguments), "quantize": "int8" if measured else None}


def _checked(arguments: argparse.Namespace) -> Any:
    """The plan that the user named, if any; raises errors before the work."""
    if not arguments.outputs:
        raise ValueError(
            "Expected a file to write: -o, --tflite, --report or --save-plan. Received: none"
        )
    if (arguments.cr is None) == (arguments.plan is None):
        raise ValueError(
            "Expected either --cr, such as --cr 0.5 to remove half, or --plan. "
            f"Received: {'neither' if arguments.cr is None else 'both'}"
        )
    if arguments.quantize and not arguments.tflite and arguments.objective != "latency":
        raise ValueError(
            f"Expected --tflite FILE with --quantize. Received: --quantize {arguments.quantize} "
            "and no file to quantize"
        )
    if arguments.expand and not arguments.output:
        raise ValueError(
            "Expected -o FILE with --expand, which writes stock layers into that file. "
            "Received: no -o"
        )
    if arguments.tflite:
        check_conversion(arguments.quantize, arguments.calibration, "--calibration")
    if arguments.plan is None:
        return None
    from keras_alds.plan import CompressionPlan

    return CompressionPlan.load(arguments.plan)


def _write(
    arguments: argparse.Namespace, model: Any, small: Any, plan: Any, data: Any
) -> dict[str, tuple[Any, Any]]:
    """Writes the models and the plan; returns the sizes of the files, before and after."""
    from keras_alds.models.expansion import expand

    outputs = arguments.outputs
    if plan is None and arguments.save_plan is not None:
        raise ValueError(
            f"Expected a model to compress, to write {arguments.save_plan}. Received: one that is "
            "compressed so far already. Leave out --save-plan for a copy of it."
        )
    figures: dict[str, tuple[Any, Any]] = {}
    if (path := outputs.path("output")) is not None:
        written: Any = expand(small) if arguments.expand else small
        model.save(path)  # the user's file may hold an optimizer, which the new one does not
        before = path.stat().st_size
        written.save(path)
        figures["bytes of the file"] = before, path.stat().st_size
    if (path := outputs.path("tflite")) is not None:
        size = convert(small, path, arguments, data)
        figures[f"bytes of the {arguments.quantize or 'float32'} .tflite file"] = None, size
    if (path := outputs.path("save_plan")) is not None:
        plan.save(path)
    return figures

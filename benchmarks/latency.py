"""Predicted and measured latency of plans by parameters, MACs and latency, in one run.

Every model is compressed to the same ratio by each objective, converted, and measured with the
original in turns, on one thread. Ratios are those of the least times; "predicted" is what the plan
says. Models are saved files, or names of keras.applications (random weights: latency does not
depend on them). A `-` after the ratio means that it was not reached, and the largest one was taken.

    python benchmarks/latency.py resnet20.keras vgglike.keras
    python benchmarks/latency.py ResNet50 EfficientNetB0 --quantize int8
    python benchmarks/latency.py VGG16 --no-top
    python benchmarks/latency.py resnet20.keras --objectives latency --crs 0.05 0.1 0.2 0.3
    python benchmarks/latency.py resnet20.keras --objectives latency --crs 0.1 0.2 --schemes 0 all
        --tables 2 --repeats 5
    python benchmarks/latency.py resnet20.keras --objectives params --schemes 0 all --max-slices 1
    python benchmarks/latency.py resnet20.keras --objectives params --quantize int8
        --methods energy alds activation --data cifar10.npz --crs 0.3 0.5 0.7 --repeats 5

The method "activation" chooses with the first 512 images of `--data`. With `--repeats` every ratio
is the median of so many measurements, and the least and the largest are beside it. With `--tables`
latency is measured so many times, and a row says how much the plans of these tables differ.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras

import keras_alds
from keras_alds.litert import latency
from keras_alds.litert.latency import converted
from keras_alds.litert.timing import time_files


def load(name: str, top: bool) -> Any:
    """A saved model, or one of keras.applications with random weights."""
    if Path(name).exists():
        return keras.models.load_model(name, compile=False)
    make = getattr(keras.applications, name)
    if top:
        return make(weights=None)
    features = make(weights=None, include_top=False, input_shape=(224, 224, 3), pooling="avg")
    return keras.Model(features.input, keras.layers.Dense(1000)(features.output))


def plan_for(model: Any, cr: float, **options: Any) -> Any:
    """The plan for a ratio, or for the largest one that can be reached."""
    try:
        return keras_alds.select(model, cr, **options)
    except ValueError as error:
        found = re.search(r"expected 0 < cr <= ([0-9.]+)", str(error))
        if found is None or float(found[1]) == 0:
            raise
        return keras_alds.select(model, float(found[1]), **options)


def tables_of(model: Any, count: int, **options: Any) -> list[Any]:
    """Latency tables, each measured anew."""
    found = []
    for _ in range(count):
        latency._LAYERS.clear()
        latency._MODELS.clear()
        found.append(keras_alds.litert.measure_latency(model, verbose=0, **options))
    return found


def row(cells: list[str]) -> None:
    """Prints a row of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="saved files or names of keras.applications")
    parser.add_argument("--crs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--objectives", nargs="+", default=["params", "macs", "latency"])
    parser.add_argument("--quantize", choices=["float32", "int8"], nargs="+")
    parser.add_argument("--schemes", choices=["0", "all"], nargs="+", default=["0"])
    parser.add_argument("--methods", nargs="+", default=["energy"])
    parser.add_argument("--data", type=Path, help=".npz file, for the method activation")
    parser.add_argument("--max-slices", type=int)
    parser.add_argument("--target", help="what plans by parameters or MACs are for")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of every ratio")
    parser.add_argument("--tables", type=int, default=1, help="latency tables to choose with")
    parser.add_argument("--no-top", action="store_true", help="pool, and one dense layer")
    arguments = parser.parse_args()
    examples = None
    if "activation" in arguments.methods:
        examples = cifar10.load_data(arguments.data, keras, 1.0, None)[0][:512]
    work = [
        (objective, method, schemes, cr)
        for objective in arguments.objectives
        for method in arguments.methods
        for schemes in arguments.schemes
        for cr in arguments.crs
    ]
    print("| model | file | objective | cr | predicted | measured | error of the prediction |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models:
        model = load(name, not arguments.no_top)
        for kind in arguments.quantize or ["float32", "int8"]:
            quantize = None if kind == "float32" else kind
            start, options = time.perf_counter(), {"max_slices": arguments.max_slices}
            tables = []
            if "latency" in arguments.objectives:
                tables = tables_of(model, arguments.tables, quantize=quantize, **options)
            seconds = (time.perf_counter() - start) / max(len(tables), 1)
            original = converted(model, quantize)
            for objective, method, schemes, cr in work:
                own = {"objective": objective, "method": method, **options}
                own["schemes"] = "all" if schemes == "all" else 0
                own["target"] = None if objective == "latency" else arguments.target
                data = {"calibration_data": examples} if method == "activation" else {}
                plans = [
                    plan_for(model, cr, **more, **own, **data)
                    for more in (
                        [{"latency_table": table} for table in tables]
                        if objective == "latency"
                        else [{}]
                    )
                ]
                files = [original] + [
                    converted(keras_alds.compress(model, plan=plan, **data), quantize)
                    for plan in plans
                ]
                times = [
                    time_files([lambda f=file: f for file in files])
                    for _ in range(arguments.repeats)
                ]
                found = []
                for number, plan in enumerate(plans, 1):
                    ratios = [some[number] / some[0] for some in times]
                    measured = statistics.median(ratios)
                    found.append(measured)
                    predicted = error = "–"
                    if objective == "latency":
                        predicted = f"{1 - plan.cr:.3f}"
                        error = f"{(1 - plan.cr) / measured - 1:+.1%}"
                    asked = f"{cr:g}" if plan.cr >= cr else f"{plan.cr:.3f}-"
                    spread = f" ({min(ratios):.3f}–{max(ratios):.3f})" if len(ratios) > 1 else ""
                    end = ", all schemes" if schemes == "all" else ""
                    end += f", {method}" if len(arguments.methods) > 1 else ""
                    end += f", table {number}" if len(plans) > 1 else ""
                    label = [Path(name).stem, kind, f"{objective}{end}"]
                    row([*label, asked, predicted, f"{measured:.3f}{spread}", error])
                if len(plans) > 1:
                    end = end.replace(f"table {number}", "difference of the tables")
                    differ = f"{max(found) / min(found) - 1:.1%}"
                    row([Path(name).stem, kind, f"{objective}{end}", f"{cr:g}", "–", differ, "–"])
            before = min(some[0] for some in times) / 1e6
            noise = ", ".join(f"{table.noise:.1%}" for table in tables)
            print(
                f"<!-- {name} {kind}: table in {seconds:.1f} s, noise {noise or '–'}, "
                f"{before:.3f} ms -->"
            )


if __name__ == "__main__":
    main()

"""`keras_alds inspect`: what can be compressed in a model, how far, and what is skipped and why."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_alds.cli.answers import Answer
from keras_alds.cli.data import add_examples, read_examples
from keras_alds.cli.models import add_model, read_model
from keras_alds.cli.select_options import add_choosing, choosing
from keras_alds.core.ranks import ranks_of
from keras_alds.options import LEAST_CR, Options
from keras_alds.resources import RESOURCES
from keras_alds.tables import SkippedLayers, TextTable, decimals

if TYPE_CHECKING:
    from keras_alds.models.inventory import Inventory

USAGE = "MODEL [--calibration SOURCE] [options]"
EXAMPLES = """
keras_alds inspect model.keras
keras_alds inspect model.keras --calibration images.npz
keras_alds inspect model.keras --exclude head --target size --json
"""
#: The fractions at which the errors are shown.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: The parts of a kernel's squared singular values for which the ranks are shown.
ENERGIES = (0.9, 0.99)
# Forms that run fast on common CPUs, and all forms.
_TARGETS = ("cpu", "size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model(parser)
    add_examples(parser, "--calibration", "unlabelled examples, to measure errors of outputs")
    add_choosing(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Runs the command."""
    from keras_alds.models.calibration import Calibration
    from keras_alds.models.recompose import inspected, recomposed, to_recompose
    from keras_alds.reports import sizes

    model = read_model(arguments)
    options = choosing(arguments)
    data = read_examples(arguments, arguments.calibration, model)
    checked = Options.checked(LEAST_CR, options, has_data=data is not None)
    counts = sizes(model)
    # An input without a size of its own, such as a text, has no multiply–accumulates.
    resources = ("params",) if counts["MACs"] is None else ("params", "macs")
    inventory = inspected(model, checked)
    compressed = to_recompose(inventory, checked)
    with recomposed(inventory, compressed) as dense:
        params = dense.params
        layers = list(_layers(dense, checked))
        reachable = _reachable(dense, options, resources, data is not None)
        # Of the dense form, also for a compressed model.
        stats = None if data is None else Calibration.of(dense, data).collected(dense)
    most = reachable.get(options["objective"], {})
    curve = list(_curve(model, options, stats, max(most.values(), default=1.0)))
    document = {
        "model": model.name,
        "sizes": counts,
        "compressed": bool(compressed),
        "dense_params": params,
        "layers": layers,
        "reachable": reachable,
        "curve": curve,
    }
    return Answer(document, lambda: _show(document, options["objective"]))


def _layers(inventory: Inventory, options: Options) -> Iterator[dict[str, Any]]:
    """A row for every layer with weights."""
    from keras_alds.methods import get_method
    from keras_alds.models.choices import singular_values

    schemes = options.schemes_of(get_method(options.method))
    records = [record.folded(schemes) for record in inventory.records]
    candidates = [record for record in records if record.skipped is None]
    spectra = dict(zip((r.path for r in candidates), singular_values(candidates), strict=True))
    for record in records:
        row: dict[str, Any] = {
            "layer": record.path,
            "kind": record.class_name,
            "kernel": record.kernel_shape,
            "params": record.params,
            "skipped": None if record.skipped is None else record.skipped.code.value,
            "reason": None if record.skipped is None else record.skipped.detail,
        }
        if record.path in spectra:
            values = spectra[record.path]
            row["rank"] = len(values)
            row["rank_of_energy"] = {part: ranks_of(values, part).energy for part in ENERGIES}
        yield row


def _reachable(
    inventory: Inventory, options: Mapping[str, Any], resources: Sequence[str], has_data: bool
) -> dict[str, dict[str, float]]:
    """The greatest fractions that can be removed, by resource and target."""
    from keras_alds.choosing import checked_options, selection_of
    from keras_alds.models.selection import UnreachableError

    found: dict[str, dict[str, float]] = {}
    for objective in resources:
        found[objective] = {}
        for target in _TARGETS if options["target"] is None else (options["target"],):
            given = {**options, "target": target, "objective": objective}
            given |= {"latency_table": None, "quantize": None}
            checked = checked_options(LEAST_CR, given, has_data=has_data, caller="select")
            try:
                selection = selection_of(inventory, checked, verbose=0)
                found[objective][target] = max(selection.greatest(selection.resources[0]), 0.0)
            except UnreachableError:
                found[objective][target] = 0.0
    return found


def _curve(
    model: Any, options: Mapping[str, Any], stats: Any, most: float
) -> Iterator[dict[str, Any]]:
    """Sizes and errors of plans of several ratios. A small model has one plan for some of them."""
    from keras_alds._backend.quiet import ignored_warnings
    from keras_alds.api import select
    from keras_alds.models.selection import UnreachableError

    reached = 0.0
    for ratio in (ratio for ratio in RATIOS if ratio <= most):
        if ratio <= reached:
            continue
        try:
            with ignored_warnings():  # what users are told when they compress
                plan = select(model, ratio, calibration_data=stats, **options)
        except UnreachableError:
            return
        reached = plan.cr
        errors = [choice.error for choice in plan.factorized]
        divergences = [choice.divergence or 0.0 for choice in plan.factorized]
        yield {
            "cr": plan.cr,
            "layers": len(errors),
            "params": plan.params_after,
            "mean_error": float(np.mean(errors)),
            "max_error": plan.max_error,
            "worst": max(plan.factorized, key=lambda choice: choice.error).layer,
            "divergence": None if stats is None else sum(divergences),
        }


def _show(document: Mapping[str, Any], objective: str) -> None:
    """Prints the tables."""
    params = document["dense_params"]
    rows = [
        [
            f"{row['layer']} ({row['kind']})",
            "×".join(map(str, row["kernel"] or ())) or "–",
            f"{row['params']:,}",
            f"{row['params'] / params:.1%}",
            *_ranks(row),
        ]
        for row in document["layers"]
        if row["skipped"] != "no_kernel"
    ]
    skipped = SkippedLayers.by_reason(
        (row["layer"], row["params"], row["skipped"], row["reason"])
        for row in document["layers"]
        if row["skipped"] not in (None, "no_kernel")
    )
    free = [row for row in document["layers"] if row["skipped"] is None]
    share = sum(row["params"] for row in free) / params
    lines = [
        f"{len(free)} of {len(document['layers'])} layers with weights can be compressed. They "
        f"hold {share:.1%} of {params:,} parameters.",
        "The ranks keep 90 % and 99 % of a kernel's squared singular values.",
        *map(str, skipped),
    ]
    columns = ["Layer (type)", "Kernel", "Params", "Share", "Rank for 90 %", "99 %", "all"]
    if document["compressed"]:
        lines.insert(0, "The model is compressed. All figures are of its dense form.")
    TextTable(f"Layers of {document['model']!r}", columns, rows, lines).print()
    words = {"cpu": "in forms that run fast on common CPUs", "size": "in all forms"}
    for name, by_target in document["reachable"].items():
        parts = ", ".join(
            f"{value:.1%} {words.get(target, f'for {target}')}"
            for target, value in by_target.items()
        )
        print(f"\nThe most that can be removed of {RESOURCES[name].counted}: {parts}.")
    _show_curve(document["curve"], objective)


def _ranks(row: Mapping[str, Any]) -> list[str]:
    if row["skipped"] is not None:
        return [f"skipped ({row['skipped']})", "", ""]
    return [*(str(rank) for rank in row["rank_of_energy"].values()), str(row["rank"])]


def _show_curve(curve: list[dict[str, Any]], objective: str) -> None:
    if not curve:
        return
    measured = curve[0]["divergence"] is not None
    columns = [f"Removed ({objective})", "Params", "Layers", "Mean error", "Largest error", "of"]
    rows = [
        [
            f"{point['cr']:.1%}",
            f"{point['params']:,}",
            str(point["layers"]),
            decimals(point["mean_error"]),
            decimals(point["max_error"]),
            point["worst"],
            *([decimals(point["divergence"])] if measured else []),
        ]
        for point in curve
    ]
    lines = ["Errors are those of single layers; only examples tell what they do to the accuracy."]
    if measured:
        columns.append("Output")
        lines = ["Output: what all layers together do to the model's outputs, estimated (a sum)"]
    print()
    TextTable("Size and error", columns, rows, lines).print()

"""Chooses between whole plans by the outputs that they give on held-out examples.

The errors of single layers are comparable only roughly: through curves that were measured with all
other layers exact. So several plans are made, with the errors weighed in different ways. Each one
is computed on held-out examples, and the one nearest to the original's outputs is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds.core.calibration.curves import Curve
from keras_alds.core.choices import ChoiceTable
from keras_alds.core.parallel import threads
from keras_alds.core.spectra import Float64
from keras_alds.models.curves import approximation
from keras_alds.models.inventory import LayerRecord
from keras_alds.models.probes import Kernels, Prober

#: How errors are weighed: the power p in d^p ε^(1 − p) with the divergence d that a layer's curve
#: gives for its error ε. This draws the weights together. (A power of d alone grows slower than ε:
#: the sum is then least where a few layers have all the error.)
WEIGHINGS: Mapping[str, float] = {
    "outputs": 1.0,
    "outputs^0.75": 0.75,
    "outputs^0.5": 0.5,
    "equal": 0.0,
}
EQUAL = "equal"
#: The name of the trial whose choices and factors use no data.
WITHOUT_DATA = "no data"


def weighed(
    tables: Sequence[ChoiceTable], records: Sequence[LayerRecord], weighing: str
) -> list[ChoiceTable]:
    """The tables with weighed errors. Layers without a curve get that of a typical layer."""
    power = WEIGHINGS[weighing]
    if not power:
        return list(tables)
    curves = [record.curve for record in records]
    typical = _typical([curve for curve in curves if curve is not None])
    found = []
    for table, curve in zip(tables, curves, strict=True):
        measured = curve or typical
        error = weighed_errors(table.error, measured, power)
        found.append(dataclasses.replace(table, error=error))
    return found


def weighed_errors(errors: Float64, curve: Curve, power: float) -> Float64:
    """Errors ε of a layer, weighted by their effect d on the outputs: d^p · ε^(1 − p)."""
    return curve(errors) ** power * errors ** (1 - power)


def _typical(curves: Sequence[Curve]) -> Curve:
    """The curve of a layer whose output errors have the median effect, in proportion."""
    error = 0.1
    effects = [float(curve(np.array(error))) for curve in curves]
    return Curve((error,), (float(np.median(effects or [error])),))


def approximations(records: Sequence[LayerRecord], choices: Sequence[Any]) -> Kernels:
    """The kernels of some choices by layer, fitted without the held-out inputs."""
    pairs = [pair for pair in zip(records, choices, strict=True) if pair[1].slices]
    with threads() as pool:
        found = pool.map(lambda pair: approximation(*pair), pairs)
        return {record.layer: values for (record, _), values in zip(pairs, found, strict=True)}


def judge(model: Any, records: Sequence[LayerRecord], batches: Sequence[Any]) -> Prober:
    """Computes a model on held-out examples with the kernels of whole plans."""
    return Prober(model, [record.layer for record in records], batches, keep=False)

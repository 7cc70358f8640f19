"""Printed tables: of plans, and of models before and after."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

import keras_alds
from keras_alds import compress, select


def test_the_report_and_the_summary(small, capsys):
    plan = select(small, 0.4)
    lines = []
    plan.summary(print_fn=lines.append, show_skipped=True)
    text = "\n".join(lines)
    for choice in plan.choices:
        if choice.kernel_shape:
            assert f"{choice.layer} ({choice.kind})" in text
    assert "removed)" in text
    assert "Without a kernel to factorize: 1 layer (BatchNormalization)" in text
    noted = dataclasses.replace(plan.choices[0], note="only diagonal blocks were kept")
    noted_plan = dataclasses.replace(plan, choices=(noted, *plan.choices[1:]))
    noted_plan.summary(print_fn=lines.append)
    assert f"{noted.layer}: only diagonal blocks were kept" in lines[-1]
    report = keras_alds.report(small, compress(small, 0.4), {"accuracy": (0.9, 0.8)})
    assert report.rows["parameters"] == (small.count_params(), plan.params_after)
    assert report.rows["bytes of weights"][0] == 4 * small.count_params()
    report.summary()
    printed = capsys.readouterr().out
    assert "| accuracy" in printed
    assert "0.889" in printed


def test_swapped_models_are_told_from_others(small):
    compressed = compress(small, 0.4)
    with pytest.warns(UserWarning, match=r"Expected the original model first.*is compressed"):
        keras_alds.report(compressed, small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_alds.report(small, compressed)
        keras_alds.report(compressed, compressed)
        keras_alds.report(compressed, keras_alds.expand(compressed))


def test_models_without_weights(keras_module):
    model = keras_module.Sequential([keras_module.Input((4,)), keras_module.layers.ReLU()])
    rows = keras_alds.report(model, model).rows
    assert rows["parameters"] == rows["cr (parameters removed)"] == (0, 0)


def test_a_comparison_prints_shortly(small):
    found = keras_alds.report(small, compress(small, 0.4), {"accuracy": (0.9, 0.8)})
    assert len(repr(found)) < 250
    assert f"parameters {small.count_params():,} → " in repr(found)
    assert "accuracy 0.9000 → 0.8000" in repr(found)

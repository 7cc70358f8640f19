"""Real KerasHub models: compress, save, load in a fresh process, train on, convert."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_alds

pytest.importorskip("keras_hub")

import hub

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def saved(
    parameters_of: Callable[[str], list[dict[str, str]]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with compressed models that a fresh process has run, and their outputs here."""
    folder = tmp_path_factory.mktemp("hub")
    outputs = {}
    for name in [life["name"] for life in parameters_of("test_a_life")]:
        keras.utils.set_random_seed(0)
        model = hub.MODELS[name]()
        x = hub.examples(model)
        small = keras_alds.compress(model, 0.3, calibration_data=x)
        assert small.count_params() <= 0.7 * model.count_params()
        outputs[name] = np.asarray(small(x, training=False))
        small.save(folder / f"{name}.keras")
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hub.py"), str(folder)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    return folder, outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in ("resnet", "segmenter") else [])
        for name in hub.MODELS
    ],
)
def test_a_life(name: str, saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, outputs = saved
    found = np.load(folder / f"{name}.out.npy")
    np.testing.assert_allclose(found, outputs[name], atol=1e-5)
    model = keras.models.load_model(folder / f"{name}.keras")
    x = hub.examples(model)
    model.compile("adam", keras.losses.MeanSquaredError(), metrics=["mae"])
    model.fit(x, np.zeros(outputs[name].shape), verbose=0)
    one: Any = {k: v[:1] for k, v in x.items()} if isinstance(x, dict) else x[:1]
    expected = np.asarray(model(one, training=False))
    if isinstance(x, dict):  # a file takes one length of texts
        inputs = {k: keras.Input(v.shape[1:], dtype=v.dtype, name=k) for k, v in x.items()}
        model = keras.Model(inputs, model(inputs))
    runner = keras_alds.litert.runs.Runner(keras_alds.litert.convert(model, verbose=0))
    np.testing.assert_allclose(np.ravel(runner.predict(one)), np.ravel(expected), atol=1e-3)

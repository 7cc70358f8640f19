"""The folder `research` can be removed whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras_alds

CODE = """
import sys

# An editable installation would find the folder in the original package.
sys.meta_path = [f for f in sys.meta_path if "editable" not in f.__module__]
import keras
import keras_alds
from keras_alds.methods import METHODS

print(keras_alds.__file__)
keras.utils.set_random_seed(0)
layers = [keras.layers.Input((8, 8, 4)), keras.layers.Conv2D(16, 3), keras.layers.Flatten()]
model = keras.Sequential([*layers, keras.layers.Dense(10)])
x = keras.random.normal((16, 8, 8, 4))
for name, method in METHODS.items():
    if method.synthetic:
        continue  # the model has no BatchNormalization
    data = x if method.needs_data else None
    small = keras_alds.compress(model, 0.4, method=name, calibration_data=data)
    print(name, small.count_params() <= 0.6 * model.count_params())
try:
    keras_alds.select(model, 0.4, method="svd")
except ValueError as error:
    print(error)
"""


def test_the_rest_works_without_it(tmp_path: Path):
    package = Path(keras_alds.__file__).parent
    copy = tmp_path / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("research", "__pycache__"))
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in run.stdout.splitlines() if line] == [
        str(copy / "__init__.py"),
        *(f"{name} True" for name in ("alds", "energy", "activation")),
        "Expected a method, one of ['activation', 'alds', 'energy', 'synthetic']. "
        "Received: method='svd'",
    ]

"""`import keras_alds` loads nothing heavy, and saved models load whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import zoo

import keras_alds

# All in one process, in the order of what it has loaded.
CODE = """
import sys

def check_loaded(*names):
    assert set(names) == {"keras", "tensorflow", "tf_keras"} & set(sys.modules), sorted(sys.modules)

import keras_alds.core, keras_alds.core.calibration
from keras_alds.core import choices, costs, errors, methods, parallel, slicing, solvers, spectra
check_loaded()
import keras_alds
assert {"compress", "litert"} <= set(dir(keras_alds))
check_loaded()

import keras
import numpy as np
model = keras.saving.load_model("keras.keras")
np.testing.assert_allclose(model.predict(np.load("x.npy"), verbose=0), np.load("keras.npy"), 1e-5)
if sys.argv[1:]:
    import tf_keras
    model = tf_keras.models.load_model("tf_keras.keras")
    found = model.predict(np.load("x.npy"), verbose=0)
    np.testing.assert_allclose(found, np.load("tf_keras.npy"), 1e-5)
print(keras_alds.__version__)
"""


# With this variable, TensorFlow imports tf_keras in the middle of its own import.
LEGACY = "TF_USE_LEGACY_KERAS"
LEGACY_CODE = """
import keras_alds
import numpy as np
import tensorflow as tf
model = tf.keras.models.load_model("tf_keras.keras")
np.testing.assert_allclose(model.predict(np.load("x.npy")), np.load("tf_keras.npy"), 1e-5)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a compressed model of each Keras, and of its outputs."""
    folder = tmp_path_factory.mktemp("saved")
    x = zoo.images(4)[0]
    np.save(folder / "x.npy", x)
    for module in zoo.KERASES:
        small = keras_alds.compress(zoo.functional(module), 0.4)
        small.save(folder / f"{module.__name__}.keras")
        np.save(folder / f"{module.__name__}.npy", small.predict(x, verbose=0))
    return folder


def run(code, folder, **variables):
    # TF-MOT sets the variable for good.
    environment = {name: value for name, value in os.environ.items() if name != LEGACY}
    arguments = [sys.executable, "-c", code, *(module.__name__ for module in zoo.KERASES[1:])]
    found = subprocess.run(
        arguments, cwd=folder, env=environment | variables, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_imports_little_and_saved_models_load(saved):
    assert run(CODE, saved).split()[-1] == keras_alds.__version__


def test_modules_inside_may_be_imported_first(saved):
    run(
        "import keras_alds.kinds.dense\nimport keras\nkeras.models.load_model('keras.keras')",
        saved,
    )


@pytest.mark.skipif(len(zoo.KERASES) == 1, reason="tf_keras is not installed")
@pytest.mark.parametrize("code", [CODE, LEGACY_CODE], ids=["keras first", "tensorflow first"])
def test_saved_models_load_where_tensorflow_imports_tf_keras(saved, code):
    run(code, saved, **{LEGACY: "1"})


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="has no attribute 'decompress'"):
        _ = keras_alds.decompress

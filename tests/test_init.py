"""`import keras_alds` loads nothing heavy, and saved models load whatever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


# In a process of its own: what other tests did to Keras is not saved with the models.
SAVE = """
import sys
import numpy as np
sys.path.append(sys.argv[1])
import keras_alds
import zoo

x = zoo.images(4)[0]
np.save("x.npy", x)
for module in zoo.KERASES:
    small = keras_alds.compress(zoo.functional(module), 0.4)
    small.save(f"{module.__name__}.keras")
    np.save(f"{module.__name__}.npy", small.predict(x, verbose=0))
"""


def test_imports_little_and_saved_models_load(tmp_path):
    tests = str(Path(zoo.__file__).parent)
    subprocess.run([sys.executable, "-c", SAVE, tests], cwd=tmp_path, check=True)
    arguments = [sys.executable, "-c", CODE, *(m.__name__ for m in zoo.KERASES[1:])]
    run = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == keras_alds.__version__


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="has no attribute 'decompress'"):
        _ = keras_alds.decompress

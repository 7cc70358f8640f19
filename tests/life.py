"""Runs saved models in a fresh process: `python life.py FOLDER` writes `outputs.npz` there."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import boxes  # noqa: F401
import keras
import numpy as np
import tensorflow as tf
import tf_keras

import keras_alds  # noqa: F401
from keras_alds.litert.runs import Runner


def reader(path: Path) -> Callable[[Any], Any]:
    """A function from inputs to outputs, for a file of any kind."""
    if path.suffix == ".tflite":
        return Runner(path).predict
    if path.name.endswith("_as_export"):
        loaded = tf.saved_model.load(str(path))
        return lambda inputs: loaded.serve(inputs)
    K = tf_keras if path.name.startswith("tf_keras") else keras
    model = K.models.load_model(path)
    return lambda inputs: model(inputs, training=False)


def flat(outputs: Any) -> np.ndarray:
    """All outputs in one array."""
    return np.concatenate([np.ravel(np.asarray(o)) for o in tf.nest.flatten(outputs)])


def main(folder: Path) -> None:
    """Runs every file on the inputs of its model, `NAME.npz` for `NAME.keras`."""
    found, failed = {}, {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".npz":
            continue
        data = np.load(folder / f"{path.name.split('.')[0].split('_as_')[0]}.npz")
        inputs = [data[key] for key in sorted(data)]
        try:
            found[path.name] = flat(reader(path)(inputs if len(inputs) > 1 else inputs[0]))
        except Exception:
            failed[path.name] = traceback.format_exc()[-900:]
    np.savez(folder / "outputs.npz", failed=json.dumps(failed), **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

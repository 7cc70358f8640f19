"""Training in several replicas: `python replicas.py replicas` or `worker INDEX PORT,PORT`.

Prints what it found as JSON in its last line. Devices and workers are set before TensorFlow starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if sys.argv[1] == "worker":
    hosts = [f"localhost:{port}" for port in sys.argv[3].split(",")]
    task = {"type": "worker", "index": int(sys.argv[2])}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": hosts}, "task": task})

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import keras_alds

X = np.random.default_rng(0).normal(size=(64, 24)).astype("float32")


def compiled(K: Any, strategy: Any = None, *, normalized: bool = False) -> Any:
    """A small model under a strategy."""
    K.utils.set_random_seed(0)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        middle = [K.layers.BatchNormalization()] if normalized else []
        layers = [K.layers.Dense(32, activation="relu"), *middle, K.layers.Dense(32)]
        model = K.Sequential([K.Input((24,)), *layers, K.layers.Dense(3)])
        model.compile("adam", "mse")
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 2) -> list[float]:
    """The losses of a training."""
    y = X[:, :3]
    run = model.fit(
        X, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks]
    )
    return run.history["loss"]


def compress(**options: Any) -> Any:
    """A callback that compresses before the second epoch."""
    return keras_alds.ALDSCompress(**{"cr": 0.4, "at_epoch": 1, "verbose": 0, **options})


def error_of(model: Any, *callbacks: Any) -> str:
    """The text of the error that `fit` raises."""
    try:
        fit(model, *callbacks)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "none"


# -- One process, two replicas ----------------------------------------------------------------


def replicas() -> dict[str, Any]:
    """What two replicas in this process do, and then parameter servers."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    found: dict[str, Any] = {}
    # Both Kerases draw the same weights.
    found["one"] = fit(compiled(keras), compress(calibration_data=X))
    for K in (keras, tf_keras):
        found[K.__name__] = of = {}
        strategies = [tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) for _ in range(2)]
        if K is tf_keras:  # the second strategy uses the keys of the first one again
            fit(compiled(K, strategies[0]))
        model = compiled(K, strategies[1])
        of["two"] = fit(model, compress(calibration_data=X))
        layer = next(layer for layer in model.layers if hasattr(layer, "encoder"))
        encoder = layer.encoder.value if K is keras else layer.encoder
        of["copies"] = [value.numpy().tolist() for value in encoder.values]
        refined = compress(calibration_data=X, refine=1)
        of["refine"] = error_of(model, refined)
    normalized = compiled(tf_keras, strategies[1], normalized=True)
    found["normalized"] = fit(normalized, compress(calibration_data=X))
    found["servers"] = servers()
    return found


def servers() -> list[float]:
    """The losses of a training with a parameter server."""
    ports = [free_port() for _ in range(2)]
    tasks = {"worker": [f"localhost:{ports[0]}"], "ps": [f"localhost:{ports[1]}"]}
    cluster = tf.train.ClusterSpec(tasks)
    started = [tf.distribute.Server(cluster, job_name=job, task_index=0) for job in tasks]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    model = compiled(tf_keras, tf.distribute.ParameterServerStrategy(resolver))
    data = tf_keras.utils.experimental.DatasetCreator(
        lambda _: tf.data.Dataset.from_tensor_slices((X, X[:, :3])).repeat().batch(16)
    )
    options = {"epochs": 3, "steps_per_epoch": 8, "verbose": 0}
    run = model.fit(data, callbacks=[compress()], **options)
    assert len(started) == 2  # alive until here
    return run.history["loss"]


# -- One of two processes --------------------------------------------------------------------


class Change(tf_keras.callbacks.Callback):
    """Adds one bit to a weight of this worker before epoch 1."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            kernel = self.model.weights[0].numpy().copy()
            kernel[0, 0] = np.nextafter(kernel[0, 0], np.float32(9))
            self.model.weights[0].assign(kernel)


def worker(index: int) -> dict[str, Any]:
    """What a worker does that is given other calibration data, another ratio, another bit."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    model = compiled(tf_keras, strategy, normalized=True)
    compression = compress(calibration_data=X[:32] if index == 0 else -X[16:])
    found: dict[str, Any] = {"losses": fit(model, compression)}
    state = [v.numpy().tobytes() for v in [*model.variables, *model.optimizer.variables]]
    found["state"] = hashlib.sha256(b"".join(state)).hexdigest()
    found["plan"] = compression.plan.to_dict()
    found["step"] = int(model.optimizer.iterations.numpy())
    found["ratio"] = error_of(model, compress(cr=(0.5, 0.6)[index]))
    data = X * np.nan if index == 0 else X
    found["chief"] = error_of(model, compress(cr=0.5, at_epoch=0, calibration_data=iter([data])))
    changes = [Change()] if index == 1 else []
    found["bit"] = error_of(model, *changes, compress(cr=0.5))
    return found


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    result = replicas() if sys.argv[1] == "replicas" else worker(int(sys.argv[2]))
    print(json.dumps(result), flush=True)
    os._exit(0)  # servers have no end of their own

"""What ends up on the phone: bytes, latency and accuracy of one network in several forms.

    python benchmarks/mobile.py --model resnet20.keras --data cifar10.npz --epochs 3

prints a Markdown table. The forms: the original; compressed by parameters, by multiply–accumulates
and by measured latency, with calibration data and under `target="litert"`; and, with TF-MOT, pruned
to the sparsity at which the gzipped float file is as large as that of the model compressed by
parameters. All but the first have the same further training, and the original has it too.

Every form is converted to float32 and, after training, to int8. Latencies are medians of single
invocations on one thread, taken turn by turn with the original's file. Without `--data` only bytes
and latency are shown.
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras
import numpy as np

import keras_alds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained Keras 3 model, .keras or .h5")
    add("--data", type=Path, help=".npz file with x_train, y_train, x_test and y_test")
    add("--cr", type=float, default=0.5, help="fraction to remove (default: 0.5)")
    add("--epochs", type=int, default=3, help="epochs of further training (default: 3)")
    add("--train", type=int, default=20000, help="training images (default: 20000)")
    add("--test", type=int, default=5000, help="test images (default: 5000)")
    add("--learning-rate", type=float, default=0.005)
    add("--forms", nargs="+", help="only forms that begin so, such as original 'by params' pruned")
    add("--rounds", type=int, default=60, help="rounds of timing (default: 60)")
    return parser.parse_args()


class Training:
    """Data, and the further training that every form gets alike."""

    def __init__(self, path: Path, model: Any, arguments: argparse.Namespace) -> None:
        x_train, y_train, self.x_test, self.y_test = cifar10.load_data(path, keras, 1.0, None)
        self.x, self.y = x_train[: arguments.train], y_train[: arguments.train]
        self.x_test, self.y_test = self.x_test[: arguments.test], self.y_test[: arguments.test]
        self.calibration = self.x[:512]
        self.from_logits = cifar10.gives_logits(model, self.x_test)
        self.epochs, self.learning_rate = arguments.epochs, arguments.learning_rate
        self.steps = self.epochs * -(-len(self.x) // 128)

    def fit(self, model: Any, callbacks: Any = ()) -> None:
        """Trains a model further, the same way for every form."""
        if not self.epochs:
            return
        backend = sys.modules[type(model).__module__.split(".")[0]]  # keras or tf_keras
        backend.utils.set_random_seed(0)
        schedule = backend.optimizers.schedules.CosineDecay(self.learning_rate, self.steps)
        model.compile(
            backend.optimizers.SGD(schedule, momentum=0.9, nesterov=True),
            backend.losses.SparseCategoricalCrossentropy(from_logits=self.from_logits),
        )
        model.fit(
            cifar10.batches(self.x, self.y, 128, augment=True),
            epochs=self.epochs,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
        )


def gzipped(content: bytes) -> int:
    return len(gzip.compress(content, mtime=0))


def zeroed(model: Any, sparsity: float) -> Any:
    """The model with the smallest weights of every kernel set to zero."""
    copy = keras_alds.to_tf_keras(model)
    for variable in copy.trainable_weights:
        if len(variable.shape) > 1:
            values = abs(variable.numpy())
            variable.assign(np.where(values <= np.quantile(values, sparsity), 0, variable))
    return copy


def pruned(model: Any, training: Training | None, gzip_size: int) -> tuple[Any, float]:
    """The model pruned by TF-MOT until its gzipped float file is as small as wanted."""
    import tensorflow_model_optimization as tfmot

    pruning = tfmot.sparsity.keras
    low, high = 0.0, 0.99
    while high - low > 0.005:
        middle = (low + high) / 2
        size = gzipped(keras_alds.litert.convert(zeroed(model, middle), verbose=0))
        low, high = (low, middle) if size <= gzip_size else (middle, high)
    if training is None or not training.epochs:
        return zeroed(model, high), high
    steps = max(training.steps // 20 * 10, 10)
    schedule = pruning.PolynomialDecay(0.0, high, begin_step=0, end_step=steps, frequency=10)
    wrapped = keras_alds.tfmot.prune_low_magnitude(
        keras_alds.to_tf_keras(model), pruning_schedule=schedule
    )
    training.fit(wrapped, [pruning.UpdatePruningStep()])
    return pruning.strip_pruning(wrapped), high


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    original = cifar10.load_model(arguments.model, keras)
    training = Training(arguments.data, original, arguments) if arguments.data else None
    random = np.random.default_rng(0)
    examples = (
        training.calibration
        if training
        else random.uniform(-1, 1, (64, *original.input_shape[1:])).astype("float32")
    )

    def copied() -> Any:
        copy = keras.models.clone_model(original)
        copy.set_weights(original.get_weights())
        return copy

    def trained(model: Any) -> Any:
        if training:
            training.fit(model)
        return model

    def reachable(cr: float, options: dict[str, Any]) -> bool:
        try:
            keras_alds.select(original, cr, method="energy", **options)
        except ValueError as error:
            print(error, file=sys.stderr)
            if cr < 0.01:
                raise
            return False
        return True

    def compressed(objective: str, quantize: str | None = None) -> Callable[[], tuple[Any, str]]:
        def make() -> tuple[Any, str]:
            options: dict[str, Any] = {"objective": objective, "target": "litert"}
            if objective == "latency":
                options["quantize"] = quantize
            cr = arguments.cr
            while objective == "latency" and not reachable(cr, options):
                cr /= 2
            small = keras_alds.compress(original, cr, calibration_data=examples, **options)
            return trained(small), f"{objective} {cr:g}"

        return make

    forms: dict[str, Callable[[], tuple[Any, str]]] = {
        "original": lambda: (trained(copied()), ""),
        "by params": compressed("params"),
        "by macs": compressed("macs"),
        "by latency, float table": compressed("latency"),
        "by latency, int8 table": compressed("latency", "int8"),
    }
    rows: list[list[str]] = []
    baseline: dict[str | None, bytes] = {}
    gzip_size = 0

    def measure(name: str, model: Any, asked: str) -> None:
        nonlocal gzip_size
        removed = 1 - model.count_params() / original.count_params()
        row = [name, asked, f"{removed:.3f}"]
        for quantize in (None, "int8"):
            content = keras_alds.litert.convert(
                model,
                quantize=quantize,
                representative_data=examples if quantize else None,
                verbose=0,
            )
            found = keras_alds.litert.compare(
                baseline.setdefault(quantize, content),
                content,
                (training.x_test, training.y_test) if training else None,
                runs=arguments.rounds,
                verbose=0,
            )
            if name == "by params" and quantize is None:
                gzip_size = found.compressed.gzip_size
            row += [
                f"{found.compressed.size / 1e3:.0f}",
                f"{found.compressed.gzip_size / 1e3:.0f}",
                f"{1e3 * found.compressed.latency.median:.2f}",
                f"{found.latency_ratio:.2f}",
                *(f"{100 * value:.1f}" for value in found.compressed.metrics.values()),
            ]
        rows.append(row)
        print(row, file=sys.stderr)

    wanted = tuple(arguments.forms or ("",))
    for name, make in forms.items():
        if not name.startswith(wanted):
            continue
        try:
            model, asked = make()
        except ValueError as error:  # a fraction that is not reachable
            print(f"{name}: {error}", file=sys.stderr)
            continue
        measure(name, model, asked)
    if gzip_size and "pruned".startswith(wanted):
        model, sparsity = pruned(original, training, gzip_size)
        measure("pruned (TF-MOT)", model, f"sparsity {sparsity:.2f}")

    columns = ["kB", "kB gzip", "ms", "ratio", *(["top-1"] if training else [])]
    head = [
        "form",
        "asked for",
        "parameters removed",
        *columns,
        *(f"int8: {column}" for column in columns),
    ]
    print(f"\n{arguments.model.name}\n")
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cells) + " |")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

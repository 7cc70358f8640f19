"""Train, compress, retrain, expand, train for int8, convert: size and accuracy of the int8 files.

Without `--model` the net and the data are those of `keras_alds demo`; with it a trained CIFAR-10
model and an .npz file, as for examples/cifar10.py.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --model resnet8.h5 --keras tf_keras --data cifar10.npz \
        --epochs 20 --learning-rate 0.02 --aware-epochs 3

The original is quantized after training, and by quantization-aware training with the same data,
epochs and learning rate as the compressed model, so that both had the same chance.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import numpy as np
import tensorflow as tf

import keras_alds
from keras_alds.cli import demo
from keras_alds.litert.runs import Runner


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, help="trained CIFAR-10 model (default: the digits net is trained)")
    add("--keras", choices=("keras", "tf_keras"), default="keras", help="what loads the model")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--cr", type=float, default=0.5)
    add("--max-slices", type=int, nargs="+", default=[1, 4, 0], help="0: no limit")
    add("--calibration", type=int, default=512, help="unlabelled images; 0: method 'alds'")
    add("--epochs", type=int, default=30, help="of training with the compression; 0: none")
    add("--at-epoch", type=int, help="default: 0 with --model, else 18")
    add("--learning-rate", type=float, default=2e-3)
    add("--distil", action="store_true", help="targets: mean of labels and original's outputs")
    add("--aware-epochs", type=int, default=5, help="epochs of quantization-aware training")
    add("--aware-learning-rate", type=float, default=5e-4)
    return parser.parse_args()


class Task:
    """A net, its data and how it is trained."""

    def __init__(self, arguments: argparse.Namespace, keras: Any) -> None:
        self.arguments, self.keras = arguments, keras
        self.images = arguments.model is not None
        if self.images:
            data = cifar10.load_data(arguments.data, keras, 1.0, None)
        else:
            data = demo.load_data()
        self.x_train, self.y_train, self.x_test, self.y_test = data

    @property
    def at_epoch(self) -> int:
        """Epochs before the compression."""
        given = self.arguments.at_epoch
        return given if given is not None else (0 if self.images else 18)

    def fresh(self) -> Any:
        """The net before `fit`: the loaded one, or new weights that are always the same."""
        self.keras.utils.set_random_seed(0)
        if self.images:
            return cifar10.load_model(self.arguments.model, self.keras)
        return demo.build_model(self.keras)

    def compile(self, model: Any, keras: Any, rate: float, epochs: int) -> Any:
        """Compiles `model` with a cosine from `rate` to 0, and returns it."""
        logits = not self.images or cifar10.gives_logits(model, self.x_test)
        batch = 128 if self.images else 64
        schedule = keras.optimizers.schedules.CosineDecay(
            rate, max(epochs * -(-len(self.x_train) // batch), 1)
        )
        optimizer = (
            keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
            if self.images
            else keras.optimizers.Adam(schedule)
        )
        model.compile(optimizer, self.loss(keras, logits), metrics=["accuracy"])
        return model

    def loss(self, keras: Any, logits: bool) -> Any:
        """The cross-entropy for what `batches` gives."""
        if self.arguments.distil:
            return keras.losses.CategoricalCrossentropy(from_logits=logits)
        return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)

    def batches(self) -> Any:
        """The training data, shuffled; CIFAR-10 with crops and flips."""
        batch = 128 if self.images else 64
        data = cifar10.batches(self.x_train, self.y_train, batch, augment=self.images)
        if not self.arguments.distil:
            return data
        teacher = self.fresh()
        logits = cifar10.gives_logits(teacher, self.x_test)

        def soften(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            outputs = teacher(images, training=False)
            outputs = tf.nn.softmax(outputs) if logits else outputs
            return images, (tf.one_hot(labels, 10) + outputs) / 2

        return data.map(soften, num_parallel_calls=1).prefetch(tf.data.AUTOTUNE)

    def trained(self, cr: float | None, max_slices: int) -> tuple[Any, Any]:
        """The net after `fit`, compressed in it if `cr` is given, and the plan."""
        arguments = self.arguments
        model = self.compile(self.fresh(), self.keras, arguments.learning_rate, arguments.epochs)
        if cr is None:
            if not self.images:  # the CIFAR-10 nets come trained
                model.fit(self.batches(), epochs=arguments.epochs, shuffle=False, verbose=0)
            return model, None
        calibration = self.x_train[: arguments.calibration] if arguments.calibration else None
        options = {
            "method": "alds" if calibration is None else None,
            "calibration_data": calibration,
            "max_slices": max_slices or None,
        }
        epochs = arguments.epochs
        if not epochs:
            plan = keras_alds.select(model, cr, **options)
            return keras_alds.compress(model, plan=plan, calibration_data=calibration), plan
        alds = keras_alds.ALDSCompress(cr, at_epoch=self.at_epoch, verbose=0, **options)
        model.fit(self.batches(), epochs=epochs, shuffle=False, callbacks=[alds], verbose=0)
        return model, alds.plan

    def aware(self, model: Any) -> bytes | None:
        """The int8 file after quantization-aware training; None for no epochs of it."""
        if not self.arguments.aware_epochs:
            return None
        tf_keras = importlib.import_module("tf_keras")
        tf_keras.utils.set_random_seed(0)
        arguments = self.arguments
        logits = not self.images or cifar10.gives_logits(model, self.x_test)
        steps = arguments.aware_epochs * len(self.batches())
        rate = tf_keras.optimizers.schedules.CosineDecay(arguments.aware_learning_rate, steps)
        optimizer = (
            tf_keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)
            if self.images
            else tf_keras.optimizers.Adam(rate)
        )
        return keras_alds.tfmot.quantize_aware_training(
            model,
            self.batches(),
            optimizer=optimizer,
            loss=self.loss(tf_keras, logits),
            metrics=["accuracy"],
            epochs=arguments.aware_epochs,
            shuffle=False,
            verbose=0,
        )[1]

    def after_training(self, model: Any) -> bytes:
        """The int8 file of quantization after training."""
        return keras_alds.litert.convert(
            model, quantize="int8", representative_data=self.x_train, verbose=0
        )

    def accuracy(self, predict: Any) -> float:
        """Top-1 on the held-out images, in %."""
        scores = np.asarray(predict(self.x_test))
        return 100 * float(np.mean(scores.argmax(-1) == self.y_test))


def main() -> None:
    arguments = parse_arguments()
    if arguments.distil and arguments.model is None:
        raise SystemExit("--distil needs --model: the digits net has no trained original")
    keras = importlib.import_module(arguments.keras)
    task = Task(arguments, keras)
    start = time.perf_counter()
    print(
        "| model | parameters | float | int8 after training | int8 aware | bytes after | ratio "
        "| bytes aware | ratio | gzip |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    first: tuple[bytes, bytes | None] | None = None
    for limit in (None, *arguments.max_slices):
        model, plan = task.trained(None if limit is None else arguments.cr, limit or 0)
        after, aware = task.after_training(model), task.aware(model)
        first = first or (after, aware)
        name = "original"
        if plan is not None:
            name = f"cr {plan.cr:.3f}, k ≤ {limit}" if limit else f"cr {plan.cr:.3f}, any k"
        cells = [
            name,
            f"{model.count_params():,}",
            f"{task.accuracy(lambda x, model=model: model.predict(x, verbose=0)):.1f}",
            f"{task.accuracy(Runner(after).predict):.1f}",
            "–" if aware is None else f"{task.accuracy(Runner(aware).predict):.1f}",
            f"{len(after):,}",
            f"{len(after) / len(first[0]):.3f}",
            "–" if aware is None else f"{len(aware):,}",
            "–" if aware is None else f"{len(aware) / len(first[1]):.3f}",
            f"{len(gzip.compress(aware or after)):,}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{len(task.x_test):,} held-out images; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

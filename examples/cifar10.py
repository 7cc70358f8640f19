"""The main job on CIFAR-10, with a trained model of your own.

    python examples/cifar10.py --model model.keras --cr 0.5                  # downloads CIFAR-10
    python examples/cifar10.py --model model.h5 --data cifar10.npz --cr 0.5 --keras tf_keras

The model gets the pixels as they are, 0 to 255 in float32 RGB (see `--scale`), and gives ten class
scores or probabilities. An .npz file holds `x_train`, `y_train`, `x_test` and `y_test`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages

import numpy as np
import tensorflow as tf

import keras_alds

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained model, .keras or .h5")
    add("--keras", choices=("keras", "tf_keras"), default="keras", help="what loads the model")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--scale", type=float, default=1.0, help="multiply the pixels by this (default: 1)")
    add("--limit", type=int, help="use only so many images for training, and for testing")
    add("--cr", type=float, default=0.5, help="fraction to remove (default: 0.5)")
    add("--method", default="alds", help='"alds" (default) or "energy"')
    add("--objective", default="params", help='what --cr counts: "params" (default) or "macs"')
    add("--exclude", nargs="*", default=[], help="layers to leave alone: names or regexes")
    add("--max-slices", type=int, help="largest number of slices (default: no limit)")
    add("--epochs", type=int, default=5, help="epochs in all (default: 5)")
    add("--at-epoch", type=int, default=0, help="compress before this epoch index (default: 0)")
    add("--learning-rate", type=float, default=0.01, help="at the start (default: 0.01)")
    add("--batch-size", type=int, default=128)
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="crops and flips")
    add(
        "--from-logits",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the model gives scores, not probabilities (default: found out)",
    )
    add("--output", type=Path, default=Path("runs/cifar10"), help="folder (runs/cifar10)")
    arguments = parser.parse_args()
    if not 0 <= arguments.at_epoch < arguments.epochs:
        parser.error(
            "expected 0 <= --at-epoch < --epochs. "
            f"Received: {arguments.at_epoch} and {arguments.epochs}"
        )
    if not arguments.model.is_file():
        parser.error(f"expected a model file. Received: --model {arguments.model}")
    return arguments


def load_data(path: Path | None, keras: Any, scale: float, limit: int | None) -> Data:
    names = ("x_train", "y_train", "x_test", "y_test")
    if path is None:
        (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
    else:
        with np.load(path) as file:
            if missing := [name for name in names if name not in file]:
                raise SystemExit(
                    f"Expected {path} to hold {', '.join(names)}. Received: no {missing}"
                )
            x_train, y_train, x_test, y_test = (file[name] for name in names)
    x_train, x_test = (x[:limit].astype("float32") * scale for x in (x_train, x_test))
    return x_train, y_train.reshape(-1)[:limit], x_test, y_test.reshape(-1)[:limit]


def load_model(path: Path, keras: Any) -> Any:
    try:
        # Without its compile state, which may need a user's own loss or metric.
        return keras.models.load_model(path, compile=False)
    except (TypeError, ValueError) as error:
        other = "tf_keras" if keras.__name__ == "keras" else "keras"
        raise SystemExit(
            f"{keras.__name__} cannot load {path}: {error}\nRemedy: if the model was saved by "
            f"the other Keras, try --keras {other}."
        ) from error


def gives_logits(model: Any, x: np.ndarray) -> bool:
    """Whether the outputs for some images are other than probabilities."""
    outputs = np.asarray(model.predict(x[:64], verbose=0), np.float64)
    return bool((outputs < 0).any() or not np.allclose(outputs.sum(-1), 1, atol=1e-3))


def batches(x: np.ndarray, y: np.ndarray, batch_size: int, augment: bool) -> tf.data.Dataset:
    """Shuffled batches; with `augment` padded by 4, cropped and flipped at random."""

    def change(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        padded = tf.pad(image, ((4, 4), (4, 4), (0, 0)))
        return tf.image.random_flip_left_right(tf.image.random_crop(padded, image.shape)), label

    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0)
    if augment:
        data = data.map(change, num_parallel_calls=tf.data.AUTOTUNE)
    return data.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def main() -> None:
    arguments = parse_arguments()
    keras = importlib.import_module(arguments.keras)
    keras.utils.set_random_seed(0)
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    x_train, y_train, x_test, y_test = load_data(
        arguments.data, keras, arguments.scale, arguments.limit
    )
    original = load_model(arguments.model, keras)
    from_logits = arguments.from_logits
    if from_logits is None:
        from_logits = gives_logits(original, x_test)
        print(f"The model gives {'scores (logits)' if from_logits else 'probabilities'}.")

    steps = arguments.epochs * -(-len(x_train) // arguments.batch_size)

    def compiled(model: Any) -> Any:
        schedule = keras.optimizers.schedules.CosineDecay(arguments.learning_rate, steps)
        model.compile(
            optimizer=keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
            metrics=["accuracy"],
        )
        return model

    def accuracy(model: Any) -> float:
        return float(compiled(model).evaluate(x_test, y_test, batch_size=256, verbose=0)[1])

    model = compiled(load_model(arguments.model, keras))
    alds = keras_alds.ALDSCompress(
        cr=arguments.cr,
        at_epoch=arguments.at_epoch,
        method=arguments.method,
        objective=arguments.objective,
        exclude=arguments.exclude,
        max_slices=arguments.max_slices,
    )
    start = time.perf_counter()
    model.fit(
        batches(x_train, y_train, arguments.batch_size, arguments.augment),
        epochs=arguments.epochs,
        shuffle=False,  # the data set shuffles
        validation_data=(x_test, y_test),
        validation_batch_size=256,
        callbacks=[alds, keras.callbacks.CSVLogger(str(output / "history.csv"))],
    )
    seconds = time.perf_counter() - start

    # Both files without compile and optimizer state, to compare; `model.save` would keep it.
    before_file, after_file = output / "original.keras", output / "compressed.keras"
    original.save(before_file)
    small = keras_alds.compress(original, plan=alds.plan)
    small.set_weights(model.get_weights())
    small.save(after_file)
    alds.plan.save(output / "plan.json")
    loaded = keras.models.load_model(after_file)
    np.testing.assert_array_equal(
        small.predict(x_test[:256], verbose=0), loaded.predict(x_test[:256], verbose=0)
    )

    alds.plan.summary()
    print()
    not_retrained = keras_alds.compress(original, plan=alds.plan)
    accuracy_before = accuracy(original)
    keras_alds.report(
        original,
        loaded,
        {
            "accuracy, not retrained": (accuracy_before, accuracy(not_retrained)),
            f"accuracy after {arguments.epochs} epochs": (accuracy_before, accuracy(loaded)),
            "file, bytes": (before_file.stat().st_size, after_file.stat().st_size),
        },
    ).summary()
    print(
        f"\n{len(x_train):,} training and {len(x_test):,} test images; `fit` took {seconds:.0f} "
        f"seconds. Saved in {output}: {', '.join(sorted(p.name for p in output.iterdir()))}. "
        "compressed.keras was loaded again and predicts the same."
    )


if __name__ == "__main__":
    main()

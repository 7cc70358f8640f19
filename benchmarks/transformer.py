"""A vision transformer on CIFAR-10 and a text classifier: accuracy without retraining or labels.

    python benchmarks/transformer.py --images cifar10.npz --text data_full.json --train

trains both (about half an hour on two cores; later calls read them from `--folder`),
compresses each with unlabelled training examples and without data, and prints a Markdown table for
each. `--images` is an .npz file with `x_train`, `y_train`, `x_test` and `y_test`. `--text` is
`data_full.json` of the GitHub repository clinc/oos-eval: short questions to an assistant and the
150 things that they may ask for (Larson et al., "An Evaluation Dataset for Intent Classification
and Out-of-Scope Prediction", EMNLP 2019). One without a path is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

import keras_alds
from keras_alds import litert
from keras_alds.litert.runs import Runner

BATCH = 128
SIDE, PATCH, IMAGE_CLASSES = 32, 4, 10
WORDS, TEXT_CLASSES = 28, 150  # words of a text; longer ones are cut
TESTED_FILES, RUNS = 1000, 300  # test examples of each file, and timed runs
UNKNOWN = 1  # the number of words that are rare in the training texts; 0 is padding

Array = np.ndarray


class Task(NamedTuple):
    """A network's data, how it is made, and how it is trained."""

    title: str
    examples: Array  # training examples, as the network takes them
    labels: Array
    x_test: Array
    y_test: Array
    build: Callable[[], Any]
    batches: Callable[[], tf.data.Dataset]
    epochs: int
    learning_rate: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=Path, help=".npz file of CIFAR-10")
    add("--text", type=Path, help="data_full.json of clinc/oos-eval")
    add("--folder", type=Path, default=Path("runs/transformer"), help="where the networks are")
    add("--train", action="store_true", help="train the networks that are not in the folder")
    add("--crs", type=float, nargs="+", default=[0.5], help="fractions to remove (default: 0.5)")
    add("--files", action="store_true", help="compare LiteRT files with narrower heads instead")
    add("--examples", type=int, default=512, help="for calibration (default: 512)")
    arguments = parser.parse_args()
    if not arguments.images and not arguments.text:
        parser.error("expected --images, --text or both")
    return arguments


# -- Networks ------------------------------------------------------------------------------------


def encoder(x: Any, blocks: int, heads: int, dropout: float) -> Any:
    """Blocks of attention and two dense layers, normalized first, and their mean at the end."""
    width = x.shape[-1]
    for _ in range(blocks):
        inner = layers.LayerNormalization(epsilon=1e-6)(x)
        inner = layers.MultiHeadAttention(heads, width // heads, dropout=dropout)(inner, inner)
        x = layers.Add()([x, layers.Dropout(dropout)(inner)])
        inner = layers.LayerNormalization(epsilon=1e-6)(x)
        inner = layers.Dense(2 * width, activation="gelu")(inner)
        inner = layers.Dense(width)(inner)
        x = layers.Add()([x, layers.Dropout(dropout)(inner)])
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    return layers.GlobalAveragePooling1D()(x)


def vision_transformer(width: int = 128, blocks: int = 4, heads: int = 2) -> Any:
    """From raw pixels to scores before softmax."""
    inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Rescaling(1 / 127.5, -1)(inputs)
    x = layers.Conv2D(width, PATCH, strides=PATCH)(x)
    patches = (SIDE // PATCH) ** 2
    x = layers.Reshape((patches, width))(x)
    places = ops.cumsum(ops.ones_like(x[:, :, 0]), axis=1) - 1
    x = layers.Add()([x, layers.Embedding(patches, width)(places)])
    x = encoder(x, blocks, heads, dropout=0.0)
    return keras.Model(inputs, layers.Dense(IMAGE_CLASSES)(x), name="vit")


def text_transformer(words: int, width: int = 96, blocks: int = 2, heads: int = 4) -> Any:
    """From the numbers of words, 0 for none, to scores before softmax."""
    inputs = keras.Input((WORDS,), dtype="int32")
    there = ops.cast(ops.not_equal(inputs, 0), "int32")
    places = ops.cumsum(there, axis=1) * there  # from 1 on
    x = layers.Embedding(words, width, mask_zero=True)(inputs)
    x = layers.Add()([x, layers.Embedding(WORDS + 1, width, mask_zero=True)(places)])
    x = encoder(layers.Dropout(0.3)(x), blocks, heads, dropout=0.3)
    return keras.Model(inputs, layers.Dense(TEXT_CLASSES)(layers.Dropout(0.3)(x)), name="text")


# -- Data ----------------------------------------------------------------------------------------


def image_task(path: Path) -> Task:
    x_train, y_train, x_test, y_test = cifar10.load_data(path, keras, 1.0, None)
    return Task(
        "Vision transformer, CIFAR-10",
        x_train,
        y_train,
        x_test,
        y_test,
        vision_transformer,
        lambda: cifar10.batches(x_train, y_train, BATCH, augment=True),
        epochs=12,
        learning_rate=1e-3,
    )


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower())[:WORDS]


def text_task(path: Path) -> Task:
    splits = json.loads(path.read_text())
    counts = Counter(word for text, _ in splits["train"] for word in words_of(text))
    known = sorted(word for word, count in counts.items() if count > 1)
    numbers = {word: n for n, word in enumerate(known, UNKNOWN + 1)}
    classes = {name: n for n, name in enumerate(sorted({name for _, name in splits["train"]}))}
    if len(classes) != TEXT_CLASSES:
        raise SystemExit(f"Expected {TEXT_CLASSES} classes in {path}. Received: {len(classes)}")

    def read(split: str) -> tuple[Array, Array]:
        x = np.zeros((len(splits[split]), WORDS), np.int32)
        for row, (text, _) in zip(x, splits[split], strict=True):
            found = [numbers.get(word, UNKNOWN) for word in words_of(text)]
            row[: len(found)] = found
        return x, np.array([classes[name] for _, name in splits[split]])

    (x_train, y_train), (x_test, y_test) = read("train"), read("test")
    return Task(
        "Text transformer, CLINC150",
        x_train,
        y_train,
        x_test,
        y_test,
        lambda: text_transformer(len(known) + UNKNOWN + 1),
        lambda: cifar10.batches(x_train, y_train, BATCH, augment=False),
        epochs=16,
        learning_rate=1e-3,
    )


# -- Training and measuring ----------------------------------------------------------------------


def trained(task: Task) -> Any:
    keras.utils.set_random_seed(0)
    model = task.build()
    steps = task.epochs * -(-len(task.examples) // BATCH)
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=task.learning_rate, warmup_steps=warmup
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.05, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        task.batches(),
        epochs=task.epochs,
        shuffle=False,  # the data set shuffles
        validation_data=(task.x_test, task.y_test),
        validation_batch_size=BATCH,
        verbose=2,
    )
    return model


def network(task: Task, path: Path, train: bool) -> Any:
    """The network in the file, or a trained one that is then written there."""
    if path.exists():
        return keras.models.load_model(path, compile=False)
    if not train:
        raise SystemExit(f"Expected a network in {path}, or --train")
    path.parent.mkdir(parents=True, exist_ok=True)
    trained(task).save(path)
    return keras.models.load_model(path, compile=False)


def measure(task: Task, original: Any, crs: list[float], examples: int) -> None:
    """Prints the table of one network."""
    chosen = np.random.default_rng(0).permutation(len(task.examples))[:examples]
    data = {"calibration_data": task.examples[chosen]}

    def compressed(**options: Any) -> Callable[[float], Any]:
        return lambda cr: keras_alds.compress(original, cr, **options)

    def narrowed(**options: Any) -> Callable[[float], Any]:
        def make(cr: float) -> Any:
            narrow = keras_alds.narrow_heads(original, **data, verbose=0).model
            left = (1 - cr) * original.count_params() / narrow.count_params()
            return keras_alds.compress(narrow, 1 - left, **options) if left < 1 else narrow

        return make

    variants: dict[str, Callable[[float], Any]] = {
        f"{examples} examples": compressed(**data),
        f"{examples} examples, narrower heads first": narrowed(**data),
        f"{examples} examples, refined": compressed(**data, refine=True),
        f"{examples} examples, narrower heads first, refined": narrowed(**data, refine=True),
        '"energy", no data': compressed(method="energy"),
        '"alds", no data': compressed(method="alds"),
        "plain SVD, no data": compressed(method="svd"),
    }

    def top1(model: Any) -> float:
        scores = model.predict(task.x_test, batch_size=250, verbose=0)
        return 100 * float(np.mean(scores.argmax(-1) == task.y_test))

    base = top1(original)
    print(
        f"\n{task.title}: {original.count_params():,} parameters, top-1 {base:.1f} % of "
        f"{len(task.x_test):,} test examples.\nChange in points without retraining; in brackets "
        "the seconds of `compress`.\n"
    )
    print("| removed | " + " | ".join(f"{cr:.0%}" for cr in crs) + " |")
    print("|---|" + "---|" * len(crs))
    for name, make in variants.items():
        cells = []
        for cr in crs:
            start = time.perf_counter()
            model = make(cr)
            seconds = time.perf_counter() - start
            cells.append(f"{top1(model) - base:+.1f} ({seconds:.0f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def compare_files(task: Task, original: Any, examples: int) -> None:
    """Prints size, accuracy and latency of files with narrower heads, and of the same size without.

    The files take turns, and the least time of each counts: other programs may run too.
    """
    chosen = np.random.default_rng(0).permutation(len(task.examples))[:examples]
    x = task.examples[chosen]
    narrow = keras_alds.narrow_heads(original, calibration_data=x, verbose=0).model
    cr = 1 - narrow.count_params() / original.count_params()
    models = {
        "original": original,
        "narrower heads": narrow,
        f"`compress(model, {cr:.2f})`": keras_alds.compress(original, cr, calibration_data=x),
    }
    options = {"float": {}, "int8": {"quantize": "int8", "representative_data": x}}
    runners = {
        (name, kind): Runner(litert.convert(model, verbose=0, **more))
        for name, model in models.items()
        for kind, more in options.items()
    }
    some, labels = task.x_test[:TESTED_FILES], task.y_test[:TESTED_FILES]
    top1 = {
        key: 100 * float(np.mean(runner.predict(some).argmax(-1) == labels))
        for key, runner in runners.items()
    }
    least = dict.fromkeys(runners, float("inf"))
    for runner in runners.values():
        runner.set_inputs([some[:1]])
    for _ in range(RUNS):
        for key, runner in runners.items():
            start = time.perf_counter()
            runner.invoke()
            least[key] = min(least[key], time.perf_counter() - start)
    print(f"\n{task.title}\n\n| | parameters | MACs | float: top-1, latency | int8 |")
    print("|---|---|---|---|---|")
    for name, model in models.items():
        cells = [
            f"{top1[name, kind]:.1f}, {least[name, kind] / least['original', kind]:.2f}"
            for kind in options
        ]
        macs = keras_alds.count_macs(model)
        print(f"| {name} | {model.count_params():,} | {macs:,} | " + " | ".join(cells) + " |")


def main() -> None:
    arguments = parse_arguments()
    tasks = {"vit": (image_task, arguments.images), "text": (text_task, arguments.text)}
    for name, (load, path) in tasks.items():
        if path:
            task = load(path)
            original = network(task, arguments.folder / f"{name}.keras", arguments.train)
            if arguments.files:
                compare_files(task, original, arguments.examples)
            else:
                measure(task, original, arguments.crs, arguments.examples)


if __name__ == "__main__":
    main()

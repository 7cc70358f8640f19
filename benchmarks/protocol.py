"""Accuracy after retraining inside `fit`, by what `ALDSCompress` does besides compressing.

    python benchmarks/protocol.py --model resnet20.keras --data cifar10.npz --json protocol.json

takes a trained network at the end of its learning-rate schedule, removes `--cr` and trains on for
`--epochs`, with the labels in most arms, and prints a Markdown table of top-1 on the test
images:

- labels: the learning rate stays what it is at the end of the schedule;
- rewinding: the rates of the last epochs are gone through again (`rewind_epochs`);
- distillation: that, and the dense model teaches the compressed one (`distill=True`),
  or at temperature 1;
- blocks: that, with the outputs of blocks (`distill={"features": True}`);
- blocks, no labels: that, with the loss left out of `compile`, and Adam from 0.001 as in `refine`;
- outputs, no labels: the same without blocks, at temperature 100: scores as they are;
- iterative: rewinding in three steps of a third of the epochs (`cr=[…]`);
- iterative, blocks: both;
- iterative, no labels: three steps of "outputs, no labels".

All arms see the same batches: crops and flips, SGD with momentum, a cosine. `--json` is written
after each figure. A second run goes on after the last arm that it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras
import numpy as np

import keras_alds

BLOCKS = {"features": True}
ARMS: dict[str, dict[str, Any]] = {
    "labels": {},
    "rewinding": {"rewind": True},
    "distillation": {"rewind": True, "distill": True},
    "distillation, T=1": {"rewind": True, "distill": {"temperature": 1.0}},
    "blocks": {"rewind": True, "distill": BLOCKS},
    "blocks, no labels": {"rewind": True, "distill": BLOCKS, "adam": 1e-3},
    "outputs, no labels": {"rewind": True, "distill": {"temperature": 100.0}, "adam": 1e-3},
    "iterative": {"rewind": True, "steps": 3},
    "iterative, blocks": {"rewind": True, "steps": 3, "distill": BLOCKS},
    "iterative, no labels": {
        "rewind": True,
        "steps": 3,
        "distill": {"temperature": 100.0},
        "adam": 1e-3,
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained Keras 3 model, .keras or .h5")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--json", type=Path, required=True, help="write the figures here, and go on from them")
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    add("--cr", type=float, default=0.75, help="fraction to remove (default: 0.75)")
    add("--epochs", type=int, default=16, help="epochs of retraining (default: 16)")
    add("--images", type=int, default=512, help="images for calibration (default: 512)")
    add("--train", type=int, help="training images in an epoch (default: all)")
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=0.02, help="at the start (default: 0.02)")
    add("--last-rate", type=float, default=0.05, help="at the end, of the first (default: 0.05)")
    return parser.parse_args()


class Figures:
    """Top-1 by arm and epoch, kept in a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def add(self, **row: Any) -> None:
        """Prints and writes one figure."""
        print(*row.values(), flush=True)
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def of(self, arm: str) -> dict[int, float]:
        """Top-1 by epoch."""
        return {row["epoch"]: row["top1"] for row in self.rows if row["arm"] == arm}

    def to_markdown(self, arms: list[str], base: float) -> str:
        """One line an arm, one column an epoch."""
        epochs = sorted({epoch for arm in arms for epoch in self.of(arm)})
        lines = ["| arm | " + " | ".join(map(str, epochs)) + " | below the original |"]
        lines.append("|---|" + "---|" * (len(epochs) + 1))
        for arm in arms:
            curve = self.of(arm)
            cells = [f"{curve[epoch]:.1f}" if epoch in curve else "" for epoch in epochs]
            lines.append(
                f"| {arm} | " + " | ".join([*cells, f"{base - curve[max(curve)]:.1f}"]) + " |"
            )
        return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    x_train, y_train, x_test, y_test = cifar10.load_data(arguments.data, keras, 1.0, None)
    x_train, y_train = x_train[: arguments.train], y_train[: arguments.train]
    original = cifar10.load_model(arguments.model, keras)
    from_logits = cifar10.gives_logits(original, x_test)
    steps = -(-len(x_train) // arguments.batch_size)
    figures = Figures(arguments.json)

    def top1(model: Any) -> float:
        scores = model.predict(x_test, batch_size=250, verbose=0)
        return 100 * float(np.mean(scores.argmax(-1) == y_test))

    def retrain(arm: str) -> None:
        options = dict(ARMS[arm])
        count, adam = options.pop("steps", 1), options.pop("adam", None)
        period = arguments.epochs // count  # of one cosine
        rewound = {"rewind_epochs": period} if options.pop("rewind", False) else {}
        crs = [1 - (1 - arguments.cr) ** (i / count) for i in range(1, count + 1)]
        starts = [period * i for i in range(1, count + 1)]
        keras.utils.set_random_seed(0)
        model = cifar10.load_model(arguments.model, keras)
        schedule = keras.optimizers.schedules.CosineDecay(
            adam or arguments.learning_rate, period * steps, alpha=arguments.last_rate
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
        if adam:
            optimizer, loss = keras.optimizers.Adam(schedule), None
        else:
            optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
        model.compile(optimizer, loss)
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(period * steps)  # as if it was trained so
        begun = time.perf_counter()

        def note(epoch: int, _: Any) -> None:
            done = epoch + 1 - period
            if done in (1, 2) or done % 4 == 0 or epoch + 1 == last:
                seconds = round(time.perf_counter() - begun)
                figures.add(arm=arm, epoch=done, top1=round(top1(model), 2), seconds=seconds)

        last = period * (count + 1)
        model.fit(
            cifar10.batches(x_train, y_train, arguments.batch_size, augment=True),
            initial_epoch=period,
            epochs=last,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras_alds.ALDSCompress(
                    crs if count > 1 else crs[0],
                    at_epoch=starts if count > 1 else starts[0],
                    calibration_data=x_train[: arguments.images],
                    target="size",
                    **rewound,
                    **options,
                ),
                keras.callbacks.LambdaCallback(on_epoch_end=note),
            ],
        )

    for arm in arguments.arms:
        last = arguments.epochs // ARMS[arm].get("steps", 1) * ARMS[arm].get("steps", 1)
        if last not in figures.of(arm):
            figures.rows = [row for row in figures.rows if row["arm"] != arm]
            retrain(arm)

    base = top1(original)
    print(f"\n{arguments.cr:.0%} of the parameters removed, top-1 in %; the original: {base:.1f}\n")
    print(figures.to_markdown(arguments.arms, base))
    print(f"\n{len(x_test):,} test images; {len(x_train):,} training images an epoch")


if __name__ == "__main__":
    main()

"""What every step of activation-aware compression brings, and what was tried and left out.

    python benchmarks/calibration_ablation.py --model resnet20.keras --data cifar10.npz

prints a Markdown table of top-1 without retraining for every ratio: first the steps one after the
other, then the ideas that are no part of the package, each on top of all steps. `--repeats 3` takes
as many other sets of calibration images for the last step, which shows the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar10
import keras
import numpy as np

import keras_alds
from keras_alds.core.calibration import regression, whitening
from keras_alds.core.calibration.refit import factorize_outputs, output_error
from keras_alds.core.solvers import min_sum
from keras_alds.kinds.base import is_factorized, kernel_values
from keras_alds.methods import get_method
from keras_alds.models import in_place, sequential
from keras_alds.models.inventory import walk


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained Keras 3 model, .keras or .h5")
    add("--data", type=Path, help=".npz file (default: keras.datasets.cifar10, downloaded)")
    add("--images", type=int, default=512, help="unlabelled training images (default: 512)")
    add("--crs", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    add("--repeats", type=int, default=1, help="sets of calibration images (default: 1)")
    add("--csv", type=Path, help="write the figures here")
    return parser.parse_args()


class Bench:
    """A network, its calibration images, and top-1 of kernels put into the dense network."""

    def __init__(self, model: Any, images: np.ndarray, x_test: np.ndarray, y_test: np.ndarray):
        self.model, self.images = model, images
        self.x_test, self.y_test = x_test, y_test
        # Kernels are multiplied out, so that one compiled network serves all.
        self.dense = keras.models.clone_model(model)
        self.dense.set_weights(model.get_weights())
        self.stats: Any = None

    def load(self, compressed: Any) -> None:
        """Puts the kernels of a compressed network into the dense one."""
        for (_, layer), (_, target) in zip(walk(compressed), walk(self.dense), strict=True):
            if is_factorized(layer):
                target.kernel.assign(layer.kernel)
                if layer.use_bias:
                    target.bias.assign(layer.bias)
            elif not isinstance(layer, keras.Model):
                target.set_weights(layer.get_weights())

    def top1(self) -> float:
        """Top-1 of the dense network in %."""
        scores = self.dense.predict(self.x_test, batch_size=250, verbose=0)
        return 100 * float(np.mean(scores.argmax(-1) == self.y_test))

    def outputs(self, images: np.ndarray) -> np.ndarray:
        """Outputs of the dense network."""
        return self.dense.predict(images, batch_size=250, verbose=0)

    def compress(self, cr: float, images: np.ndarray | None = None, **options: Any) -> Any:
        """One set of statistics serves all variants that do not change them."""
        plan = keras_alds.select(self.model, cr, calibration_data=self.stats, target="size")
        data = self.images if images is None else images
        return keras_alds.compress(self.model, plan=plan, calibration_data=data, **options)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Chooses as if the slices' errors were uncorrelated, without the joint refit."""
    with mock.patch.object(whitening, "_explained", side_effect=np.linalg.LinAlgError):
        yield


@contextlib.contextmanager
def sweeps(count: int) -> Iterator[None]:
    """Fits every slice anew so many times."""
    fit = functools.partial(factorize_outputs, sweeps=count)
    with mock.patch.object(in_place, "factorize_outputs", fit):
        yield


@contextlib.contextmanager
def one_ridge(value: float) -> Iterator[None]:
    """The regression on x̂ with one ρ for all layers."""
    with (
        mock.patch.object(regression, "TARGET_RIDGES", (value, np.inf)),
        mock.patch.object(regression, "default_ridge", return_value=value),
        mock.patch.object(sequential, "TARGET_RIDGES", (value,) * 2),
        mock.patch.object(sequential.np, "argmin", return_value=0),
    ):
        yield


def weighted(bench: Bench, cr: float, power: float) -> Any:
    """Layers' errors weighted by the output distance that they cause one by one."""
    plan = keras_alds.select(bench.model, cr, calibration_data=bench.stats, target="size")
    small = keras_alds.compress(
        bench.model, plan=plan, calibration_data=bench.stats, sequential=False
    )
    images = bench.images[:128]
    bench.load(bench.model)
    expected = bench.outputs(images)
    weights = []
    for choice, (spec, _) in zip(plan.choices, in_place.match(bench.model, plan), strict=True):
        if spec.reason is not None or not choice.factorized:
            weights.append(None)
            continue
        kernel = np.asarray(keras.ops.convert_to_numpy(small.get_layer(spec.path).kernel))
        original = kernel_values(spec.layer)
        error = output_error(original, kernel, bench.stats.moments[spec.path])
        bench.dense.get_layer(spec.path).kernel.assign(kernel)
        distance = np.square(bench.outputs(images) - expected).sum()
        bench.dense.get_layer(spec.path).kernel.assign(original)
        weights.append(float(distance) / max(error, 1e-9))
    known = [weight for weight in weights if weight is not None]
    scale = [
        (np.mean(known) if weight is None else weight) ** power
        for weight, (spec, _) in zip(weights, in_place.match(bench.model, plan), strict=True)
        if spec.reason is None
    ]

    def solve(tables: Any, budgets: Any) -> Any:
        scaled = [
            dataclasses.replace(table, error=table.error * factor)
            for table, factor in zip(tables, scale, strict=True)
        ]
        return min_sum(scaled, budgets)

    method = dataclasses.replace(get_method("activation"), solve=solve)
    with mock.patch("keras_alds.problem.get_method", return_value=method):
        return bench.compress(cr)


def corrected_bias(bench: Bench, cr: float) -> Any:
    """Every channel's mean output restored, in the bias or the following BatchNormalization."""
    small = bench.compress(cr)
    for (_, layer), (_, before) in zip(walk(small), walk(bench.model), strict=True):
        if not is_factorized(layer):
            continue
        following = [node.operation for node in layer._outbound_nodes]
        norm = following[0] if len(following) == 1 else None
        if not layer.use_bias and not isinstance(norm, keras.layers.BatchNormalization):
            continue
        if layer.use_bias and layer.activation is not keras.activations.linear:
            continue
        means = [
            np.concatenate(
                [
                    np.reshape(part, (-1, part.shape[-1]))
                    for part in [
                        keras.Model(model.inputs, item.output).predict_on_batch(bench.images)
                    ]
                ]
            ).mean(axis=0)
            for model, item in ((bench.model, before), (small, layer))
        ]
        shift = means[0] - means[1]
        if layer.use_bias:
            layer.bias.assign(layer.bias + shift)
        else:
            norm.moving_mean.assign(norm.moving_mean - shift)
    return small


def renewed_norms(bench: Bench, cr: float) -> Any:
    """BatchNormalization re-estimated on 3/4 of the images if that is better on the others."""
    small = bench.compress(cr)
    cut = len(bench.images) * 3 // 4
    held = bench.images[cut:]
    bench.load(bench.model)
    expected = bench.outputs(held)
    bench.load(small)
    before = np.square(bench.outputs(held) - expected).sum()
    norms = [
        layer for _, layer in walk(small) if isinstance(layer, keras.layers.BatchNormalization)
    ]
    old = [layer.get_weights() for layer in norms]
    momenta = [layer.momentum for layer in norms]
    for step, start in enumerate(range(0, cut, 128)):
        for layer in norms:
            layer.momentum = step / (step + 1)  # the plain mean of all batches
        small(bench.images[start : start + 128], training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    bench.load(small)
    if np.square(bench.outputs(held) - expected).sum() >= before:
        for layer, weights in zip(norms, old, strict=True):
            layer.set_weights(weights)
    return small


def plain(*contexts: Any, **options: Any) -> Callable[[Bench, float], Any]:
    def run(bench: Bench, cr: float) -> Any:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            if alone in contexts:
                bench.stats._spectra.clear()
            try:
                return bench.compress(cr, **options)
            finally:
                if alone in contexts:
                    bench.stats._spectra.clear()

    return run


def no_sweeps() -> Any:
    return sweeps(0)


VARIANTS: dict[str, Callable[[Bench, float], Any]] = {
    "choice and encoders slice by slice": plain(alone, no_sweeps, sequential=False),
    "+ choice after the joint refit": plain(no_sweeps, sequential=False),
    "+ two sweeps over the slices": plain(sequential=False),
    "+ sequential, ρ = 1e-4": plain(lambda: one_ridge(1e-4)),
    "+ ρ by held-out images (all steps)": plain(),
    "all, 4 sweeps": plain(lambda: sweeps(4)),
    "all, bias correction": corrected_bias,
    "all, BatchNormalization re-estimated if better": renewed_norms,
    "all, layers weighted by output distance": functools.partial(weighted, power=1.0),
    "all, weighted by its square root": functools.partial(weighted, power=0.5),
}


def main() -> None:
    arguments = parse_arguments()
    x_train, _, x_test, y_test = cifar10.load_data(arguments.data, keras, 1.0, None)
    model = cifar10.load_model(arguments.model, keras)
    rows: list[dict[str, Any]] = []

    def measure(bench: Bench, name: str, cr: float, make: Callable[[], Any]) -> None:
        start = time.perf_counter()
        compressed = make()
        seconds = time.perf_counter() - start
        bench.load(compressed)
        rows.append({"variant": name, "cr": cr, "top1": bench.top1(), "seconds": seconds})
        print(f"# {name}, cr={cr}: {rows[-1]['top1']:.2f} ({seconds:.1f} s)", flush=True)

    for repeat in range(arguments.repeats):
        images = x_train[repeat * arguments.images :][: arguments.images]
        bench = Bench(model, images, x_test, y_test)
        base = bench.top1()
        bench.stats = keras_alds.CalibrationStats.collect(model, images, verbose=0)
        for cr in arguments.crs:
            if repeat:
                measure(
                    bench, f"all, images {repeat + 1}", cr, functools.partial(bench.compress, cr)
                )
                continue
            for name, variant in VARIANTS.items():
                measure(bench, name, cr, functools.partial(variant, bench, cr))
    full = x_train[: arguments.images]
    for count in (64, 128, 256):
        bench = Bench(model, full[:count], x_test, y_test)
        bench.stats = keras_alds.CalibrationStats.collect(model, full[:count], verbose=0)
        for cr in arguments.crs:
            measure(bench, f"all, {count} images", cr, functools.partial(bench.compress, cr))

    print(
        f"\n| {arguments.model.name}, dense: {base:.1f} | "
        + " | ".join(f"{cr:g}" for cr in arguments.crs)
        + " |"
    )
    print("|---|" + "---|" * len(arguments.crs))
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = [f"{row['top1']:.1f}" for row in rows if row["variant"] == name]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

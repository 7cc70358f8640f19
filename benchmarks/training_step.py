"""Time one training step: dense, factorized, and factorized through stock grouped convolutions.

Two networks of Keras 3 layers, batch 64 by default, every convolution but the first factorized to
about half its parameters with k = 1, 2, 4, 8 slices and with the most slices its channels allow.
The variants take turns step by step, so that a busy machine slows all of them; the table gives
medians.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --network plain --jit-compile --steps 9
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from keras_alds.layers import FactorizedConv2D

Convolution = Callable[..., keras.KerasTensor]


def half_rank(channels: int, filters: int, size: int, slices: int) -> int:
    """The largest rank per slice that keeps at most half of the kernel's weights, at least 1."""
    area = size * size
    rank = filters * channels * area // (2 * (slices * filters + channels * area))
    return max(1, min(rank, channels // slices * area, filters))


def largest_divisor(channels: int, slices: int) -> int:
    """The largest divisor of `channels` that is at most `slices`."""
    return max(k for k in range(1, slices + 1) if channels % k == 0)


def dense(x: keras.KerasTensor, filters: int, size: int, strides: int) -> keras.KerasTensor:
    return keras.layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)


def factorized(slices: int, form: str) -> Convolution:
    """A convolution of at most `slices` slices at half the parameters; `form` may be "stock"."""

    def convolution(
        x: keras.KerasTensor, filters: int, size: int, strides: int
    ) -> keras.KerasTensor:
        channels = x.shape[-1]
        k = largest_divisor(channels, slices)
        rank = half_rank(channels, filters, size, k)
        if rank * (k * filters + channels * size**2) >= filters * channels * size**2:
            return dense(x, filters, size, strides)
        common = {"strides": strides, "padding": "same", "use_bias": False}
        if form == "stock":
            x = keras.layers.Conv2D(k * rank, size, groups=k, **common)(x)
            return keras.layers.Conv2D(filters, 1, use_bias=False)(x)
        return FactorizedConv2D(filters, size, k, rank, encoder_form=form, **common)(x)

    return convolution


def plain_network(convolution: Convolution) -> keras.Model:
    """Six 3×3 convolutions, 16 to 64 filters, on 32×32 images."""
    inputs = keras.Input((32, 32, 3))
    x = dense(inputs, 16, 3, 1)
    for filters, strides in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        x = keras.layers.BatchNormalization()(keras.layers.ReLU()(x))
        x = convolution(x, filters, 3, strides)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def residual_network(convolution: Convolution) -> keras.Model:
    """ResNet20 for 32×32 images: three stages of three blocks, 16, 32 and 64 filters."""
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(layers.BatchNormalization()(dense(inputs, 16, 3, 1)))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            strides = 2 if stage and not block else 1
            y = layers.BatchNormalization()(convolution(x, filters, 3, strides))
            y = layers.BatchNormalization()(convolution(layers.ReLU()(y), filters, 3, 1))
            if strides == 2:
                x = layers.BatchNormalization()(convolution(x, filters, 1, strides))
            x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


NETWORKS = {"plain": plain_network, "resnet20": residual_network}


def make_step(model: keras.Model, batch: int, jit_compile: bool) -> Callable[[], float]:
    """A function that runs one compiled training step and returns its seconds."""
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(batch, 32, 32, 3)), tf.float32)
    y = tf.constant(generator.integers(0, 10, size=batch), tf.int32)

    def step() -> float:
        start = time.perf_counter()
        model.train_on_batch(x, y)  # returns the loss as a number: the step is over
        return time.perf_counter() - start

    step()  # trace and compile
    return step


def run(arguments: argparse.Namespace, name: str) -> None:
    network = NETWORKS[name]
    most = 64
    variants: dict[str, Convolution] = {"dense": dense}
    for slices in (*arguments.slices, most):
        label = "max" if slices == most else str(slices)
        variants[f"factorized, k={label}"] = factorized(slices, arguments.form)
    if not arguments.no_stock:
        for slices in (*arguments.slices, most):
            label = "max" if slices == most else str(slices)
            variants[f"stock groups, k={label}"] = factorized(slices, "stock")

    steps, parameters = {}, {}
    for label, convolution in variants.items():
        keras.utils.set_random_seed(0)
        model = network(convolution)
        parameters[label] = model.count_params()
        steps[label] = make_step(model, arguments.batch, arguments.jit_compile)
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    for turn in range(arguments.steps):
        for label, step in steps.items():
            # The stock variants are slow and far off: a few of their steps tell enough.
            if not (label.startswith("stock") and turn >= 3):
                seconds[label].append(step())

    base = statistics.median(seconds["dense"])
    compiler = "XLA" if arguments.jit_compile else "no XLA"
    print(f"\n{name}: one training step, batch {arguments.batch}, {compiler}\n")
    print("| variant | parameters | ms | ratio to dense |")
    print("|---|---|---|---|")
    for label in variants:
        median = statistics.median(seconds[label])
        kept = parameters[label] / parameters["dense"]
        print(f"| {label} | {kept:.2f} | {1e3 * median:.1f} | {median / base:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of every variant")
    parser.add_argument("--slices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--form",
        default="auto",
        choices=["auto", "grouped", "split", "merged", "recomposed"],
        help="encoder_form of the factorized layers",
    )
    parser.add_argument("--jit-compile", action="store_true", help="compile the step with XLA")
    parser.add_argument("--no-stock", action="store_true", help="leave out Conv2D(groups=k)")
    arguments = parser.parse_args()
    for name in NETWORKS if arguments.network == "all" else (arguments.network,):
        run(arguments, name)


if __name__ == "__main__":
    main()

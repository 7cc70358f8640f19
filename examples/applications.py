"""A network of `keras.applications`: compress it, look at what changes, save it.

    python examples/applications.py --images photos/                 # downloads ImageNet weights
    python examples/applications.py --weights none                   # random weights, no download

`photos/` is any folder of images like those that the network will see; labels are not needed. With
them, the layers are chosen and fitted by what they do to the outputs. Without trained weights, the
figures about outputs say nothing about a trained network; parameters and MACs are right.

With `--weights none`, in 22 seconds on two CPU cores: 3,538,984 → 2,459,624 parameters,
300,774,272 → 299,694,912 MACs. By its weights alone, the last dense layer is the cheapest to
compress. A warning says that only examples can tell about accuracy.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import keras
import numpy as np

import keras_alds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--module", default="mobilenet_v2", help="module of keras.applications")
    add("--name", default="MobileNetV2", help="function in it")
    add("--weights", choices=("imagenet", "none"), default="imagenet")
    add("--images", type=Path, help="folder of images, without labels")
    add("--size", type=int, default=224, help="pixels of a side (default: 224)")
    add("--cr", type=float, default=0.3, help="fraction to remove (default: 0.3)")
    add("--output", type=Path, default=Path("runs/applications/small.keras"))
    return parser.parse_args()


def load_images(folder: Path, size: int) -> np.ndarray:
    """At most 512 images, with pixels from 0 to 255."""
    data = keras.utils.image_dataset_from_directory(
        folder, labels=None, image_size=(size, size), batch_size=32, verbose=False
    )
    return np.concatenate([np.asarray(batch) for batch in data.take(16)])


def main() -> None:
    arguments = parse_arguments()
    keras.utils.set_random_seed(0)
    module = importlib.import_module(f"keras.applications.{arguments.module}")
    shape = (arguments.size, arguments.size, 3)
    weights = None if arguments.weights == "none" else "imagenet"
    try:
        model = getattr(module, arguments.name)(weights=weights, input_shape=shape)
    except Exception as error:  # whatever the download raises
        raise SystemExit(f"{error}\nRemedy without a network: --weights none") from error
    images = None
    if arguments.images is not None:
        images = module.preprocess_input(load_images(arguments.images, arguments.size))

    small = keras_alds.compress(model, cr=arguments.cr, calibration_data=images)
    figures = {}
    if images is not None:
        first, then = (m.predict(images, verbose=0).argmax(-1) for m in (model, small))
        figures["same first class"] = (1.0, float(np.mean(first == then)))
    keras_alds.report(model, small, figures).summary()

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    small.save(arguments.output)
    print(f"Saved {arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""What the example scripts share: data sets that need no download, and a small network.

The digits are scikit-learn's: 1,797 grey images of 8×8 pixels (UCI Optical Recognition of
Handwritten Digits). The tones are made by NumPy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
FILTERS = (32, 64, 96, 128)
#: The words that `tones` makes: the steps of the pitch, in octaves.
WORDS = {"rise": (0, 1), "fall": (1, 0), "hill": (0, 1, 0), "valley": (1, 0, 1), "flat": (0.5, 0.5)}


def parser(description: str, *, epochs: int, cr: float) -> argparse.ArgumentParser:
    """The options that most scripts have."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=epochs, help=f"default: {epochs}")
    parser.add_argument("--cr", type=float, default=cr, help=f"fraction to remove (default: {cr})")
    parser.add_argument("--limit", type=int, help="use only so many training and test examples")
    return parser


def add_filters(parser: argparse.ArgumentParser) -> None:
    """The option for scripts that train `cnn`."""
    parser.add_argument("--filters", type=int, nargs="+", default=FILTERS, help="of the layers")


def digits(size: int = 8, limit: int | None = None) -> Data:
    """`x_train, y_train, x_test, y_test`: float32 images from 0 to 1; every fourth is held out.

    Args:
        size: Pixels of a side, a multiple of 8; the images are enlarged.
        limit: The largest number of images for training, and for testing.
    """
    data = load_digits()
    images = np.kron(data.images, np.ones((1, size // 8, size // 8)))
    images = (images[..., np.newaxis] / 16).astype("float32")
    split = train_test_split(
        images, data.target, test_size=0.25, stratify=data.target, random_state=0
    )
    x_train, x_test, y_train, y_test = (part[:limit] for part in split)
    return x_train, y_train, x_test, y_test


def tones(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Half a second of sound for each example, and which of `WORDS` it is.

    A voice of random pitch glides through the steps of its word, with overtones, under noise.

    Returns:
        Float32 samples `[count, 4000]` at 8 kHz, and integer labels `[count]`.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(WORDS), count)
    seconds = np.arange(4000) / 8000
    sounds = np.empty((count, 4000), np.float32)
    for sound, label in zip(sounds, labels, strict=True):
        steps = list(WORDS.values())[label]
        start = rng.uniform(0, 0.15)
        octave = np.interp(seconds, start + np.linspace(0, 0.3, len(steps)), steps)
        phase = 2 * np.pi * np.cumsum(rng.uniform(150, 400) * 2**octave) / 8000
        voice = sum(np.sin(n * phase) / n for n in (1, 2, 3))
        spoken = (seconds > start) & (seconds < start + 0.3)
        sound[:] = rng.uniform(0.2, 1) * voice * spoken + rng.normal(0, 0.4, 4000)
    return sounds, labels


def cnn(keras: Any, size: int = 8, filters: Sequence[int] = FILTERS) -> Any:
    """A compiled CNN for `digits`, of Keras 3 or tf_keras; it pools after every second layer."""
    layers = keras.layers
    stack = [keras.Input((size, size, 1))]
    for index, channels in enumerate(filters):
        stack += [
            layers.Conv2D(channels, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),  # epochs are short
            layers.ReLU(),
        ]
        if index % 2:
            stack.append(layers.MaxPooling2D())
    stack += [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)]
    return compiled(keras, keras.Sequential(stack))


def compiled(keras: Any, model: Any) -> Any:
    """The model, compiled to be a classifier that gives scores."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss=loss, metrics=["accuracy"])
    return model


def accuracy(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    return float(model.evaluate(x, y, verbose=0)[1])

"""Images: batches for training, and files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tensorflow as tf


def shuffled_images(x: Any, y: Any, *, batch_size: int, augment: bool) -> tf.data.Dataset:
    """Images and their classes in shuffled batches, with a fixed seed.

    Args:
        x: Images `[n, height, width, channels]`.
        y: Their classes, integers `[n]`.
        batch_size: Images in a batch.
        augment: Whether to pad by an eighth, crop and flip at random (4 pixels of 32).
    """

    def change(image: Any, label: Any) -> tuple[Any, Any]:
        pads = [(n // 8, n // 8) for n in image.shape[:2]]
        padded = tf.pad(image, [*pads, (0, 0)])
        return tf.image.random_flip_left_right(tf.image.random_crop(padded, image.shape)), label

    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0)
    if augment:
        data = data.map(change, num_parallel_calls=tf.data.AUTOTUNE)
    return data.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def read_image(path: str | os.PathLike[str], channels: int) -> Any:
    """The pixels of a JPEG, PNG, GIF or BMP file, from 0 to 255, `[height, width, channels]`.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is no such image.
    """
    content = Path(path).read_bytes()
    try:
        return tf.io.decode_image(content, channels=channels, expand_animations=False).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            f"Expected an image, JPEG, PNG, GIF or BMP. Received: {os.fspath(path)}, which cannot "
            "be read"
        ) from error


def resized_image(image: Any, height: int | None, width: int | None) -> Any:
    """An image `[h, w, channels]` of another size, in float32. Its middle is cut out in the shape.

    Args:
        image: The image.
        height: The height; None for its own height and width.
        width: The width; None for the same.
    """
    if height is None or width is None:
        return image.astype("float32")
    rows, columns = image.shape[:2]
    scale = min(rows / height, columns / width)
    cut = max(round(height * scale), 1), max(round(width * scale), 1)
    top, left = (rows - cut[0]) // 2, (columns - cut[1]) // 2
    part = image[top : top + cut[0], left : left + cut[1]]
    if cut == (height, width):
        return part.astype("float32")
    return tf.image.resize(part, (height, width), antialias=True).numpy()

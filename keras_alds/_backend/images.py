"""Batches of images for training."""

from __future__ import annotations

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

"""Retraining of compressed image classifiers, as the paper does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras_alds import _backend


def retrainer(
    x: Any,
    y: Any,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int = 128,
    augment: bool = False,
    from_logits: bool = True,
) -> Callable[[Any], None]:
    """Returns a `retrain` for `sweep`: SGD on images, with the learning rates rewound.

    The protocol of the paper: the weights stay, the optimizer is new, and the learning rates of
    the training's last epochs are gone through again.

    Args:
        x: Images `[n, height, width, channels]`.
        y: Their classes, integers `[n]`.
        learning_rates: Those of the last epochs of the training, in order; each is used for an
            equal part of `epochs`.
        epochs: Epochs of retraining.
        batch_size: Images in a batch.
        augment: Whether to pad by an eighth, crop and flip at random (4 pixels of 32).
        from_logits: Whether the model gives scores and not probabilities.

    Returns:
        A function of a model of either Keras.

    References:
        arXiv 2107.11442, section 4; Renda et al., "Comparing Rewinding and Fine-tuning in Neural
        Network Pruning", ICLR 2020.
    """
    import tensorflow as tf

    def change(image: Any, label: Any) -> tuple[Any, Any]:
        pads = [(n // 8, n // 8) for n in image.shape[:2]]
        padded = tf.pad(image, [*pads, (0, 0)])
        return tf.image.random_flip_left_right(tf.image.random_crop(padded, image.shape)), label

    def retrain(model: Any) -> None:
        keras = _backend.backend_of(model).keras
        keras.utils.set_random_seed(0)
        data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0)
        if augment:
            data = data.map(change, num_parallel_calls=tf.data.AUTOTUNE)
        data = data.batch(batch_size).prefetch(tf.data.AUTOTUNE)
        model.compile(
            keras.optimizers.SGD(learning_rates[0], momentum=0.9, nesterov=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
        )
        rewound = keras.callbacks.LearningRateScheduler(
            lambda epoch: float(learning_rates[epoch * len(learning_rates) // epochs])
        )
        model.fit(data, epochs=epochs, shuffle=False, callbacks=[rewound], verbose=0)

    return retrain

"""Retraining of compressed image classifiers, as the paper does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras_alds import _backend
from keras_alds._backend.images import shuffled_images


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

    This is the paper's protocol: it keeps the weights, starts a new optimizer, and repeats the
    learning rates of the last training epochs.

    Args:
        x: Images `[n, height, width, channels]`.
        y: Their classes, integers `[n]`.
        learning_rates: Learning rates of the last training epochs, in order; each is used for an
            equal part of `epochs`.
        epochs: Epochs of retraining.
        batch_size: Images in a batch.
        augment: Whether to pad by an eighth, crop and flip at random (4 pixels of 32).
        from_logits: Whether the model outputs logits, not probabilities.

    Returns:
        A function that takes a Keras 3 or tf_keras model.

    References:
        arXiv 2107.11442, section 4; Renda et al., "Comparing Rewinding and Fine-tuning in Neural
        Network Pruning", ICLR 2020.
    """

    def retrain(model: Any) -> None:
        keras = _backend.backend_of(model).keras
        keras.utils.set_random_seed(0)
        data = shuffled_images(x, y, batch_size=batch_size, augment=augment)
        model.compile(
            keras.optimizers.SGD(learning_rates[0], momentum=0.9, nesterov=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
        )
        rewound = keras.callbacks.LearningRateScheduler(
            lambda epoch: float(learning_rates[epoch * len(learning_rates) // epochs])
        )
        model.fit(data, epochs=epochs, shuffle=False, callbacks=[rewound], verbose=0)

    return retrain

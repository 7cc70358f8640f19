"""An LSTM that reads digits row by row: its kernels are factorized too.

    pip install "keras_alds[demo,litert]"
    python examples/lstm.py --cr 0.6

An image of 8×8 pixels is a sequence of 8 rows. An LSTM has two kernels, one for its inputs and one
for its state; each gets a rank of its own. The compressed layer is an LSTM still, with the same
arguments.

On two CPU cores, in 30 seconds: 71,434 → 26,378 parameters, a LiteRT file of 114,824 bytes. The
accuracy on 450 held-out images is 97.8 % before and 97.8 % after, without retraining.
"""

from __future__ import annotations

from pathlib import Path

import keras
from common import accuracy, compiled, digits, parser

import keras_alds


def main() -> None:
    options = parser(__doc__, epochs=25, cr=0.6)
    options.add_argument("--file", type=Path, default=Path("runs/lstm.tflite"))
    arguments = options.parse_args()
    keras.utils.set_random_seed(0)
    x_train, y_train, x_test, y_test = digits(limit=arguments.limit)
    x_train, x_test = x_train[..., 0], x_test[..., 0]  # [images, 8 steps, 8 features]
    layers = [
        keras.Input((8, 8)),
        keras.layers.LSTM(128),
        keras.layers.Dense(10),
    ]
    model = compiled(keras, keras.Sequential(layers))
    decay = keras.callbacks.LearningRateScheduler(
        lambda epoch: 0.01 * (1 - epoch / arguments.epochs)
    )
    model.fit(x_train, y_train, epochs=arguments.epochs, callbacks=[decay], verbose=0)

    small = keras_alds.compress(model, cr=arguments.cr, calibration_data=x_train)
    found = tuple(accuracy(m, x_test, y_test) for m in (model, small))
    keras_alds.report(model, small, {"accuracy, not retrained": found}).summary()
    print("the first layer is now a", type(small.layers[0]).__name__)

    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    content = keras_alds.litert.convert(small, arguments.file, verbose=0)
    print(f"{arguments.file}: {len(content):,} bytes")


if __name__ == "__main__":
    main()

"""Compress, prune, then train for int8: three techniques, one file for the phone.

    pip install "keras_alds[demo,litert,tfmot]"
    python examples/prune_and_quantize.py --cr 0.7 --sparsity 0.5

Each technique works on what the one before it has left. keras_alds makes the kernels thin. TF-MOT
sets half of the weights of their factors to zero. Training for int8 keeps the zeros. They make a
file smaller when it is zipped, as in an app's package.

On two CPU cores (65 seconds; 450 held-out images):

                                               accuracy     bytes    zipped
    original, float32                            99.33% 1,012,208   931,158
    original, int8                               99.33%   269,864   252,284
    compressed, int8                             99.33%    96,416    76,266
    compressed, pruned and trained for int8     100.00%    93,712    58,573
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow_model_optimization as tfmot
from common import add_filters, cnn, digits, parser

import keras_alds

sparsity, quantization = tfmot.sparsity.keras, tfmot.quantization.keras


def keep_zeros(model: Any) -> Any:
    """For `quantize_aware_training`: TF-MOT's scheme that keeps what is pruned."""
    scheme = tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
    return quantization.quantize_apply(quantization.quantize_annotate_model(model), scheme)


def main() -> None:
    options = parser(__doc__, epochs=12, cr=0.7)
    options.add_argument("--sparsity", type=float, default=0.5, help="zeros (default: 0.5)")
    add_filters(options)
    arguments = options.parse_args()
    keras.utils.set_random_seed(0)
    x_train, y_train, x_test, y_test = digits(limit=arguments.limit)
    model = cnn(keras, filters=arguments.filters)
    training = {"epochs": arguments.epochs, "verbose": 0}
    model.fit(x_train, y_train, **training)

    # One slice: no grouped convolutions, which some processors run slowly in int8.
    small = keras_alds.compress(model, cr=arguments.cr, calibration_data=x_train, max_slices=1)
    stock = keras_alds.expand(keras_alds.to_tf_keras(small))
    schedule = sparsity.ConstantSparsity(arguments.sparsity, 0, frequency=1)
    pruned = keras_alds.tfmot.prune_low_magnitude(stock, schedule, exclude="dense_1")  # the scores
    pruned.compile("adam", stock.loss, metrics=["accuracy"])
    pruned.fit(x_train, y_train, callbacks=[sparsity.UpdatePruningStep()], **training)
    sparse = sparsity.strip_pruning(pruned)
    sparse.compile("adam", stock.loss, metrics=["accuracy"])

    _, content = keras_alds.tfmot.quantize_aware_training(
        sparse, x_train, y_train, quantize_fn=keep_zeros, **training
    )
    print(f"{'':42} {'accuracy':>8} {'bytes':>9} {'zipped':>9}")
    original = keras_alds.litert.convert(model, verbose=0)
    int8 = {"quantize": "int8", "representative_data": x_train, "verbose": 0}
    files = {
        "original, float32": original,
        "original, int8": keras_alds.litert.convert(model, **int8),
        "compressed, int8": keras_alds.litert.convert(small, **int8),
        "compressed, pruned and trained for int8": content,
    }
    for name, file in files.items():
        compared = keras_alds.litert.compare(original, file, (x_test, y_test), runs=0, verbose=0)
        figures = compared.compressed
        print(
            f"{name:42} {figures.metrics['accuracy']:8.2%} {figures.size:9,} {figures.gzip_size:9,}"
        )


if __name__ == "__main__":
    main()

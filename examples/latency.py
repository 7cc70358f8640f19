"""Remove milliseconds, not parameters: choose by latency that is measured here.

    pip install "keras_alds[demo,litert]"
    python examples/latency.py --cr 0.4                    # float32
    python examples/latency.py --cr 0.4 --quantize int8

`cr` is the fraction of the latency that is removed. LiteRT runs the layers in the forms that
they may get, and the plan is chosen from these measurements. For comparison, the same fraction of
the parameters is removed as well. Neither model is retrained.

On two cores of an AMD EPYC, one thread (about a minute each; 450 held-out images):

    40% of the latency removed: latency × 0.59, parameters × 0.81, accuracy 99.33% → 99.33%
    40% of the parameters removed: latency × 0.95, parameters × 0.57, accuracy 99.33% → 99.33%

and with `--quantize int8`:

    40% of the latency removed: latency × 0.61, parameters × 0.78, accuracy 99.33% → 99.33%
    40% of the parameters removed: latency × 0.97, parameters × 0.57, accuracy 99.33% → 99.33%
"""

from __future__ import annotations

import keras
from common import add_filters, cnn, digits, parser

import keras_alds


def main() -> None:
    options = parser(__doc__, epochs=4, cr=0.4)
    options.add_argument("--quantize", choices=("int8",), help="default: float32")
    options.add_argument("--size", type=int, default=16, help="pixels of a side (default: 16)")
    options.add_argument("--runs", type=int, default=200, help="to time the files (default: 200)")
    add_filters(options)
    arguments = options.parse_args()
    keras.utils.set_random_seed(0)
    x_train, y_train, x_test, y_test = digits(arguments.size, arguments.limit)
    model = cnn(keras, arguments.size, arguments.filters)
    model.fit(x_train, y_train, epochs=arguments.epochs, verbose=0)

    # Measured once. The table can be saved, and used for other ratios or on another machine.
    table = keras_alds.litert.measure_latency(model, quantize=arguments.quantize, verbose=0)
    by_latency = keras_alds.select(
        model,
        cr=arguments.cr,
        objective="latency",
        latency_table=table,
        quantize=arguments.quantize,
        calibration_data=x_train,
    )
    by_latency.summary()
    by_params = keras_alds.select(model, cr=arguments.cr, calibration_data=x_train)
    for name, plan in (("latency", by_latency), ("parameters", by_params)):
        small = keras_alds.compress(model, plan=plan, calibration_data=x_train)
        files = keras_alds.litert.compare(
            model,
            small,
            (x_test, y_test),
            quantize=arguments.quantize,
            representative_data=x_train if arguments.quantize else None,
            runs=arguments.runs,
            verbose=0,
        )
        before, after = (f.metrics["accuracy"] for f in (files.original, files.compressed))
        print(
            f"{arguments.cr:.0%} of the {name} removed: latency × {files.latency_ratio:.2f}, "
            f"parameters × {small.count_params() / model.count_params():.2f}, accuracy "
            f"{before:.2%} → {after:.2%}"
        )


if __name__ == "__main__":
    main()

"""`equalize`: gives all channels between encoder and decoder the same range, before int8."""

from __future__ import annotations

from typing import Any

from keras_alds import _backend
from keras_alds.models import ranges
from keras_alds.models.data import Examples, with_progress
from keras_alds.models.inventory import has_weights
from keras_alds.models.turns import alone
from keras_alds.progress import progress_bar


def equalize(
    model: Any,
    representative_data: Any = None,
    *,
    max_examples: int | None = 256,
    verbose: int = 1,
) -> None:
    """Gives the channels between encoder and decoder the same range, **in place**.

    There is no nonlinearity between the two. Every rank's encoder weights are multiplied by some
    s > 0 and its decoder weights divided by it, so outputs stay the same up to float rounding. In
    int8 all these channels share one scale. If one is much larger than the others, the others get
    few of its 255 steps. Beyond a factor of some thousand, the file does not run in XNNPACK.

    `convert(quantize="int8")` does this automatically and leaves the model unchanged. Call
    `equalize` before quantization-aware training, or before your own converter.

    It handles factorized layers and, in Functional and Sequential models, the pairs that `expand`
    makes (a linear layer whose output goes only to one pointwise layer), but not those inside
    wrappers such as `TimeDistributed`.

    Args:
        model: A built Keras 3 or tf_keras model.
        representative_data: Unlabelled examples, as for `convert`. The largest absolute values on
            them become equal for all channels of a layer. Defaults to None: encoder and decoder
            weights of every rank get the same norm.
        max_examples: As for `convert`. Defaults to 256.
        verbose: 0 for silence, else shows a progress bar on a terminal. Defaults to 1.

    Raises:
        ValueError: If `model` is not a built model, or the data do not fit it or hold fewer than 8
            examples. The model is then unchanged.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    keras_alds.litert.equalize(small, x, verbose=0)
    ```
    """
    backend = _backend.backend_of(model)
    if not backend.is_model(model) or not has_weights(model):
        raise ValueError(
            f"Expected `model` to be a built `{backend.name}.Model`. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if representative_data is None:
        with alone(model):
            ranges.equalize(model)
        return
    examples = Examples(model, representative_data, max_examples, "representative_data")
    with alone(model), progress_bar(verbose) as progress:
        batches = with_progress(examples, progress, "equalization")
        ranges.equalize(model, (inputs for inputs, _ in batches))
